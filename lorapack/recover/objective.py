"""What the recovery makes small, and its slope in the logits; written out, so that no graph holds the vocabulary."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.model import head
from lorapack.model.forward import divergences, losses_of, outcomes
from lorapack.model.head import features, logits, parts
from lorapack.model.load import Loaded
from lorapack.model.memory import piecewise
from lorapack.model.point import Placed, point
from lorapack.processes import anywhere, gathered, rounds
from lorapack.recover.layers import compared, distance, recorded

Objective = Literal["kl", "task", "both"]
MOST_KEPT = 2**28  # bytes of the teacher's hidden states that are kept from one epoch to the next


class Teacher:
    """The original adapter's hidden states of each row; computed once a row, as far as `MOST_KEPT` goes.

    Args:
        layers: whether the states between the layers are wanted too.
    """

    def __init__(self, loaded: Loaded, placed: Placed, layers: bool = False) -> None:
        self.loaded, self.placed, self.layers = loaded, placed, layers
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def values(self, batch: Batch) -> Tensor:
        """The `Features.values` of a batch; the model is left pointing at the teacher."""
        return self.states(batch)[0]

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The `values` of a batch and the states between its layers, (layers, n, width); no layers where not wanted."""
        point(self.loaded, self.placed)
        lacking = any(place not in self._kept for place in batch.places)
        if not (anywhere(lacking) if self.loaded.sharded else lacking):
            values, inside = zip(*(self._kept[place] for place in batch.places), strict=True)
            return torch.cat(values), torch.cat(inside, dim=1)
        with torch.no_grad(), precision(self.loaded), recorded(self.loaded, batch, self.layers) as between:
            found = features(self.loaded, batch)
        states = torch.stack(between) if between else found.values.new_zeros(0, len(found.values), 0)
        counts = torch.bincount(found.rows, minlength=len(batch.places)).tolist()
        lengths = compared(self.loaded, batch).sum(1).tolist() if between else counts
        parts = zip(torch.split(found.values, counts), torch.split(states, lengths, dim=1), strict=True)
        for place, of_row in zip(batch.places, parts, strict=True):
            size = sum(t.numel() * t.element_size() for t in of_row)
            if place not in self._kept and self._bytes + size <= MOST_KEPT:
                self._kept[place] = of_row[0].clone(), of_row[1].clone()
                self._bytes += size
        return found.values, states


def measured(
    loaded: Loaded, student: Placed, teacher: Teacher, batches: Iterable[Batch], objective: Objective
) -> float:
    """The mean of the objective over the predictions of some batches."""
    return mean(measured_by_row(loaded, student, teacher, batches, objective))


def mean(by_row: Tensor) -> float:
    """Of what `measured_by_row` returns: over all predictions."""
    return float(by_row[0].sum() / by_row[1].sum())


def measured_by_row(
    loaded: Loaded, student: Placed, teacher: Teacher, batches: Iterable[Batch], objective: Objective
) -> Tensor:
    """Of each row the sum of the objective, and over how many predictions it is: (2, rows) float64, on the CPU."""

    def run(batch: Batch) -> tuple[tuple[int, ...], Tensor]:
        found = torch.zeros(2, len(batch.places), dtype=torch.float64)
        target = teacher.values(batch) if objective != "task" else None
        point(loaded, student)
        with precision(loaded):
            seen = features(loaded, batch)
        for part in parts(loaded, seen):
            with precision(loaded):
                theirs = None if target is None else logits(loaded, teacher.placed, seen, target[part])
                ours = logits(loaded, student, seen, seen.values[part])
            outcome, value = outcomes(loaded, ours), torch.zeros_like(ours[:, 0])
            if theirs is not None:
                expected = outcomes(loaded, theirs)
                value += divergences(loaded, expected, expected.exp(), outcome)
            if objective != "kl":
                value += losses_of(loaded, outcome, seen.targets[part])
            both = torch.stack([value.double() / (2 if objective == "both" else 1), torch.ones_like(value).double()])
            found.index_add_(1, seen.rows[part].cpu(), both.cpu())
        return batch.places, found

    with torch.no_grad():
        pieces = [piece for batch in rounds(batches) for piece in piecewise(loaded, batch, run)]
    everywhere = list(chain.from_iterable(gathered(pieces)))
    order = torch.tensor([place for places, _ in everywhere for place in places]).argsort()
    return torch.cat([found for _, found in everywhere], dim=1)[:, order]


