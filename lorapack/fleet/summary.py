"""What a fleet came to: `fleet.json`, made of the reports of its adapters, one in memory at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorapack.core.report import GateOutcome, Interval, Report, from_json
from lorapack.errors import InputError
from lorapack.fleet.task import Outcome, Task
from lorapack.read.files import REPORT, read_text
from lorapack.ship.gates import Gates, explained, judge
from lorapack.ship.junit import Case

VERSION = 1
State = Literal["done", "gate missed", "failed"]


@dataclass(frozen=True)
class Row:
    """One adapter.

    Attributes:
        name, source: of the task.
        state: ``done``, ``gate missed`` (it is written all the same) or ``failed``.
        problem: why it failed, in one line.
        base_model: as the adapter names it.
        original, compressed: digests of the tensors.
        parameters_before, parameters_after, bytes_before, bytes_after: of the low-rank factors, see `Size`.
        retained: gain retained on the evaluation rows; None where it is not defined.
        gates: the limits that were asked for, and their outcome.
    """

    name: str
    source: str
    state: State
    problem: str = ""
    base_model: str = ""
    original: str = ""
    compressed: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    retained: Interval | None = None
    gates: tuple[GateOutcome, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The record of a fleet; `fleet.json`.

    Attributes:
        version: of this format.
        lorapack: the version that wrote it.
        settings: what all adapters were compressed with.
        adapters: in the order they were given.
        run: what differs from run to run, and nothing else does: time stamp, seconds (of the whole, and of each
            adapter), what an earlier run had finished, retries, the command.
    """

    version: int
    lorapack: str
    settings: Mapping[str, Any]
    adapters: tuple[Row, ...]
    run: Mapping[str, Any] = field(default_factory=dict)

    def of_state(self, state: State) -> list[Row]:
        return [row for row in self.adapters if row.state == state]


def row(task: Task, outcome: Outcome, out: Path, gates: Gates) -> tuple[Row, float]:
    """An adapter's row, made of the report that was written for it, and the seconds it took."""
    if outcome.problem:
        return Row(task.name, task.source, "failed", outcome.problem), 0.0
    path = out / task.name / REPORT
    try:
        report = from_json(read_text(path), str(path))
    except InputError as error:
        shared = "" if path.exists() else "; a fleet on several machines needs a file system that all of them see"
        return Row(task.name, task.source, "failed", f"{error}{shared}"), 0.0
    return _row(task, report, gates), sum(step["seconds"] for step in report.run["steps"].values())


def _row(task: Task, report: Report, gates: Gates) -> Row:
    told = judge(gates, report.after, report.quality)
    return Row(
        name=task.name,
        source=task.source,
        state="done" if all(outcome.met for outcome in told) else "gate missed",
        base_model=report.base_model,
        original=report.adapter["original"],
        compressed=report.adapter["compressed"],
        parameters_before=report.before.parameters,
        parameters_after=report.after.parameters,
        bytes_before=report.before.bytes,
        bytes_after=report.after.bytes,
        retained=report.quality.retained if report.quality else None,
        gates=told,
    )


def cases(summary: Summary) -> list[Case]:
    """One test an adapter: it fails on a gate, is an error without a result, and skipped if an earlier run made it."""
    before = set(summary.run["finished_before"])
    return [
        _case(found, found.name in before, summary.run["seconds_each"].get(found.name, 0)) for found in summary.adapters
    ]


def _case(found: Row, before: bool, seconds: float) -> Case:
    if found.state == "failed":
        return Case(found.name, found.problem, "error", "failed")
    missed = "; ".join(explained(outcome) for outcome in found.gates if not outcome.met)
    if missed:
        return Case(found.name, missed, "failure", seconds=seconds)
    if before:
        return Case(found.name, "finished by an earlier run", "skipped")
    return Case(found.name, "; ".join(map(explained, found.gates)), seconds=seconds)


def to_json(summary: Summary) -> str:
    """The summary as JSON, an adapter a line: `diff` shows which ones changed."""
    parts = asdict(summary)
    rows, run = parts.pop("adapters"), parts.pop("run")
    head = json.dumps(parts, indent=1)[1:-2]
    return (
        "{" + head + ',\n "adapters": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ],\n"
        ' "run": ' + json.dumps(run) + "\n}\n"
    )


def totals(rows: Sequence[Row]) -> str:
    """One line: how many, and what they weigh together."""
    made = [row for row in rows if row.state != "failed"]
    states = {state: sum(row.state == state for row in rows) for state in ("done", "gate missed", "failed")}
    counts = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
    before, after = sum(row.bytes_before for row in made), sum(row.bytes_after for row in made)
    left = f"; {before:,} LoRA bytes became {after:,} ({after / before:.1%})" if before else ""
    return f"{len(rows):,} adapter{'s' if len(rows) != 1 else ''}: {counts}{left}"
