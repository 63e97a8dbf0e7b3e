"""What is added up over batches, the same to the last bit whichever process had which of them."""

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
        _add(self._batch, key, value)

    def forget(self) -> None:
        """Take back what the batch at hand has added."""
        self._batch = {}

    def settle(self) -> None:
        """The batch is done, in every process: their batches, in the order of the processes, go to the rest."""
        for found in gathered_tensors(self._batch):
            for key, value in found.items():
                _add(self.done, key, value)
        self._batch = {}


def _add(sums: dict[Key, Tensor], key: Key, value: Tensor) -> None:
    sums[key] = value if key not in sums else sums[key] + value
