"""One adapter of a fleet on a base that stays in memory; the same wherever it runs."""

import contextlib
import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorapack.compress import compress_adapter
from lorapack.core.adapter import Adapter, digest
from lorapack.core.report import from_json
from lorapack.data.prepare import Prepared, prepare
from lorapack.errors import InputError, OutputError
from lorapack.fleet.task import Order, Outcome, Task
from lorapack.hub import read_adapter
from lorapack.model.exchange import exchange, layout
from lorapack.model.load import Loaded, load
from lorapack.read.files import REPORT, file_digests, read_text
from lorapack.write import new_directory, put_adapter

ASKED = "fleet"  # in a report's settings: what the fleet was asked for


@dataclass
class Bench:
    """What stays from one adapter to the next: the base in memory and the rows as its tokens.

    Attributes:
        order: what to do.
        asked: its `Order.asked`.
        layout: of the adapters that can be exchanged for the one that was loaded last.
        ready: base and rows; None before the first adapter.
    """

    order: Order
    asked: dict[str, Any]
    layout: Hashable | None = None
    ready: tuple[Loaded, Prepared] | None = None


def bench(order: Order) -> Bench:
    """An empty one, in the directory that the order's paths relate to."""
    with contextlib.suppress(OSError):  # what is not there is told of each adapter
        os.chdir(order.here)
    return Bench(order, order.asked())


def work(bench: Bench, task: Task) -> Outcome:
    """Compress one adapter into its own directory, which appears whole or not at all, unless that is done already.

    Whatever goes wrong is the outcome of this adapter alone.
    """
    try:
        return Outcome(task.name, skipped=not _made(bench, task))
    except InputError as error:
        return Outcome(task.name, str(error).replace("\n", " "))
    except Exception as error:
        bench.ready = None  # in which state it is nobody knows
        first = (str(error).splitlines() or [""])[0]
        return Outcome(task.name, f"a fault in lorapack: {type(error).__name__}: {first}")


def _made(bench: Bench, task: Task) -> bool:
    """Whether there was anything to do."""
    order, adapter = bench.order, read_adapter(task.source)
    out, original = Path(order.out, task.name), digest(adapter)
    if _finished(out, original, bench.asked):
        return False
    if out.exists() and not order.overwrite:
        raise OutputError(
            f"{out} holds something else than this adapter with these settings; "
            "choose another output or pass --overwrite"
        )
    try:
        with new_directory(out, overwrite=order.overwrite, inputs=(task.source,)) as directory:
            _compress(bench, task, adapter, directory)
    except OutputError:
        if _finished(out, original, bench.asked):  # by a worker that was given up for lost
            return False
        raise
    return True


def _compress(bench: Bench, task: Task, adapter: Adapter, directory: Path) -> None:
    order = bench.order
    loaded, prepared = _ready(bench, adapter) if order.data else (None, None)
    made = compress_adapter(
        adapter,
        str(order.data) if order.data else None,
        name=task.name,
        loaded=loaded,
        prepared=prepared,
        **order.settings,
    )
    report = replace(made.report, settings={**made.report.settings, ASKED: bench.asked})
    put_adapter(made.adapter, directory, report=report)


def _finished(out: Path, original: str, asked: dict[str, Any]) -> bool:
    """Whether this adapter lies there, compressed with these settings, as it was written."""
    try:
        report = from_json(read_text(out / REPORT), str(out / REPORT))
    except InputError:
        return False
    same = report.adapter.get("original") == original and report.settings.get(ASKED) == asked
    return same and report.files == file_digests(out)


def _ready(bench: Bench, adapter: Adapter) -> tuple[Loaded, Prepared]:
    """The base with this adapter on it, and the rows: those of the adapter before, where they fit this one too."""
    settings = bench.order.settings
    base = settings.get("base")
    source = base or (adapter.base_model, adapter.config.get("revision"))
    kind = layout(adapter)
    wanted = None if kind is None else (source, kind)
    if bench.ready is not None and wanted is not None and wanted == bench.layout:
        exchange(bench.ready[0], adapter)
        return bench.ready
    bench.ready = None  # its memory is needed for the next
    options = ("device", "dtype", "max_length", "trust_remote_code")
    loaded = load(adapter, base, **{name: settings[name] for name in options})
    prepared = prepare(
        loaded.reader,
        bench.order.data or "",
        eval_data=bench.order.eval_data,
        columns=settings["columns"],
        sample=settings["sample"],
        seed=settings["seed"],
        most_recovery=settings["recover_steps"] * settings["batch_size"],
    )
    bench.layout, bench.ready = wanted, (loaded, prepared)
    return loaded, prepared
