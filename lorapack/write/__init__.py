"""Write an adapter: compact where something is shared, plain PEFT otherwise or on demand.

The writers are imported when they are used: a merge of safetensors needs no torch.
"""

from typing import TYPE_CHECKING, Any

from lorapack.write.directory import new_directory

if TYPE_CHECKING:
    from lorapack.write.adapter import put_adapter, write_adapter

__all__ = ["new_directory", "put_adapter", "write_adapter"]


def __getattr__(name: str) -> Any:
    if name in ("put_adapter", "write_adapter"):
        from lorapack.write import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
