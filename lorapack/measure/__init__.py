"""Measure an adapter on data: r x r moments of every low-rank branch."""

from lorapack.measure.api import measure_adapter

__all__ = ["measure_adapter"]
