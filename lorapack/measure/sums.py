"""Sums over the batches of a pass, the same to the last bit whichever process had which batch."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.model.load import Loaded
from lorapack.model.memory import piecewise
from lorapack.processes import gathered_tensors, rounds

Key = TypeVar("Key", bound=Hashable)


class Sums(Generic[Key]):
    """Tensors by key. What a batch adds is summed apart and goes to the rest when the batch is done, in their order."""

    def __init__(self) -> None:
        self.done: dict[Key, Tensor] = {}
        self._batch: dict[Key, Tensor] = {}

    def add(self, key: Key, value: Tensor) -> None:
        self._batch[key] = value if key not in self._batch else self._batch[key] + value

    def over(self, loaded: Loaded, batches: Iterable[Batch], run: Callable[[Batch], None]) -> None:
        """Run this process's share of the batches, each on the device; `run`, or a hook in it, adds what it finds."""
        for batch in rounds(batches):
            if batch is not None:
                piecewise(loaded, batch, run, self._batch.clear)
            for found in gathered_tensors(self._batch):
                for key, value in found.items():
                    self.done[key] = value if key not in self.done else self.done[key] + value
            self._batch.clear()
