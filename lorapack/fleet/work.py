"""What a worker does with the adapters it is given, on a base that stays in memory; the same wherever it runs."""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorapack.compress import compress_adapter
from lorapack.core.adapter import Adapter, digest
from lorapack.core.report import from_json
from lorapack.core.statistics import Statistics
from lorapack.data.prepare import Prepared, prepare
from lorapack.errors import InputError, OutputError
from lorapack.fleet.task import Chunk, Order, Outcome, Task
from lorapack.hub import read_adapter
from lorapack.job import chosen_method
from lorapack.measure.measure import measure_rows_on_base
from lorapack.model.exchange import exchange, layout
from lorapack.model.load import Loaded, check_fits, load
from lorapack.read.files import REPORT, file_digests, read_text
from lorapack.recover import rows_a_step
from lorapack.write import new_directory, put_adapter
from lorapack.write.directory import sweep

Measured = Callable[[], Mapping[str, Statistics]]  # by the name of the task; computed when first asked for
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


def work(bench: Bench, chunk: Chunk) -> list[Outcome]:
    """Compress adapters of one group, each into its own directory, which appears whole or not at all.

    What is finished already is left as it is. Whatever goes wrong with an adapter is its own outcome alone.
    """
    measured = functools.cache(lambda: _measured(bench, chunk))
    return [_work(bench, task, measured) for task in chunk]


def _work(bench: Bench, task: Task, measured: Measured) -> Outcome:
    try:
        return Outcome(task.name, skipped=not _made(bench, task, measured))
    except InputError as error:
        return Outcome(task.name, str(error))
    except Exception as error:
        bench.ready = None  # in which state it is nobody knows
        first = (str(error).splitlines() or [""])[0]
        return Outcome(task.name, f"a fault in lorapack: {type(error).__name__}: {first}")


def _made(bench: Bench, task: Task, measured: Measured) -> bool:
    """Whether there was anything to do."""
    order, adapter = bench.order, read_adapter(task.source)
    out, original = Path(order.out, task.name), digest(adapter)
    sweep(out)
    if _finished(out, original, bench.asked):
        return False
    if out.exists() and not order.overwrite:
        raise OutputError(
            f"{out} holds something else than this adapter with these settings; "
            "choose another output or pass --overwrite"
        )
    try:
        with new_directory(out, overwrite=order.overwrite, inputs=(task.source,)) as directory:
            _compress(bench, task, adapter, measured, directory)
    except OutputError:
        if _finished(out, original, bench.asked):  # by a worker that was given up for lost
            return False
        raise
    return True


def _compress(bench: Bench, task: Task, adapter: Adapter, measured: Measured, directory: Path) -> None:
    order = bench.order
    statistics = measured().get(task.name)
    loaded, prepared = _ready(bench, adapter) if order.data else (None, None)
    made = compress_adapter(
        adapter,
        str(order.data) if order.data else None,
        name=task.name,
        statistics=statistics,
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


def _measured(bench: Bench, chunk: Chunk) -> dict[str, Statistics]:
    """The statistics of the adapters of a chunk in one pass of the base alone, if that was asked for.

    It measures all of them, finished or not: so the sums do not depend on how often it was begun. An adapter
    that carries tensors, or does not fit, is left out, to be measured or refused by itself.
    """
    order, settings = bench.order, bench.order.settings
    method, options = chosen_method(settings["method"], settings["options"])
    need = method.needs(options)
    if order.at_once == 1 or order.data is None or need == "nothing":
        return {}
    adapters: dict[str, Adapter] = {}
    for task in chunk:
        with contextlib.suppress(InputError):
            adapter = read_adapter(task.source)
            if not adapter.carried and layout(adapter) is not None:
                if not adapters:
                    _ready(bench, adapter)
                assert bench.ready is not None
                check_fits(adapter, bench.ready[0].base, task.source)
                adapters[task.name] = adapter
    if not adapters or bench.ready is None:
        return {}
    how = {name: settings[name] for name in ("average", "batch_tokens")}
    return measure_rows_on_base(bench.ready[0], adapters, bench.ready[1], need, **how)


def _ready(bench: Bench, adapter: Adapter) -> tuple[Loaded, Prepared]:
    """The base with this adapter on it, and the rows: those of the adapter before, where they fit this one too."""
    settings = bench.order.settings
    base = settings["base"]
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
        most_recovery=settings["recover_steps"] * rows_a_step(settings["batch_size"], loaded.task),
    )
    bench.layout, bench.ready = wanted, (loaded, prepared)
    return loaded, prepared
