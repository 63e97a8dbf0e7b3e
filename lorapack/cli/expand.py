"""`lorapack expand`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say
from lorapack.engines import NAMES
from lorapack.errors import InputError


@click.command()
@options.ADAPTER
@options.OUT
@click.option(
    "--for",
    "engine",
    type=click.Choice(NAMES),
    default="peft",
    show_default=True,
    help="The engine that will read it.",
)
@options.BASE
@click.option("--as-vera", is_flag=True, help="As PEFT's VeRA instead: what the method vera made.")
@options.VERIFY
@options.REVISION
def expand(adapter: str, out: str, engine: str, as_vera: bool, revision: str | None, **settings: Any) -> None:
    """Write ADAPTER as plain PEFT LoRA, as an engine computes it.

    Shared factors are repeated for every module. What the engine cannot compute is said before anything is written.
    """
    from lorapack.hub import find_adapter, read_adapter

    source = find_adapter(adapter, revision)
    if as_vera:
        if engine != "peft" or settings["verify"]:
            raise InputError("--as-vera goes without --for and --verify")
        from lorapack.write import new_directory
        from lorapack.write.vera import put_vera

        with new_directory(out, overwrite=settings["overwrite"], inputs=(adapter,)) as directory:
            put_vera(read_adapter(source), directory)
        say(f"Wrote {out}")
        return
    from lorapack.engines import rules
    from lorapack.expand import expand_adapter

    written = expand_adapter(read_adapter(source), out, engine, source=source, **settings)
    found = rules(engine)
    say(f"Wrote {out} for {found.title} {found.version}\nLoad it with: {found.serve(written, out)}")
