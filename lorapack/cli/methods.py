"""`lorapack methods`."""

import click


@click.command()
def methods() -> None:
    """List the methods of `--method`, with their options and what they measure."""
    from lorapack.cli.show import console, table
    from lorapack.plan import METHODS
    from lorapack.plan.method import flag

    rows = table("Methods", "name", "what", "options", "measures", left=4)
    measures = {
        "nothing": "nothing",
        "forward": "a forward pass",
        "backward": "a backward pass",
        "gradients": "two backward passes",
        "omega": "a backward pass, and learns",
    }
    for name, method in METHODS.items():
        options = "\n".join(
            " ".join((flag(o), "|".join(option.choices) or option.kind.__name__, f"({option.default})"))
            for o, option in method.options.items()
        )
        rows.add_row(name, method.summary, options, measures[method.needs({})])
    console().print(rows)
