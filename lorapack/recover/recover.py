"""Train the packed factors for a few steps, the uncompressed adapter as the teacher."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lorapack.core.adapter import Adapter, Factors
from lorapack.data.batches import Batch, batches, training_batches
from lorapack.data.encode import Encoded
from lorapack.errors import InputError
from lorapack.model.forward import divergences, losses, predict
from lorapack.model.load import Loaded
from lorapack.model.point import Placed, place, point

Objective = Literal["kl", "task"]
CHECKS = 5  # how often the selection rows are looked at
PATIENCE = 2  # checks without improvement after which it stops
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Recovery:
    """What the recovery did.

    Attributes:
        objective: ``kl`` or ``task``.
        steps: taken; `best` is the one whose state was kept, 0 the start.
        curve: (step, objective on the selection rows), the start first.
    """

    objective: str
    steps: int
    best: int
    learning_rate: float
    batch_size: int
    curve: tuple[tuple[int, float], ...]


def recover(
    loaded: Loaded,
    original: Adapter,
    packed: Adapter,
    training: Sequence[Encoded],
    selection: Sequence[Encoded],
    *,
    steps: int,
    objective: Objective = "kl",
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    batch_tokens: int = 4096,
    seed: int = 0,
    watch: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, total: batches,
) -> tuple[Adapter, Recovery]:
    """Train the packed adapter's linear factors; the best state on the selection rows is returned.

    AdamW without weight decay, a linear warm-up and a cosine down to zero. Factors that several
    modules point to are one parameter. The start counts as a state, so the objective on the
    selection rows never gets worse.

    Args:
        loaded: the base model.
        original: the teacher (`kl`), the same base with its factors exchanged.
        packed: where to start.
        training, selection: rows of two parts.
        steps: at most so many.
        objective: ``kl`` to the original's predictions, or the ``task``'s own loss.
        learning_rate: at its peak.
        batch_size: rows a step.
        batch_tokens: tokens a batch when looking at the selection rows.
        seed: of the order of the rows.
        watch: sees the batches go by.

    Raises:
        InputError: the loss is not a finite number.
    """
    teacher, student = place(original, loaded.device), place(packed, loaded.device, trainable=True)
    parameters = [p for pair in student.pairs.values() for p in pair]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, int(steps * WARM_UP))

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    held = batches(selection, loaded.tokens_with_logits(batch_tokens), loaded.pad)

    def check() -> float:
        with torch.no_grad():
            found = [_objective(loaded, teacher, student, b.to(loaded.device), objective) for b in held]
        return sum(float(t.sum()) for t in found) / sum(len(t) for t in found)

    curve = [(0, check())]
    best, state, waited = 0, _state(parameters), 0
    every = max(1, steps // CHECKS)
    step = 0
    for batch in watch(training_batches(training, batch_size, steps, loaded.pad, seed), steps):
        step += 1
        loss = _objective(loaded, teacher, student, batch.to(loaded.device), objective).mean()
        if not torch.isfinite(loss):
            raise InputError(f"recovery: the loss is {loss.item()} at step {step}; a lower --learning-rate may help")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append((step, check()))
            if curve[-1][1] < min(value for _, value in curve[:-1]):
                best, state, waited = step, _state(parameters), 0
            else:
                waited += 1
                if waited >= PATIENCE:
                    break
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
    record = Recovery(objective, step, best, learning_rate, batch_size, tuple(curve))
    return _adapter(packed, student) if best else packed, record


def _objective(loaded: Loaded, teacher: Placed, student: Placed, batch: Batch, objective: Objective) -> Tensor:
    if objective == "task":
        point(loaded, student)
        return losses(loaded, predict(loaded, batch))
    point(loaded, teacher)
    with torch.no_grad():
        target = predict(loaded, batch).logits
    point(loaded, student)
    return divergences(loaded, target, predict(loaded, batch).logits)


def _state(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _adapter(packed: Adapter, student: Placed) -> Adapter:
    """The trained factors in the dtype of the checkpoint."""
    pool = dict(packed.pool)
    for name, (a, b) in student.pairs.items():
        old = pool[name]
        pool[name] = Factors(a.detach().cpu().to(old.A.dtype), b.detach().cpu().to(old.B.dtype))
    return replace(packed, pool=pool)
