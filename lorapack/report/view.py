"""What the pages show, gathered from a report: plain values that a template lays out."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorapack.choose import Search
from lorapack.core.checked import parse_value
from lorapack.core.plan import Choice
from lorapack.core.report import Interval, ModuleRow, Report
from lorapack.recover.recover import Recovery
from lorapack.report.scale import Axis, linear, logarithmic
from lorapack.sweep import Point

VARIANTS = ("base", "original", "compressed")


@dataclass(frozen=True)
class Cell:
    """The modules of one type in one layer (several where a layer has several, as experts).

    Attributes:
        layer, type: the column and the row.
        modules: their names.
        importance: what the plan decided on, summed, as a share of the largest cell; None where it has none.
        share: the same as a share of all.
        state: ``kept``, ``shared`` or ``gone``; what the first of these that applies says.
        rank: after, ``4`` or ``2–6``; empty where they are gone.
        left: ranks after, as a share of the ranks before.
    """

    layer: int
    type: str
    modules: tuple[str, ...]
    importance: float | None
    share: float | None
    state: str
    rank: str
    left: float


@dataclass(frozen=True)
class Grid:
    """Layers across, module types down.

    Attributes:
        layers: numbers of the layers, -1 for modules in none.
        types: short names.
        cells: where there are modules.
        of_layer, of_type: importance summed, each as a share of the largest.
    """

    layers: tuple[int, ...]
    types: tuple[str, ...]
    cells: tuple[Cell, ...]
    of_layer: Mapping[int, float]
    of_type: Mapping[str, float]

    @property
    def has_importance(self) -> bool:
        return any(cell.importance is not None for cell in self.cells)

    @property
    def top(self) -> Cell:
        return max(self.cells, key=lambda cell: cell.share or 0.0)


@dataclass(frozen=True)
class Series:
    """Points that belong together: x, y, and the ends of y's interval where it has one."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]


@dataclass(frozen=True)
class Chart:
    """Series on two axes."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]


def grid(report: Report) -> Grid | None:
    """The importance and the fate of every module by layer and type; None where the report lists no modules."""
    if not report.modules:
        return None
    choices = {choice.module: choice for choice in report.plan.choices}
    places: dict[tuple[int, str], list[ModuleRow]] = {}
    for row in report.modules:
        places.setdefault((layer(row.module), row.type), []).append(row)
    found = {place: _importance(rows, choices) for place, rows in places.items()}
    scores = [score for score in found.values() if score is not None]
    most, whole = max(scores, default=0.0) or 1.0, sum(scores) or 1.0
    layers = tuple(sorted({place[0] for place in places}))
    types = tuple(row.type for row in report.types)

    def shares(position: int, of: Sequence[int | str]) -> dict[int | str, float]:
        sums = {key: sum(v or 0.0 for place, v in found.items() if place[position] == key) for key in of}
        return {key: total / (max(sums.values()) or 1.0) for key, total in sums.items()}

    def cell(place: tuple[int, str], rows: Sequence[ModuleRow]) -> Cell:
        score, (state, rank) = found[place], _fate(rows, choices)
        return Cell(
            layer=place[0],
            type=place[1],
            modules=tuple(row.module for row in rows),
            importance=None if score is None else score / most,
            share=None if score is None else score / whole,
            state=state,
            rank=rank,
            left=sum(row.rank_after for row in rows) / (sum(row.rank_before for row in rows) or 1),
        )

    cells = tuple(cell(place, rows) for place, rows in places.items())
    return Grid(layers, types, cells, shares(0, layers), shares(1, types))  # type: ignore[arg-type]


def layer(module: str) -> int:
    """The first number in a module's name; -1 where there is none."""
    number = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", module)
    return int(number[1]) if number else -1


def _importance(rows: Sequence[ModuleRow], choices: Mapping[str, Choice]) -> float | None:
    scores = [choices[row.module].score for row in rows if row.module in choices]
    known = [abs(score) for score in scores if score is not None and math.isfinite(score)]
    return sum(known) if known else None


def _fate(rows: Sequence[ModuleRow], choices: Mapping[str, Choice]) -> tuple[str, str]:
    left = [row for row in rows if row.rank_after]
    if not left:
        return "gone", ""
    low, high = min(row.rank_after for row in left), max(row.rank_after for row in left)
    shared = all(row.module in choices and choices[row.module].action == "share" for row in left)
    return "shared" if shared else "kept", str(low) if low == high else f"{low}–{high}"


def size_against_quality(report: Report, sweep: Sequence[Point] = ()) -> Chart | None:
    """Gain retained over the share of the parameters: the result, what a search tried, and a sweep."""
    whole = report.before.parameters or 1
    series = []
    for method in dict.fromkeys(point.method for point in sweep):
        mine = sorted((p for p in sweep if p.method == method), key=lambda point: point.share)
        points = [(p.share, p.quality.retained) for p in mine if p.quality and p.quality.retained]
        series.append(Series(method, tuple(_point(x, kept) for x, kept in points if kept.value is not None)))
    if search := searched(report):
        tried = sorted((parameters / whole, low) for parameters, low in search.tried)
        series.append(Series("tried, lower bound", tuple((x, y, None, None) for x, y in tried)))
    kept = report.quality.retained if report.quality else None
    if kept is not None and kept.value is not None:
        series.append(Series("this result", (_point(report.after.parameters / whole, kept),)))
    series = [each for each in series if each.points]
    if sum(len(each.points) for each in series) < 2:
        return None
    every = [point for each in series for point in each.points]
    ends = [end for point in every for end in point[1:] if end is not None]
    return Chart(logarithmic(x for x, *_ in every), linear(ends), tuple(series))


def searched(report: Report) -> Search | None:
    """How the smallest size was found, where it was searched for."""
    found = report.settings.get("retain")
    return parse_value(Search, found, "report.json: settings.retain") if found else None


def recovered(report: Report) -> Recovery | None:
    """The recovery, without points of its curve that are no numbers."""
    if not report.recovery:
        return None
    curve = [point for point in report.recovery.get("curve", ()) if None not in point]
    return parse_value(Recovery, {**report.recovery, "curve": curve}, "report.json: recovery")


def _point(x: float, y: Interval) -> tuple[float, float, float | None, float | None]:
    return x, y.value or 0.0, y.low, y.high


def recovery(report: Report) -> Chart | None:
    """The objective on the selection rows, step by step."""
    found = recovered(report)
    if found is None or len(found.curve) < 2:
        return None
    curve = found.curve
    line = Series("objective", tuple((step, value, None, None) for step, value in curve))
    return Chart(linear([x for x, _ in curve], 4), linear([0.0, *(y for _, y in curve)]), (line,))


def spectra(report: Report) -> dict[str, Chart]:
    """For each module type its singular values before and after, over their position."""
    found = {}
    for row in report.types:
        both = (("before", row.spectrum_before), ("after", row.spectrum_after))
        series = tuple(
            Series(name, tuple((n, value, None, None) for n, value in enumerate(values, 1) if value > 0))
            for name, values in both
        )
        values = [value for each in series for _, value, *_ in each.points]
        if values:
            last = max(2, len(row.spectrum_before), len(row.spectrum_after))
            whole = tuple(tick for tick in linear([1, last], 4).ticks if 1 <= tick <= last and tick == int(tick))
            found[row.type] = Chart(Axis(1, last, whole), logarithmic(values, 4), series)
    return found
