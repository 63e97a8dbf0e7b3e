"""lorapack's own files, read and written by the commands."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from lorapack.core import plan as plans
from lorapack.core import report as reports
from lorapack.core import statistics as moments
from lorapack.core.checked import parse
from lorapack.core.plan import Plan
from lorapack.core.report import Report
from lorapack.core.statistics import Statistics
from lorapack.errors import OutputError
from lorapack.read.adapter import REPORT
from lorapack.read.files import read_safetensors, read_text
from lorapack.sweep import Point
from lorapack.write.directory import refuse_overlap


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
    _write(path, overwrite, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def write_plan(plan: Plan, path: str, overwrite: bool) -> None:
    _write(path, overwrite, lambda temporary: Path(temporary).write_text(plans.to_json(plan)))


def write_text(text: str, path: str) -> None:
    """A file that says how a run went, in place of that of an earlier run."""
    _write(path, True, lambda temporary: Path(temporary).write_text(text))


def refuse_existing(path: str, overwrite: bool, *inputs: str | None) -> None:
    refuse_overlap(path, *(given for given in inputs if given))
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another output or pass --overwrite")


def _write(path: str, overwrite: bool, write: Callable[[str], object]) -> None:
    """Whole or not at all: written beside it, flushed, renamed."""
    refuse_existing(path, overwrite)
    target = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}") from None
    try:
        write(temporary)
        os.fsync(descriptor)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except (OSError, SafetensorError) as error:  # the library wraps the operating system's error in text
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path} cannot be written: {reason}") from None
    finally:
        os.close(descriptor)
        Path(temporary).unlink(missing_ok=True)
