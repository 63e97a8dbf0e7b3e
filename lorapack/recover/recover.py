"""Train the packed factors for a few steps, the uncompressed adapter as the teacher."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lorapack.core.adapter import Adapter, digest
from lorapack.core.paired import error_of_sum
from lorapack.data.batches import Batch, batches, chosen, training_batches
from lorapack.data.encode import Encoded
from lorapack.errors import InputError
from lorapack.model.head import at_once
from lorapack.model.load import Loaded
from lorapack.model.memory import piecewise
from lorapack.model.point import Placed, place, taken
from lorapack.pack.store import stored_as
from lorapack.processes import add_up, anywhere, first, gathered, number
from lorapack.processes import count as processes
from lorapack.recover import state as states
from lorapack.recover.mask import Masks, RankMask
from lorapack.recover.objective import Objective, Teacher, backward, mean, measured_by_row
from lorapack.recover.state import State

CHECKS = 6  # how often the selection rows are looked at
PATIENCE = 3  # checks in a row that are surely worse after which it stops
BACK_OFF = 0.3  # of the learning rate after a check that is surely worse
SURELY = 2.0  # standard errors, row by row: a high rate's noise, which goes with the rate, is no reason to go back
RATE_OF_SIZE, LEAST_RATE, MOST_RATE = 0.05, 1e-3, 1e-2  # where no rate is given: of the elements' size, within these
WARM_UP, LEAST_WARM_UP = 0.1, 3  # share of the steps, and steps
COOL_DOWN = 0.4  # share of the steps: full speed for longer than a cosine has, and time to settle
BETAS = 0.9, 0.95  # of AdamW: a run of a hundred steps has no time for a mean over a thousand squares
ROWS, ROWS_OF_CLASSIFIER = 8, 32  # a step: a row of text holds many predictions, a row with one label one
AT_ONCE = 1024  # tokens in one backward pass on a CPU, which is no faster with more and needs the memory

Stop = Callable[[], AbstractContextManager[Callable[[], bool]]]


def unstopped() -> AbstractContextManager[Callable[[], bool]]:
    """Nobody asks it to stop."""
    return nullcontext(lambda: False)


@dataclass(frozen=True)
class Settings:
    """How to recover.

    Attributes:
        steps: at most so many.
        objective: ``kl`` to the original's predictions, the ``task``'s own loss, or the mean of ``both``.
        learning_rate: at its peak; of factors that n modules share, over the root of n. None for what the size of the
            factors says (`usual_rate`).
        batch_size: rows a step; None for the usual number (`rows_a_step`).
        rank_dropout: the probability with which a rank is off in training; 0 for none.
        rank_mask: whether it is drawn for each ``token`` or for each ``step``.
        checkpointing: compute activations twice and keep few of them.
        layers: the weight, falling to zero with the steps, of the states between the layers, in which the
            student is held to the teacher beside the objective (`lorapack.recover.layers`); 0 for none.
    """

    steps: int = 100
    objective: Objective = "both"
    learning_rate: float | None = None
    batch_size: int | None = None
    rank_dropout: float = 0.0
    rank_mask: RankMask = "token"
    checkpointing: bool = False
    layers: float = 1.0

    def __post_init__(self) -> None:
        given = [number for number in (self.batch_size, self.learning_rate) if number is not None]
        if self.steps < 0 or not all(number > 0 for number in given):
            raise InputError("--recover-steps must be 0 or more, --batch-size and --learning-rate above 0")
        if not 0 <= self.rank_dropout < 1:
            raise InputError(f"--rank-dropout {self.rank_dropout} is not a probability below 1")


def rows_a_step(batch_size: int | None, task: str | None) -> int:
    """How many rows a step is of: as many as are asked for; otherwise 8, and 32 where a row is one prediction."""
    return batch_size or (ROWS_OF_CLASSIFIER if task == "SEQ_CLS" else ROWS)


def usual_rate(student: Placed) -> float:
    """The learning rate where none is given: a twentieth of the size of the factors' elements, 1e-3 to 1e-2.

    AdamW moves every element by about its rate, so a rate is large or small beside the elements alone. Of a pair
    their size is √(rms A · rms B), which no scale between the two changes; of several pairs the median.
    """
    trained = [student.pairs[name] for name, part in student.trained() if part == "A"]
    sizes = [math.sqrt(math.prod(float(f.detach().square().mean().sqrt()) for f in pair)) for pair in trained]
    found = RATE_OF_SIZE * median(sizes) if sizes else 0.0
    return float(f"{min(max(found, LEAST_RATE), MOST_RATE):.2g}")  # as it can be given again


@dataclass(frozen=True)
class Recovery:
    """What the recovery did.

    Attributes:
        objective: ``kl``, ``task`` or ``both``.
        steps: taken; `best` is the one whose state was kept, 0 the start.
        curve: (step, objective on the selection rows), the start first.
        rank_dropout: of the ranks, in training.
        stopped: whether it was asked to stop before its end.
        masked: whether the curve is with ranks off too, the same each time: where an adapter learns from itself.
    """

    objective: str
    steps: int
    best: int
    learning_rate: float
    batch_size: int
    curve: tuple[tuple[int, float], ...]
    rank_dropout: float = 0.0
    stopped: bool = False
    masked: bool = False


def recover(
    loaded: Loaded,
    original: Adapter,
    packed: Adapter,
    training: Sequence[Encoded],
    selection: Sequence[Encoded],
    settings: Settings,
    *,
    batch_tokens: int = 4096,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    stop: Stop = unstopped,
    watch: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, total: batches,
) -> tuple[Adapter, Recovery]:
    """Train the packed adapter's linear factors; the best state on the selection rows is returned.

    Pairs that are held in few bits (`lorapack.core.codes.Codes`) are trained as floats, judged as they come out of
    rounding, and held in as few bits in the end.

    AdamW without weight decay; the rate rises linearly, stays, and falls linearly to zero at the end (`pace`).
    A check that is worse than the best by more than chance lowers it, the next one in a row also goes
    back to the best state, the third ends it; so one rate suits language models and small classifiers. Factors that
    several modules point to are one parameter. The start counts as a state, so the objective on the
    selection rows never gets worse; it is that of the whole adapter, without rank masks, unless the
    adapter learns from itself.

    Args:
        loaded: the base model.
        original: the teacher (`kl`, `both`), the same base with its factors exchanged.
        packed: where to start.
        training, selection: rows of two parts.
        settings: how.
        batch_tokens: tokens in memory at once; a batch with more is gone through in pieces.
        seed: of the order of the rows and of the rank masks.
        state: a file that holds, from check to check, all that is needed to go on. It goes when the
            recovery comes to its end.
        resume: go on from that file.
        stop: entered while it trains; what it gives says whether to stop after the step at hand.
        watch: sees the batches go by.

    Raises:
        InputError: the loss is not a finite number, or the state is of another recovery.
    """
    if settings.rank_dropout and processes() > 1:
        raise InputError("--rank-dropout: its masks are drawn in one process; run it without a launcher")
    batch_size = rows_a_step(settings.batch_size, loaded.task)
    inside = settings.layers if settings.objective != "task" else 0.0  # the task has no teacher
    teacher = Teacher(loaded, place(original, loaded.device), layers=inside > 0)
    student = place(packed, loaded.device, trainable=True)
    parameters = list(student.trained().values())
    learning_rate = settings.learning_rate or usual_rate(student)
    optimizer, steps = _optimizer(student, learning_rate), settings.steps
    batch_tokens = at_once(loaded, batch_tokens)
    held = batches(selection, batch_tokens, loaded.pad)
    judge = Teacher(loaded, teacher.placed)
    in_memory = batch_tokens if loaded.device.type == "cuda" else min(batch_tokens, AT_ONCE)
    masks = Masks(settings.rank_dropout, settings.rank_mask, seed)

    # an adapter that learns from itself is at no distance from itself but with ranks off; all else is judged whole
    judged_masked = masks.p > 0 and settings.objective == "kl" and digest(original) == digest(packed)

    def check() -> Tensor:
        written = place(_written(packed, student), loaded.device, trainable=True)  # which is what masks are for
        with nullcontext() if judged_masked else masks.off():
            return measured_by_row(loaded, written, judge, masks.fixed(held), settings.objective)

    def train(batch: Batch) -> float:
        """One step's gradients, of the rows of all processes; the mean objective."""
        masks.renew(step=True)

        def run(piece: Batch) -> tuple[float, int]:
            masks.renew()
            weight = inside * (1 - at.step / steps)
            return backward(loaded, student, teacher, piece, settings.objective, weight)

        found = piecewise(loaded, _share(batch), run, optimizer.zero_grad, in_memory)
        total, count = _together(parameters, found)
        for p in parameters:
            if p.grad is not None:
                p.grad /= count
        return total / count

    facts = asdict(settings) | {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "start": digest(packed),
        "teacher": digest(original),
        "rows": [len(training), len(selection), sum(sum(row.input_ids) for row in training)],
    }
    with masks.on(loaded, student) if masks.p else nullcontext(), _checkpointing(loaded, settings.checkpointing):
        if state is not None and resume:
            at = states.load(state, facts, parameters, len(selection))
            _restore(parameters, at.now)
            states.restore_moments(optimizer, parameters, at.moments)
            if at.generator is not None:
                masks.generator.set_state(at.generator)
        else:
            judged = check()
            at = State(_state(parameters), _state(parameters), judged, [(0, mean(judged))])
        every = max(1, steps // CHECKS)
        rows = training_batches(training, batch_size, steps, loaded.pad, seed)
        with stop() as asked_here:

            def asked() -> bool:
                return anywhere(asked_here())

            for batch in watch(islice(rows, at.step, None), steps - at.step):
                at.step += 1
                loss = train(batch)
                if not math.isfinite(loss):
                    raise InputError(
                        f"recovery: the loss is {loss} at step {at.step}; a lower --learning-rate may help"
                    )
                rate = learning_rate * pace(at.step, steps) * BACK_OFF**at.cuts
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["share"]
                optimizer.step()
                optimizer.zero_grad()
                if at.step % every and at.step != steps and not asked():
                    continue
                judged = check()
                at.curve.append((at.step, mean(judged)))
                if mean(judged) < mean(at.judged):
                    at.best, at.kept, at.judged, at.worse = at.step, _state(parameters), judged, 0
                elif not surely_worse(judged, at.judged):
                    at.worse = 0
                else:
                    at.worse, at.cuts = at.worse + 1, at.cuts + 1
                    if 1 < at.worse < PATIENCE:  # a smaller rate alone did not help
                        _restore(parameters, at.kept)
                        optimizer.state.clear()
                if state is not None and first():
                    at.now, at.moments = _state(parameters), states.moments(optimizer, parameters)
                    at.generator = masks.generator.get_state()
                    states.save(at, state, facts)
                if at.worse == PATIENCE or asked():
                    break
            stopped = asked() and at.step < steps
    _restore(parameters, at.kept)
    if state is not None and not stopped and first():
        state.unlink(missing_ok=True)
    record = Recovery(
        settings.objective,
        at.step,
        at.best,
        learning_rate,
        batch_size,
        tuple(at.curve),
        settings.rank_dropout,
        stopped,
        judged_masked,
    )
    return _written(packed, student) if at.best else packed, record


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step, 1 to `steps`: rising, full, falling (arXiv 2405.18392)."""
    warm_up = max(min(LEAST_WARM_UP, steps), int(steps * WARM_UP))
    return min(1.0, step / warm_up, (steps + 1 - step) / (steps * COOL_DOWN))


def surely_worse(now: Tensor, best: Tensor) -> bool:
    """Whether the objective is higher than the best by more than other rows would change; (2, rows) each, by row."""
    difference = (now[0] - best[0]).numpy()
    return float(difference.sum()) > SURELY * error_of_sum(difference)


def _written(packed: Adapter, student: Placed) -> Adapter:
    """What the student is once it is written: in the dtypes of the packed adapter, and in its codes."""
    return stored_as(taken(packed, student), packed)


def _share(batch: Batch) -> Batch:
    """The rows of a batch that are this process's."""
    return chosen(batch, torch.arange(number(), len(batch.input_ids), processes()), batch.input_ids.shape[1])


def _together(parameters: Sequence[nn.Parameter], found: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Add up, over all processes, the gradients, and the sums of the objective and over how many predictions it is."""
    each = gathered(([p.grad is not None for p in parameters], found))
    for p, *reached in zip(parameters, *(flags for flags, _ in each), strict=True):
        if p.grad is None and any(reached):
            p.grad = torch.zeros_like(p)
    add_up([p.grad for p in parameters if p.grad is not None])
    pieces = [piece for _, their_pieces in each for piece in their_pieces]
    return sum(value for value, _ in pieces), sum(count for _, count in pieces)


def _optimizer(student: Placed, learning_rate: float) -> torch.optim.AdamW:
    """A parameter that n modules share gets n gradients added up, so its rate is over the root of n."""
    users = Counter(name for name, _ in student.pointers.values())
    groups = [
        {"params": [parameter], "share": users[name] ** -0.5 if part in ("A", "B") and users[name] else 1.0}
        for (name, part), parameter in student.trained().items()
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, weight_decay=0.0)


@contextmanager
def _checkpointing(loaded: Loaded, wanted: bool) -> Iterator[None]:
    """The model's layers recompute their activations in the backward pass.

    transformers does so in training mode only. Here each layer alone is said to be in training, what is
    inside it not, so that no dropout comes to life.
    """
    layers: list[Any] = []
    if wanted:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [m for m in loaded.base.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise InputError(f"--checkpointing: {type(loaded.base).__name__} has no layers that can recompute")
        loaded.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if layers:
            loaded.base.gradient_checkpointing_disable()


def _state(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _restore(parameters: Sequence[nn.Parameter], state: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
