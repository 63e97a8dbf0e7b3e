"""Read an adapter from a directory: PEFT's format and lorapack's compact one.

Nothing is imported before it is used: a merge of safetensors needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapack.read.adapter import read_adapter

__all__ = ["read_adapter"]


def __getattr__(name: str) -> Any:
    if name == "read_adapter":
        from lorapack.read.adapter import read_adapter

        return read_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
