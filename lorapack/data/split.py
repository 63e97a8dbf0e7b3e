"""Disjoint parts of the data, decided by a seed: no figure comes from rows that were used before."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lorapack.data.columns import Example
from lorapack.errors import InputError

EVALUATION, SELECTION = 0.25, 0.10  # shares of the rows; at most so many rows:
MOST_EVALUATION, MOST_SELECTION = 1000, 64
SAMPLE = "20%"


@dataclass(frozen=True)
class Parts:
    """The rows by what they are for. No row, and no copy of a row, is in two parts.

    Attributes:
        calibration: to measure on.
        recovery: to train on.
        selection: to choose among plans and to stop the recovery on.
        evaluation: to report on; used by nothing else.
    """

    calibration: tuple[Example, ...]
    recovery: tuple[Example, ...]
    selection: tuple[Example, ...]
    evaluation: tuple[Example, ...]

    def digests(self) -> dict[str, dict[str, object]]:
        """For the record: how many rows, which, and a digest of their contents."""
        return {
            name: {
                "rows": len(part),
                "numbers": sorted(e.row for e in part),
                "sha256": hashlib.sha256("\n".join(sorted(e.content for e in part)).encode()).hexdigest(),
            }
            for name in ("calibration", "recovery", "selection", "evaluation")
            if (part := getattr(self, name)) is not None
        }


def split(examples: Sequence[Example], *, sample: str, seed: int, evaluation: Sequence[Example] | None = None) -> Parts:
    """Cut the rows into parts.

    Copies of a row count as one, and a row that also stands in `evaluation` is left out of the other
    parts. Rows are put in a random order in which every label is spread evenly, so each part has
    the labels in proportion.

    Args:
        examples: the usable rows of the data.
        sample: how much to calibrate on: ``"20%"`` of the rows, or a number of them.
        seed: of the order.
        evaluation: the rows of a file of its own; otherwise they are cut off here.

    Raises:
        InputError: too few rows for every part to have one, or a sample that is no such number.
    """
    unique = {e.content: e for e in reversed(examples)}
    held_out = {e.content: e for e in reversed(evaluation)} if evaluation is not None else {}
    ordered = spread([e for content, e in unique.items() if content not in held_out], seed)
    wanted = 3 if evaluation is not None else 4
    if len(ordered) < wanted:
        raise InputError(f"{len(ordered)} different usable rows are too few: at least {wanted} are needed")
    at = 0

    def take(count: int) -> tuple[Example, ...]:
        nonlocal at
        part = tuple(ordered[at : at + max(1, count)])
        at += len(part)
        return part

    if evaluation is None:
        final = take(min(MOST_EVALUATION, int(len(ordered) * EVALUATION)))
    else:
        final = tuple(spread(list(held_out.values()), seed))[:MOST_EVALUATION]
        if not final:
            raise InputError("the evaluation data have no usable row")
    selection = take(min(MOST_SELECTION, int(len(ordered) * SELECTION)))
    calibration = take(min(_count(sample, len(ordered)), len(ordered) - at - 1))
    return Parts(calibration, tuple(ordered[at:]), selection, final)


def spread(examples: Sequence[Example], seed: int) -> list[Example]:
    """A random order in which any stretch has the labels in proportion."""
    generator = random.Random(seed)
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: e.row):
        groups.setdefault(str(example.label) if not isinstance(example.label, float) else "", []).append(example)
    placed = []
    for label in sorted(groups):
        group = groups[label]
        generator.shuffle(group)
        start = generator.random()
        placed += [((n + start) / len(group), label, example) for n, example in enumerate(group)]
    return [example for _, _, example in sorted(placed, key=lambda p: p[:2])]


def _count(sample: str, total: int) -> int:
    try:
        wanted = float(sample[:-1]) / 100 * total if sample.endswith("%") else int(sample)
    except ValueError:
        raise InputError(f"--sample {sample!r} is neither a percentage like 20% nor a number of rows") from None
    if not wanted > 0 or wanted > total * 1e6:
        raise InputError(f"--sample {sample!r} must be above 0")
    return max(1, int(wanted))
