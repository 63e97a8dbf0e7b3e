"""`lorapack fleet`: the adapters in, the executor given, the summary out."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lorapack
from lorapack.data.rows import read_source
from lorapack.errors import InputError, OutputError
from lorapack.fleet.summary import VERSION, Summary, row, to_json
from lorapack.fleet.task import PAGE, SUMMARY, Order, Outcome, Task, grouped
from lorapack.job import chosen_method
from lorapack.report.render import fleet_markdown
from lorapack.ship.gates import Gates
from lorapack.watch import Watch, unwatched
from lorapack.write.directory import refuse_overlap
from lorapack.write.file import write_text

Executor = Callable[[Order, Sequence[Task]], Iterator[Outcome]]


def compress_fleet(
    tasks: Sequence[Task],
    out: str,
    execute: Executor,
    *,
    data: str | None,
    eval_data: str | None = None,
    gates: Gates = Gates(),  # noqa: B008
    overwrite: bool = False,
    at_once: int = 1,
    command: Sequence[str] = (),
    watch: Watch = unwatched,
    **settings: Any,
) -> Summary:
    """Compress many adapters, each into ``out/NAME``, and write what came of it beside them.

    An adapter that cannot be compressed is a row of the summary and stops no other. One that was finished before,
    with the same tensors and settings, is left as it is.

    Args:
        tasks: of `lorapack.fleet.task.named`.
        out: a directory, which may be there.
        execute: `run_local` or `run_ray` with their own options filled in.
        data, eval_data: see `lorapack.compress_adapter`; read once, here.
        gates: limits that every result must keep to.
        overwrite: replace results of other adapters or of other settings.
        at_once: measure so many adapters in one pass of the base alone, see `measure_moments_on_base`.
        command: for the record.
        watch: sees the outcomes go by.
        settings: of `lorapack.compress_adapter`.

    Raises:
        InputError: what is wrong for all of them: the method, the data, the output.
    """
    if data is None and (eval_data is not None or settings.get("retain") is not None):
        raise InputError("--eval-data and --retain need --data")
    method, chosen = chosen_method(settings["method"], settings["options"])
    if at_once > 1 and (need := method.needs(chosen)) in ("gradients", "omega"):
        raise InputError(
            f"--measure-at-once: {settings['method']} wants {need}, which are learnt of one adapter at a time"
        )
    refuse_overlap(out, *(path for path in (data, eval_data, settings["base"]) if path))
    rows, held_out = (read_source(source) if source else None for source in (data, eval_data))
    order = Order(str(Path.cwd()), out, settings, rows, held_out, overwrite, at_once)
    place = _opened(out)
    start = time.perf_counter()
    good, failed = grouped(tasks, settings["base"])
    outcomes = {outcome.name: outcome for outcome in failed}
    for outcome in watch("fleet", execute(order, good), len(good)):
        outcomes[outcome.name] = outcome
    made = [row(task, outcomes[task.name], place, gates) for task in tasks]
    run = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 3),
        "seconds_each": {found.name: round(seconds, 3) for found, seconds in made if found.state != "failed"},
        "finished_before": [task.name for task in tasks if outcomes[task.name].skipped],
        "retries": {task.name: outcomes[task.name].retries for task in tasks if outcomes[task.name].retries},
        "command": list(command),
    }
    summary = Summary(VERSION, lorapack.__version__, order.asked(), tuple(found for found, _ in made), run)
    for name, text in ((SUMMARY, to_json(summary)), (PAGE, fleet_markdown(summary))):
        write_text(text, place / name, overwrite=True)  # in place of an earlier run's
    return summary


def _opened(out: str) -> Path:
    """The directory of a fleet, made where it is not there.

    Raises:
        OutputError: it cannot be made, or holds other files of the summary's names.
    """
    place = Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        there = [place / name for name in (SUMMARY, PAGE) if (place / name).exists()]
        if there and '"lorapack"' not in _head(there[0]):
            raise OutputError(f"{there[0]} is not of a fleet; choose another output")
    except OSError as error:
        raise OutputError(f"{out} cannot be used: {error.strerror}") from None
    return place


def _head(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(100).decode(errors="replace")
