"""Read an adapter from a directory: PEFT's format and lorapack's compact one."""

from lorapack.read.adapter import read_adapter

__all__ = ["read_adapter"]
