"""`lorapack extract`."""

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@click.argument("full", metavar="FULL")
@click.argument("base", metavar="BASE")
@options.OUT
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="The rank of all layers, or")
@click.option(
    "--error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="E",
    help="the relative error that each layer may have; 0.01 for one percent.",
)
def extract(full: str, base: str, out: str, overwrite: bool, rank: int | None, error: float | None) -> None:
    """Make an adapter of the difference between the model FULL and the BASE it was made from.

    FULL is a full fine-tune or a merged model. One weight at a time is in memory. What is not of low rank
    (embeddings, norms, biases, new heads) is stored whole, if it changed.
    """
    from lorapack.cli.show import console, table
    from lorapack.core.names import module_type, short_types
    from lorapack.extract.extract import extract_adapter

    done = extract_adapter(full, base, out, rank=rank, error=error, overwrite=overwrite)
    rows = table("Layers that changed", "type", "layers", "ranks", "largest error")
    for kind, name in short_types([layer.module for layer in done.layers]).items():
        members = [layer for layer in done.layers if module_type(layer.module) == kind]
        ranks = sorted({layer.rank for layer in members})
        shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        rows.add_row(name, str(len(members)), shown, f"{max(layer.error for layer in members):.2%}")
    console().print(rows)
    for module in done.saved:
        say(f"Saved whole: {module}")
    if done.biases:
        say(f"Saved: {done.biases:,} biases")
    say(f"Wrote {out}: {len(done.layers):,} layers; {done.unchanged:,} tensors are the base's")
