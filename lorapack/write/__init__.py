"""Write an adapter: compact where something is shared, plain PEFT otherwise or on demand."""

from lorapack.write.adapter import put_adapter, write_adapter
from lorapack.write.directory import new_directory

__all__ = ["new_directory", "put_adapter", "write_adapter"]
