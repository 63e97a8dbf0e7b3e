"""`lorapack merge`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@options.OUT
@options.BASE
@click.option(
    "--weights",
    callback=options.parse_weights,
    metavar="X,…",
    help="A factor for each adapter: the sum of their updates so weighed is merged.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the result's weights; auto: each as in the base.",
)
@options.VERIFY
@options.REVISION
def merge(adapters: tuple[str, ...], out: str, **settings: Any) -> None:
    """Merge ADAPTER, or several, into the base model, from file to file.

    No model is loaded: the memory needed does not grow with the base.
    """
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tensors are worked on side by side instead
    from lorapack.merge.merge import merge_adapter

    done = merge_adapter(adapters, out, **settings)
    say(f"Wrote {out}: {done.changed:,} of {done.tensors:,} tensors changed")
