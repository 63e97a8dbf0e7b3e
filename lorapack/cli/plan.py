"""`lorapack plan`."""

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@click.option("--statistics", "statistics_file", required=True, metavar="FILE", help="What `lorapack measure` wrote.")
@click.option("-o", "--out", default="plan.json", show_default=True, metavar="FILE", help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@options.METHOD
@options.REVISION
def plan(
    adapter: str,
    statistics_file: str,
    out: str,
    overwrite: bool,
    method: str,
    threshold: float,
    budget: str | None,
    revision: str | None,
) -> None:
    """Decide what to keep of ADAPTER, and write it down.

    The file can be edited by hand and given to `lorapack compress --plan`.
    """
    from lorapack.cli.files import read_statistics, refuse_existing, write_plan
    from lorapack.cli.show import print_plan
    from lorapack.compress import plan_adapter
    from lorapack.core.adapter import size
    from lorapack.core.plan import parameters
    from lorapack.hub import read_adapter

    refuse_existing(out, overwrite)
    source = read_adapter(adapter, revision)
    made = plan_adapter(source, read_statistics(statistics_file), method, threshold=threshold, budget=budget)
    write_plan(made, out, overwrite)
    print_plan(made, parameters(made, source), size(source).parameters)
    click.echo(f"Wrote {out}")
