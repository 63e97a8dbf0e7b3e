"""What is added up over batches, the same to the last bit whichever process had which of them."""

import torch
from torch import Tensor

from lorapack.processes import gathered_tensors

Key = tuple[str, ...]


class Totals:
    """Tensors by key. What a batch adds stays apart until it is done, so that it can be taken back.

    Attributes:
        done: the sums over all batches so far, added in their order.
    """

    def __init__(self) -> None:
        self.done: dict[Key, Tensor] = {}
        self._batch: dict[Key, Tensor] = {}

    def add(self, key: Key, value: Tensor) -> None:
        self._batch[key] = value if key not in self._batch else self._batch[key] + value

    def forget(self) -> None:
        """Take back what the batch at hand has added."""
        self._batch = {}

    def settle(self) -> None:
        """The batch is done, in every process: their batches, in the order of the processes, go to the rest."""
        for found in gathered_tensors(self._batch):
            # at once: on an accelerator each sum by itself would be a kernel
            both = [key for key in found if key in self.done]
            sums = torch._foreach_add([self.done[key] for key in both], [found[key] for key in both]) if both else []
            self.done |= {**found, **dict(zip(both, sums, strict=True))}
        self._batch = {}
