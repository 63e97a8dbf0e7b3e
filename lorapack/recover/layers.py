"""The states between the model's layers, in which the student is held to the teacher as well (docs/recovery.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.data.encode import IGNORED
from lorapack.model.load import Loaded

MOST = 8  # layers that are compared: what the teacher has to keep grows with them


def compared(loaded: Loaded, batch: Batch) -> Tensor:
    """(rows, length) where states are compared: where a token is predicted; a classifier's at every token."""
    if loaded.task == "SEQ_CLS":
        return batch.attention_mask.bool()
    return torch.nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1), value=False)


@contextmanager
def recorded(loaded: Loaded, batch: Batch, wanted: bool) -> Iterator[list[Tensor]]:
    """The states, (n, width), that each of the compared layers gives while the block runs; in the order they are run.

    Args:
        loaded: the model; layers are what transformers can recompute one by one, `MOST` of them evenly spaced.
        batch: what it is run on.
        wanted: without it, nothing is recorded.
    """
    found: list[Tensor] = []
    where = compared(loaded, batch)

    def keep(_: Any, __: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        found.append(states[where.to(states.device)].to(where.device))

    handles = [layer.register_forward_hook(keep) for layer in (_layers(loaded) if wanted else ())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def distance(loaded: Loaded, batch: Batch, ours: list[Tensor], theirs: Tensor) -> Tensor:
    """The sum over the predictions of how far the student's states are off, in squares of the teacher's length.

    Args:
        ours: (n, width) a layer, with a graph.
        theirs: (layers, n, width).

    Returns:
        A scalar. A classifier predicts once a row: there it is the mean over the row's tokens.
    """
    mine, their = torch.stack(ours).float(), theirs.float()
    of_token = ((mine - their).square().sum(-1) / their.square().sum(-1)).sum(0)
    if loaded.task == "SEQ_CLS":
        where = compared(loaded, batch)
        of_token = of_token / where.sum(1)[where.nonzero()[:, 0]]
    return of_token.sum()


def _layers(loaded: Loaded) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [m for m in loaded.base.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    count = min(MOST, len(found))
    return [found[(n + 1) * len(found) // count - 1] for n in range(count)]
