"""`lorapack expand`."""

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@options.OUT
@options.REVISION
def expand(adapter: str, out: str, overwrite: bool, revision: str | None) -> None:
    """Write ADAPTER as plain PEFT LoRA, shared factors repeated for every module."""
    from lorapack.hub import find_adapter, read_adapter
    from lorapack.write import new_directory, put_adapter

    with new_directory(out, overwrite=overwrite, inputs=(adapter,)) as directory:
        put_adapter(read_adapter(find_adapter(adapter, revision)), directory, expand=True)
    click.echo(f"Wrote {out}")
