"""Carry out a plan: the same adapter with less in it."""

from lorapack.pack.pack import pack_adapter

__all__ = ["pack_adapter"]
