"""Quality on rows that were not used before, with intervals."""

from lorapack.evaluate.api import evaluate_adapters

__all__ = ["evaluate_adapters"]
