"""`lorapack verify`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@options.PLACE
@click.option("--data", metavar="FILE", help=f"{options.ROWS} Without it, inputs are drawn.")
@options.COLUMNS
@click.option(
    "--tolerance",
    type=float,
    metavar="X",
    help="Greatest difference allowed, in standard deviations of A's outputs.  [default: by the weights' type]",
)
@options.SEED
@options.JSON
def verify(a: str, b: str, as_json: bool, **settings: Any) -> None:
    """Say whether A and B give the same outputs; exit code 3 if not.

    Each is an adapter (plain, expanded or compact; on its base) or a model directory, for example an
    adapter and what `lorapack merge` made of it.
    """
    import json
    from dataclasses import asdict

    from lorapack.hub import find_adapter
    from lorapack.verify import demand_same
    from lorapack.verify import verify as run

    found = run(find_adapter(a), find_adapter(b), **settings)
    if as_json:
        say(json.dumps({"same": found.same, **asdict(found)}, indent=1))
    else:
        from lorapack.cli.show import print_verification

        print_verification(found)
    demand_same(found)
