"""What was done and what it cost: the value from which tables, cards and gates are made."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorapack.core.adapter import Adapter, Size
from lorapack.core.names import module_type, short_types
from lorapack.core.plan import Plan
from lorapack.errors import InputError

VERSION = 1


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval; None where it is not a finite number."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Quality:
    """Figures on the evaluation rows.

    Attributes:
        rows, predictions: how many rows, and tokens or labels predicted in them.
        metrics: metric to variant (``base``, ``original``, ``compressed``) to figure. ``base`` is the
            model with every low-rank update off; saved modules (a classification head) stay.
        divergence: mean KL(original || compressed) a prediction, nats.
        agreement: share of predictions whose most likely outcome is the original's.
        retained: gain retained in loss, (base - compressed) / (base - original); None where the
            original is not measurably better than the base on these rows.
        increase: loss of the compressed minus the original's, on the same resamples, nats a prediction
            (or squared error).
    """

    rows: int
    predictions: int
    metrics: Mapping[str, Mapping[str, Interval]]
    divergence: Interval | None = None
    agreement: Interval | None = None
    retained: Interval | None = None
    increase: Interval | None = None


@dataclass(frozen=True)
class GateOutcome:
    """A limit that was asked for, and whether the result keeps to it.

    Attributes:
        gate: the option's name, ``min-retained``.
        limit: as a number, 0.99 for 99%.
        figure: the measured one; sizes are exact. None where it is not defined.
        bound: the end of the interval that decided.
        met: whether the bound keeps to the limit.
    """

    gate: str
    limit: float
    figure: Interval | None
    bound: float | None
    met: bool


@dataclass(frozen=True)
class TypeRow:
    """One module type before and after."""

    type: str
    modules: int
    kept: int
    shared: int
    dropped: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Report:
    """The record of one compression; `report.json`.

    Attributes:
        version: of this format.
        lorapack: the version that wrote it.
        base_model, task: of the adapter.
        adapter: name and digest of the original, digest of the result.
        before, after: sizes.
        types: sizes by module type.
        plan: what was decided, and why.
        settings: the options that were in force.
        versions: of the libraries.
        run: what differs from run to run: time stamp, seconds and peak memory a step.
        data: sources, columns, parts; with fingerprints of the rows that were used. None without data.
        recovery: settings and the curve, or None.
        quality: on the evaluation rows, or None.
        gates: the limits that were asked for, and their outcome.
    """

    version: int
    lorapack: str
    base_model: str
    task: str
    adapter: Mapping[str, str]
    before: Size
    after: Size
    types: tuple[TypeRow, ...]
    plan: Plan
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    run: Mapping[str, Any]
    data: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    quality: Quality | None = None
    gates: tuple[GateOutcome, ...] = ()

    def used_rows(self) -> set[str]:
        """Fingerprints of the rows that were used to compress, and may not be evaluated on."""
        parts = (self.data or {}).get("parts", {})
        return {f for name, part in parts.items() if name != "evaluation" for f in part["fingerprints"]}


def type_rows(before: Adapter, after: Adapter) -> tuple[TypeRow, ...]:
    """Sizes by module type; a shared pair counts once, for the type it belongs to."""
    short = short_types(before.linear)
    groups = after.groups
    rows = []
    for kind, name in short.items():
        modules = [m for m in before.linear if module_type(m) == kind]
        left = [m for m in modules if m in after.modules]
        pairs = {after.modules[m].factors for m in left}
        rows.append(
            TypeRow(
                type=name,
                modules=len(modules),
                kept=sum(after.modules[m].factors not in groups for m in left),
                shared=sum(after.modules[m].factors in groups for m in left),
                dropped=len(modules) - len(left),
                parameters_before=sum(before.pool[p].parameters for p in {before.modules[m].factors for m in modules})
                + _own(before, modules),
                parameters_after=sum(after.pool[p].parameters for p in pairs) + _own(after, left),
            )
        )
    return tuple(rows)


def _own(adapter: Adapter, modules: list[str]) -> int:
    """The numbers that modules have for themselves beside shared factors."""
    return sum(t.numel() for m in modules for t in adapter.modules[m].own)


def to_json(report: Report) -> str:
    return json.dumps(_finite(asdict(report)), indent=1) + "\n"


def from_json(text: str, where: str = "report.json") -> Report:
    """Parse `report.json`.

    Raises:
        InputError: names the field that is missing, unknown or of the wrong type.
    """
    from lorapack.core.checked import parse

    report = parse(Report, text, where)
    if report.version != VERSION:
        raise InputError(f"{where}: version {report.version}; this lorapack reads version {VERSION}")
    parts = (report.data or {}).get("parts", {})
    if not isinstance(parts, Mapping):
        raise InputError(f"{where}: data.parts: an object is wanted")
    for name, part in parts.items():
        used = part.get("fingerprints") if isinstance(part, Mapping) else None
        if not isinstance(used, list) or not all(isinstance(row, str) for row in used):
            raise InputError(f"{where}: data.parts.{name}.fingerprints: a list of strings is wanted")
    return report


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a figure is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
