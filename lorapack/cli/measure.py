"""`lorapack measure`."""

from typing import Any

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@options.DATA
@click.option(
    "-o", "--out", default="statistics.safetensors", show_default=True, metavar="FILE", help="Where to write."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--loss", is_flag=True, help="Also measure how much the loss cares (a backward pass).")
@options.SAMPLE
@options.AVERAGE
@options.SEED
@options.MODEL
@options.REVISION
def measure(adapter: str, data: str, out: str, overwrite: bool, revision: str | None, **settings: Any) -> None:
    """Measure the low-rank outputs of ADAPTER on the calibration part of some data.

    What is written can be given to `lorapack plan` and `lorapack compress --statistics`.
    """
    from lorapack.cli.files import refuse_existing, write_statistics
    from lorapack.cli.progress import watch
    from lorapack.cli.show import console, table
    from lorapack.core.statistics import output_norms
    from lorapack.hub import read_adapter
    from lorapack.measure import measure_adapter

    refuse_existing(out, overwrite, adapter, data, settings["base"])
    source = read_adapter(adapter, revision)
    statistics = measure_adapter(source, data, watch=watch, **settings)
    write_statistics(statistics, out, overwrite)
    norms = table("Output norms", "module", "E||s B A x||²")
    for module, norm in output_norms(source, statistics).items():
        norms.add_row(module, f"{norm:.6g}")
    console().print(norms)
    click.echo(f"Measured {statistics.tokens:,} tokens of {statistics.samples:,} rows. Wrote {out}")