def backward(
    loaded: Loaded, student: Placed, teacher: Teacher, batch: Batch, objective: Objective, weight: float = 0.0
) -> tuple[float, int]:
    """Add the gradient of the *sum* of the objective over a batch to the student's parameters.

    In two stages: chunk by chunk through the head, which leaves a gradient in the hidden states, then
    once through the body. The sum, not the mean: what is added up over parts of a batch is divided once.

    Args:
        weight: of the states between the layers (`lorapack.recover.layers.distance`), which are learnt
            beside the objective; the teacher has to have them.

    Returns:
        The sum of the objective alone, and over how many predictions it is.
    """
    target, theirs_inside = teacher.states(batch) if objective != "task" else (None, None)
    point(loaded, student)
    with precision(loaded), recorded(loaded, batch, weight > 0) as between:
        seen = features(loaded, batch)
    beside = None
    if between and theirs_inside is not None:
        beside = weight * distance(loaded, batch, between, theirs_inside)
    total = 0.0

    def chunk(part: slice, states: Tensor) -> None:
        nonlocal total
        with precision(loaded):
            with torch.no_grad():
                theirs = None if target is None else logits(loaded, teacher.placed, seen, target[part])
            ours = logits(loaded, student, seen, states)
        value, slope = slope_in_logits(ours.detach(), seen.targets[part], theirs, objective, loaded.is_regression)
        total += float(value.sum(dtype=torch.float64))
        ours.backward(slope)  # type: ignore[no-untyped-call]

    head.backward(loaded, seen, chunk, beside)
    return total, len(seen)


def slope_in_logits(
    ours: Tensor, targets: Tensor, theirs: Tensor | None, objective: Objective, regression: bool
) -> tuple[Tensor, Tensor]:
    """The objective of each prediction, (n,), and its derivative in the student's logits, (n, classes).

    KL(teacher || student) falls along softmax(student) - softmax(teacher), cross entropy along
    softmax(student) - the target; ``both`` is the mean of the two.

    Args:
        ours, theirs: (n, classes) float32 logits; `theirs` is overwritten, and None for ``task``.
        targets: (n,) class or number.
    """
    share = 0.5 if objective == "both" else 1.0
    if regression:
        value, slope = torch.zeros_like(ours[:, 0]), torch.zeros_like(ours)
        for aim in ([theirs[:, 0]] if theirs is not None else []) + (
            [targets.to(ours.dtype)] if objective != "kl" else []
        ):
            value += share * (ours[:, 0] - aim) ** 2
            slope[:, 0] += share * 2 * (ours[:, 0] - aim)
        return value, slope
    log_ours = ours - ours.logsumexp(-1, keepdim=True)
    value = torch.zeros_like(ours[:, 0])
    if objective != "kl":
        value -= share * log_ours.gather(1, targets[:, None])[:, 0]
    expected = None
    if theirs is not None:
        theirs -= theirs.logsumexp(-1, keepdim=True)
        expected = theirs.exp()
        value += share * (theirs.sub_(log_ours).mul_(expected)).sum(-1)
    slope = log_ours.exp_()
    if expected is not None:
        slope -= expected.mul_(share)
    if objective != "kl":
        slope.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -share, dtype=slope.dtype))
    return value, slope


def precision(loaded: Loaded) -> AbstractContextManager[object]:
    """The base's own where that is bf16 or fp16: the factors, float32 parameters, are multiplied in it as well."""
    dtype = next(loaded.base.parameters()).dtype
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(loaded.device.type, dtype=dtype)
    return nullcontext()
