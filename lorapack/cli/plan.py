"""`lorapack plan`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command(cls=options.MethodCommand)
@options.ADAPTER
@click.option("--statistics", "statistics_file", metavar="FILE", help="What `lorapack measure` wrote.")
@click.option("-o", "--out", default="plan.json", show_default=True, metavar="FILE", help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@options.METHOD
@options.STORE
@options.REVISION
def plan(
    adapter: str,
    statistics_file: str | None,
    out: str,
    overwrite: bool,
    method: str,
    budget: str | None,
    store: Any,
    revision: str | None,
    method_options: dict[str, str],
) -> None:
    """Decide what to keep of ADAPTER, and write it down.

    The file can be edited by hand and given to `lorapack compress --plan`.
    """
    from lorapack.cli.files import read_statistics, write_plan
    from lorapack.cli.show import print_plan
    from lorapack.core.adapter import size
    from lorapack.core.plan import parameters
    from lorapack.hub import read_adapter
    from lorapack.job import plan_adapter
    from lorapack.write.file import refuse_existing

    refuse_existing(out, overwrite, adapter, statistics_file)
    source = read_adapter(adapter, revision)
    statistics = read_statistics(statistics_file) if statistics_file else None
    made = plan_adapter(source, statistics, method, budget=budget, store=store, **method_options)
    write_plan(made, out, overwrite)
    print_plan(made, parameters(made, source), size(source).parameters)
    say(f"Wrote {out}")
