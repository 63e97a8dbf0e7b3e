"""Two reports compared: what got better, what got worse, and what cannot be told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorapack.core.report import Interval, Report
from lorapack.errors import InputError

Verdict = Literal["better", "worse", "same", "unclear", "new", "gone"]
SIZES = ("LoRA parameters", "LoRA bytes", "carried bytes")
MORE_IS_BETTER = {"accuracy", "f1", "matthews", "spearman", "same prediction", "gain retained"}


@dataclass(frozen=True)
class Change:
    """One figure in both reports.

    Attributes:
        figure: its name.
        old, new: with their intervals; sizes are exact. None where a report lacks it.
        verdict: ``better`` or ``worse`` where the intervals are disjoint, ``unclear`` where they
            overlap, ``new`` or ``gone`` where one report lacks the figure.
    """

    figure: str
    old: Interval | None
    new: Interval | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """The changes, and whether like was compared with like.

    Attributes:
        changes: sizes first.
        same_original: whether both were made from the same adapter.
        same_rows: whether both were evaluated on the same rows; None where one was not evaluated.
    """

    changes: tuple[Change, ...]
    same_original: bool
    same_rows: bool | None


def compare(old: Report, new: Report) -> Difference:
    """Compare what two compressions gave.

    Raises:
        InputError: they are of different base models or tasks, so that no figure can be compared.
    """
    for name, one, two in (("base model", old.base_model, new.base_model), ("task", old.task, new.task)):
        if one != two:
            raise InputError(f"the reports cannot be compared: {name} {one or 'unknown'!r} and {two or 'unknown'!r}")
    before, after = _figures(old), _figures(new)
    names = dict.fromkeys([*before, *after])
    rows = [_rows(report) for report in (old, new)]
    return Difference(
        tuple(_change(name, before.get(name), after.get(name)) for name in names),
        old.adapter["original"] == new.adapter["original"],
        None if None in rows else rows[0] == rows[1],
    )


def _figures(report: Report) -> Mapping[str, Interval]:
    size, found = report.after, report.quality
    exact = (size.parameters, size.bytes, size.carried_bytes)
    figures: dict[str, Interval | None] = {name: Interval(n, n, n) for name, n in zip(SIZES, exact, strict=True)}
    if found is not None:
        figures |= {name: each.get("compressed") for name, each in found.metrics.items()}
        figures |= {"KL from the original": found.divergence, "same prediction": found.agreement}
        figures |= {"loss increase": found.increase, "gain retained": found.retained}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _rows(report: Report) -> list[str] | None:
    part = (report.data or {}).get("parts", {}).get("evaluation")
    return sorted(part["fingerprints"]) if part and report.quality else None


def _change(name: str, old: Interval | None, new: Interval | None) -> Change:
    if old is None or new is None:
        return Change(name, old, new, "new" if old is None else "gone")
    if old == new:
        return Change(name, old, new, "same")
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return Change(name, old, new, "unclear")
    rose, fell = new.low > old.high, new.high < old.low
    better = rose if name in MORE_IS_BETTER else fell
    return Change(name, old, new, "better" if better else "worse" if rose or fell else "unclear")
