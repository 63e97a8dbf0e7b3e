"""`lorapack convert`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say
from lorapack.errors import InputError


def parse_switches(_: click.Context, __: click.Parameter, value: str | None) -> list[bool] | None:
    """``true,false,true`` as booleans."""
    if value is None:
        return None
    words = [word.strip().lower() for word in value.split(",")]
    if not set(words) <= {"true", "false"}:
        raise InputError(f"--enable-lora {value!r} is not a list like true,false,true")
    return [word == "true" for word in words]


@click.command()
@click.argument("source", metavar="IN")
@options.OUT
@click.option(
    "--to",
    type=click.Choice(["peft", "kohya", "diffusers", "gguf"]),
    help="The format to write. By default gguf for OUT.gguf, peft otherwise.",
)
@click.option("--base", metavar="MODEL", help="The base model: the names of its layers, or its configuration for GGUF.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the numbers in GGUF.",
)
@click.option("--alpha", type=float, help="The alpha of a loralib file, which does not hold it.")
@click.option(
    "--enable-lora",
    metavar="LIST",
    callback=parse_switches,
    help="Of merged projections in a loralib file: true,false,true.",
)
@options.REVISION
def convert(source: str, out: str, **settings: Any) -> None:
    """Convert the adapter IN, whatever wrote it, to PEFT, or to what another tool reads.

    IN is recognised: PEFT, lorapack's compact format, MLX (directories), kohya, diffusers, loralib, cloneofsimo
    (single files). An adapter for a pipeline of several models is a directory with unet, transformer, text_encoder …
    in it.
    """
    from lorapack.conversion import convert_adapter

    done = convert_adapter(source, out, **settings)
    counts = ", ".join(f"{count:,} modules{f' of the {name}' if name else ''}" for name, count in done.modules.items())
    say(f"Wrote {out}: {done.source} to {done.target}, {counts}")
    for note in done.notes:
        say(f"Note: {note}")
