"""Train the packed factors for a few steps, the uncompressed adapter as the teacher."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorapack.core.adapter import Adapter
from lorapack.data.batches import Batch, batches, training_batches
from lorapack.data.encode import Encoded
from lorapack.errors import InputError
from lorapack.model.forward import divergences, losses, predict
from lorapack.model.load import Loaded
from lorapack.model.point import Placed, place, point, taken

Objective = Literal["kl", "task"]
CHECKS = 6  # how often the selection rows are looked at
PATIENCE = 3  # checks in a row without improvement after which it stops
BACK_OFF = 0.3  # of the learning rate after a check without improvement
WARM_UP, LEAST_WARM_UP = 0.1, 3  # share of the steps, and steps


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

    AdamW without weight decay, a linear warm-up and a cosine down to zero. A check that finds no
    improvement lowers the learning rate, the next one in a row also goes back to the best state, the
    third ends it; so one rate suits language models and small classifiers. Factors that several
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
    trained = student.trained()
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(min(LEAST_WARM_UP, steps), int(steps * WARM_UP))
    held = batches(selection, loaded.tokens_with_logits(batch_tokens), loaded.pad)

    dtypes = [getattr(packed.pool[n] if part in ("A", "B") else packed.modules[n], part).dtype for n, part in trained]

    def check() -> float:
        exact = _state(parameters)
        _restore(parameters, [value.to(dtype) for value, dtype in zip(exact, dtypes, strict=True)])  # as it is written
        with torch.no_grad():
            found = [_objective(loaded, teacher, student, b.to(loaded.device), objective) for b in held]
        _restore(parameters, exact)
        return sum(float(t.sum()) for t in found) / sum(len(t) for t in found)

    curve = [(0, check())]
    best, state, waited, cuts = 0, _state(parameters), 0, 0
    every = max(1, steps // CHECKS)
    step = 0
    for batch in watch(training_batches(training, batch_size, steps, loaded.pad, seed), steps):
        step += 1
        loss = _objective(loaded, teacher, student, batch.to(loaded.device), objective).mean()
        if not torch.isfinite(loss):
            raise InputError(f"recovery: the loss is {loss.item()} at step {step}; a lower --learning-rate may help")
        loss.backward()  # type: ignore[no-untyped-call]
        rising, falling = step / warm_up, 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps + 1 - warm_up)))
        optimizer.param_groups[0]["lr"] = learning_rate * BACK_OFF**cuts * min(rising, falling)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append((step, check()))
            if curve[-1][1] < min(value for _, value in curve[:-1]):
                best, state, waited = step, _state(parameters), 0
                continue
            waited, cuts = waited + 1, cuts + 1
            if waited == PATIENCE:
                break
            if waited > 1:  # a smaller rate alone did not help
                _restore(parameters, state)
                optimizer.state.clear()
    _restore(parameters, state)
    record = Recovery(objective, step, best, learning_rate, batch_size, tuple(curve))
    return taken(packed, student) if best else packed, record


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


def _restore(parameters: Sequence[nn.Parameter], state: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
