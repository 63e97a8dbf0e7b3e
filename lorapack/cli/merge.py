"""`lorapack merge`."""

from typing import Any

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@options.OUT
@click.option("--base", metavar="MODEL", help="The base model's path or Hub id, if not as the adapter says.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the result's weights; auto: each as in the base.",
)
@options.VERIFY
@options.REVISION
def merge(adapter: str, out: str, **settings: Any) -> None:
    """Merge ADAPTER into its base model, from file to file.

    No model is loaded: the memory needed does not grow with the base.
    """
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tensors are worked on side by side instead
    from lorapack.merge.merge import merge_adapter

    done = merge_adapter(adapter, out, **settings)
    click.echo(f"Wrote {out}: {done.changed:,} of {done.tensors:,} tensors changed")
