"""`lorapack compress`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command(cls=options.MethodCommand)
@options.ADAPTER
@options.CALIBRATION
@options.COLUMNS
@options.OUT
@options.EVALUATION
@options.METHOD
@options.RETAIN
@click.option("--plan", "plan_file", metavar="FILE", help="Carry out this plan instead of making one.")
@click.option("--statistics", "statistics_file", metavar="FILE", help="Use what `lorapack measure` wrote.")
@options.SHARE_INIT
@options.STORE
@options.RECOVER_STEPS
@options.RECOVERY
@options.SAMPLE
@options.AVERAGE
@options.SEED
@options.MODEL
@options.GATES
@options.REVISION
@options.PLAN_MEMORY
@options.JSON
def compress(
    adapter: str,
    data: str | None,
    out: str,
    overwrite: bool,
    plan_file: str | None,
    statistics_file: str | None,
    revision: str | None,
    plan_memory: bool,
    as_json: bool,
    method_options: dict[str, str],
    **settings: Any,
) -> None:
    """Make ADAPTER smaller: measure, plan, pack, recover, evaluate, write.

    ADAPTER is a PEFT directory or a Hub id. OUT loads with PeftModel.from_pretrained after
    `import lorapack`, and `lorapack expand` makes a plain PEFT adapter of it.

    A gate that is not met ends it with exit code 3; OUT is written all the same, to be looked at.

    \b
    Examples:
      lorapack compress my-adapter --data calibration.jsonl -o smaller
      lorapack compress my-adapter --data calibration.jsonl -o smaller --min-retained 99%
    """
    from dataclasses import replace
    from pathlib import Path

    from lorapack.cli.files import read_plan, read_statistics, result
    from lorapack.cli.gates import settle, take_gates
    from lorapack.cli.progress import watch
    from lorapack.cli.stop import on_signal
    from lorapack.compress import compress_adapter
    from lorapack.hub import adapter_name, find_adapter, read_adapter
    from lorapack.processes import others_leave
    from lorapack.read.files import REPORT
    from lorapack.ship.gates import judge
    from lorapack.write import put_adapter

    gates, junit = take_gates(settings, quality=data is not None, without="--data")
    source = read_adapter(find_adapter(adapter, revision))
    if plan_memory:
        from lorapack.cli.footprint import tell_memory

        tell_memory(source, settings, "compress", as_json)
        return
    given = (adapter, data, settings["base"], source.base_model, settings["eval_data"], plan_file, statistics_file)
    with result(out, overwrite, *given) as directory:
        made = compress_adapter(
            source,
            data,
            name=adapter_name(adapter),
            plan=read_plan(plan_file) if plan_file else None,
            statistics=read_statistics(statistics_file) if statistics_file else None,
            options=method_options,
            watch=watch,
            stop=on_signal,
            **settings,
        )
        others_leave()
        told = judge(gates, made.report.after, made.report.quality)
        run = {**made.report.run, "command": options.spelled(click.get_current_context())}
        report = replace(made.report, gates=told, run=run)
        put_adapter(made.adapter, directory, report=report)
    if as_json:
        say(Path(out, REPORT).read_text(), nl=False)
    else:
        from lorapack.cli.show import print_report

        print_report(report)
        say(f"Wrote {out}")
    settle(report.gates, junit, "lorapack compress", tell=not as_json, written=out)
