"""`lorapack methods`."""

import click


@click.command()
def methods() -> None:
    """List the methods of `--method`, with their options and what they measure."""
    from lorapack.cli.show import console, table
    from lorapack.plan import METHODS

    rows = table("Methods", "name", "what", "options", "measures", left=4)
    for name, method in METHODS.items():
        options = " ".join(f"--{o.replace('_', '-')} {default}" for o, default in method.options.items())
        measures = {"weight": "nothing", "output": "a forward pass", "loss": "a backward pass"}[method.needs({})]
        rows.add_row(name, method.summary, options, measures)
    console().print(rows)
