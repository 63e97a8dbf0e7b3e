"""lorapack's own files, read and written by the commands."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from safetensors.torch import save_file

from lorapack.core import plan as plans
from lorapack.core import report as reports
from lorapack.core import statistics as moments
from lorapack.core.checked import parse
from lorapack.core.plan import Plan
from lorapack.core.report import Report
from lorapack.core.statistics import Statistics
from lorapack.processes import first
from lorapack.read.adapter import REPORT
from lorapack.read.files import read_safetensors, read_text
from lorapack.sweep import Point
from lorapack.write import new_directory
from lorapack.write.file import new_file, write_text


def read_plan(path: str) -> Plan:
    return plans.from_json(read_text(Path(path)))


def read_statistics(path: str) -> Statistics:
    return moments.from_tensors(*read_safetensors(Path(path)))


def read_report(directory: Path) -> Report | None:
    """The report beside an adapter, where there is one."""
    path = directory / REPORT
    return reports.from_json(read_text(path), str(path)) if path.exists() else None


def read_points(path: str) -> tuple[Point, ...]:
    """What `lorapack sweep --json` printed."""
    return parse(tuple[Point, ...], read_text(Path(path)), path)


def write_statistics(statistics: Statistics, path: str, overwrite: bool) -> None:
    tensors, metadata = moments.to_tensors(statistics)
    with new_file(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def write_plan(plan: Plan, path: str, overwrite: bool) -> None:
    write_text(plans.to_json(plan), path, overwrite=overwrite)


def result(out: str, overwrite: bool, *inputs: str | None) -> AbstractContextManager[Path]:
    """The new directory of a result; nothing in a process that leaves writing to the first."""
    if not first():
        return nullcontext(Path())
    return new_directory(out, overwrite=overwrite, inputs=tuple(path for path in inputs if path))
