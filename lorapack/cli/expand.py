"""`lorapack expand`."""

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@options.OUT
@click.option("--as-vera", is_flag=True, help="As PEFT's VeRA instead: what the method vera made.")
@options.REVISION
def expand(adapter: str, out: str, overwrite: bool, as_vera: bool, revision: str | None) -> None:
    """Write ADAPTER as plain PEFT LoRA, shared factors repeated for every module."""
    from lorapack.hub import find_adapter, read_adapter
    from lorapack.write import new_directory, put_adapter
    from lorapack.write.vera import put_vera

    with new_directory(out, overwrite=overwrite, inputs=(adapter,)) as directory:
        source = read_adapter(find_adapter(adapter, revision))
        if as_vera:
            put_vera(source, directory)
        else:
            put_adapter(source, directory, expand=True)
    click.echo(f"Wrote {out}")
