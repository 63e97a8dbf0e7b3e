"""A brief fine-tune of what is left of the adapter."""

from lorapack.recover.recover import Recovery, Settings, recover

__all__ = ["Recovery", "Settings", "recover"]
