"""`lorapack sweep`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@options.DATA
@click.option("--eval-data", metavar="FILE", help="Rows to evaluate on; otherwise cut off the data.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("adaptive", "lora-drop"),
    show_default=True,
    metavar="NAME[:OPT=VALUE,…]",
    help="A method with its options; can be given again.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=("50%", "25%", "12.5%", "6%"),
    show_default=True,
    metavar="N|P%|KB",
    help="Parameters or bytes allowed; can be given again.",
)
@options.STORE
@click.option("--recover-steps", type=int, default=0, show_default=True, help="Steps of recovery after each.")
@options.BATCH_SIZE
@click.option("--plot", metavar="FILE", help="Draw size against quality (.png, .svg, .pdf).")
@options.SAMPLE
@options.AVERAGE
@options.SEED
@options.MODEL
@options.REVISION
@options.JSON
def sweep(adapter: str, data: str, plot: str | None, revision: str | None, as_json: bool, **settings: Any) -> None:
    """Size against quality: try methods at budgets, and write nothing of it.

    \b
    Example:
      lorapack sweep my-adapter --data calibration.jsonl --method rank --method rank:metric=weight
    """
    import json

    from lorapack.cli.progress import watch
    from lorapack.cli.show import console, table
    from lorapack.hub import read_adapter
    from lorapack.sweep import sweep_adapter, to_json
    from lorapack.write.card import shown

    if plot:
        from lorapack.cli.plot import check_plot

        check_plot(plot)
    points = sweep_adapter(read_adapter(adapter, revision), data, watch=watch, **settings)
    if plot:
        from lorapack.cli.plot import draw_sweep

        draw_sweep(points, plot)
    if as_json:
        say(json.dumps(to_json(points), indent=1))
        return
    rows = table("Size against quality, held-out rows", "method", "budget", "parameters", "left", "gain retained", "KL")
    for point in points:
        if point.quality is None:
            rows.add_row(point.method, point.budget, "–", "–", "too small for it", "–")
            continue
        retained = shown(point.quality.retained, percent=True)
        numbers = (f"{point.parameters:,}", f"{point.share:.1%}", retained, shown(point.quality.divergence))
        rows.add_row(point.method, point.budget, *numbers)
    console().print(rows)
