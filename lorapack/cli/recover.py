"""`lorapack recover`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@click.option("--teacher", metavar="DIR", help="The adapter it was made from, whose predictions it is to keep.")
@options.DATA
@options.OUT
@click.option("--eval-data", metavar="FILE", help="Rows to evaluate on; otherwise cut off the data.")
@click.option("--steps", type=int, default=100, show_default=True, help="At most so many.")
@options.RECOVERY
@options.SAMPLE
@options.SEED
@options.MODEL
@options.REVISION
@options.PLAN_MEMORY
@options.JSON
def recover(
    adapter: str,
    teacher: str | None,
    data: str,
    out: str,
    overwrite: bool,
    revision: str | None,
    plan_memory: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train ADAPTER briefly towards the adapter it was made from, and evaluate it.

    On the selection rows it never gets worse: the best state, the start included, is written. Ctrl-C
    stops the training and keeps the best so far; a second one aborts.

    \b
    Examples:
      lorapack recover smaller --teacher my-adapter --data more.jsonl -o better
      lorapack recover my-adapter --rank-dropout 0.5 --data more.jsonl -o to-be-cut
    """
    from dataclasses import fields, replace
    from pathlib import Path

    from lorapack.cli.files import read_report, result
    from lorapack.cli.progress import watch
    from lorapack.cli.stop import on_signal
    from lorapack.hub import adapter_name, find_adapter, read_adapter
    from lorapack.processes import others_leave
    from lorapack.read.files import REPORT
    from lorapack.recover import Settings
    from lorapack.recovery import recover_adapter
    from lorapack.write import put_adapter

    original = read_adapter(teacher) if teacher else None
    place = find_adapter(adapter, revision)
    source, earlier = read_adapter(place), read_report(place)
    if plan_memory:
        from lorapack.cli.footprint import tell_memory

        tell_memory(original or source, settings | {"recover_steps": settings["steps"]}, "recover", as_json)
        return
    how = Settings(**{f.name: settings.pop(f.name) for f in fields(Settings) if f.name in settings})
    inputs = (adapter, teacher, data, settings["base"], source.base_model, settings["eval_data"])
    with result(out, overwrite, *inputs) as directory:
        made = recover_adapter(
            source,
            data,
            teacher=original,
            settings=how,
            used=earlier.used_rows() if earlier else (),
            name=adapter_name(adapter),
            watch=watch,
            stop=on_signal,
            **settings,
        )
        others_leave()
        run = {**made.report.run, "command": options.spelled(click.get_current_context())}
        report = replace(made.report, run=run)
        put_adapter(made.adapter, directory, report=report)
    if as_json:
        say(Path(out, REPORT).read_text(), nl=False)
        return
    from lorapack.cli.show import print_report

    print_report(report)
    say(f"Wrote {out}")
