"""A brief fine-tune of what is left of the adapter."""

from lorapack.recover.recover import Recovery, Settings, recover, rows_a_step

__all__ = ["Recovery", "Settings", "recover", "rows_a_step"]
