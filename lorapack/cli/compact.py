"""`lorapack compact`."""

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@options.OUT
@options.REVISION
def compact(adapter: str, out: str, overwrite: bool, revision: str | None) -> None:
    """Store equal factors of ADAPTER once: the way back from `lorapack expand`.

    Nothing is changed: ranks and modules that are all zeros are left out, equal pairs become one.
    """
    from lorapack.core.adapter import size
    from lorapack.hub import find_adapter, read_adapter
    from lorapack.pack.equal import share_equal
    from lorapack.write import new_directory, put_adapter

    with new_directory(out, overwrite=overwrite, inputs=(adapter,)) as directory:
        before = read_adapter(find_adapter(adapter, revision))
        after = share_equal(before)
        put_adapter(after, directory)
    old, new = size(before), size(after)
    say(f"Wrote {out}: {new.parameters:,} LoRA parameters of {old.parameters:,}")
