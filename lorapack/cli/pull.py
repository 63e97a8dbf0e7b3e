"""`lorapack pull`."""

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@click.argument("repo", metavar="REPO_ID")
@options.OUT
@options.REVISION
def pull(repo: str, out: str, overwrite: bool, revision: str | None) -> None:
    """Copy an adapter from the Hub to OUT, compared with its report.

    \b
    Example:
      lorapack pull somebody/my-adapter-small -o smaller
    """
    from lorapack.hub import pull_adapter

    files = pull_adapter(repo, out, revision, overwrite=overwrite)
    say(f"Wrote {out}: {', '.join(files)}")
