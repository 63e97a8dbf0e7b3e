"""`lorapack fleet`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say

SHOWN = 40  # rows on the terminal; of a larger fleet only those that went wrong


@click.command(cls=options.MethodCommand)
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1)
@click.option("--adapters", "listed", metavar="FILE", help="A list: an ADAPTER a line, or NAME<tab>ADAPTER.")
@options.CALIBRATION
@options.COLUMNS
@options.OUT
@options.EVALUATION
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine.")
@click.option("--ray", "address", metavar="ADDRESS", help="Work on a Ray cluster; `local` starts one here.")
@options.METHOD
@options.RETAIN
@options.SHARE_INIT
@options.STORE
@options.RECOVER_STEPS
@options.TRAINING
@options.SAMPLE
@options.AVERAGE
@click.option(
    "--measure-at-once",
    "at_once",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Measure N adapters in one pass of the base without them: faster, an approximation.",
)
@options.SEED
@options.MODEL
@options.LIMITS
@click.option("--junit", metavar="FILE", help="Write what became of each adapter as JUnit XML.")
@options.JSON
def fleet(
    adapters: tuple[str, ...],
    listed: str | None,
    data: str | None,
    out: str,
    workers: int,
    address: str | None,
    as_json: bool,
    method_options: dict[str, str],
    **settings: Any,
) -> None:
    """Compress many adapters, each as `lorapack compress` does, into OUT/NAME.

    A base is loaded once for the adapters that it serves. The same command goes on where an earlier run
    stopped. OUT/fleet.json and OUT/fleet.md say what became of each.

    Exit code 2 if an adapter failed, 3 if one misses a gate; all the others are written.

    \b
    Examples:
      lorapack fleet adapters/* --data calibration.jsonl --budget 25% -o smaller --workers 4
      lorapack fleet --adapters list.txt --data calibration.jsonl -o smaller --ray 10.0.0.1:6379
    """
    from functools import partial
    from pathlib import Path

    from click.core import ParameterSource

    from lorapack.cli.gates import take_gates, write_junit
    from lorapack.cli.progress import watch
    from lorapack.errors import GateError, InputError
    from lorapack.fleet import compress_fleet
    from lorapack.fleet.local import run_local
    from lorapack.fleet.on_ray import run_ray
    from lorapack.fleet.summary import cases
    from lorapack.fleet.task import SUMMARY, named
    from lorapack.read.files import read_text

    context = click.get_current_context()
    if address and context.get_parameter_source("workers") is ParameterSource.COMMANDLINE:
        raise InputError("--workers is for this machine; with --ray the cluster says how many there are")
    gates, junit = take_gates(settings, quality=data is not None, without="--data", tests_without=True)
    tasks = named(adapters, read_text(Path(listed)).splitlines() if listed else ())
    if not tasks:
        raise InputError("no adapter was given; name some, or a list with --adapters")
    summary = compress_fleet(
        tasks,
        out,
        partial(run_ray, address=address) if address else partial(run_local, workers=workers),
        data=data,
        gates=gates,
        command=options.spelled(context),
        options=method_options,
        watch=watch,
        **settings,
    )
    if junit is not None:
        write_junit(cases(summary), junit, "lorapack fleet")
    if as_json:
        say(Path(out, SUMMARY).read_text(encoding="utf-8"), nl=False)
    else:
        from lorapack.cli.show import print_fleet

        print_fleet(summary, SHOWN)
        say(f"Wrote {out}")
    failed, missed = summary.of_state("failed"), summary.of_state("gate missed")
    if failed:
        first = f"{failed[0].name}: {failed[0].problem}"
        raise InputError(f"{len(failed)} of {len(tasks)} adapters failed, the first is {first}")
    if missed:
        raise GateError(f"gate not met: by {len(missed)} of {len(tasks)} adapters, the first is {missed[0].name}")
