"""Decide what happens to each module: statistics and adapter in, plan out."""

from lorapack.plan.method import Method
from lorapack.plan.methods import DEFAULT, METHODS

__all__ = ["DEFAULT", "METHODS", "Method"]
