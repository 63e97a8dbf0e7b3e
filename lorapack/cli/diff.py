"""`lorapack diff`."""

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@options.JSON
def diff(old: str, new: str, as_json: bool) -> None:
    """Compare two compressions: what got better, what got worse.

    OLD and NEW are directories that `lorapack compress` wrote, or their report.json. Figures of
    quality are called better or worse where their 95% intervals are disjoint, unclear where they overlap.

    \b
    Example:
      lorapack diff last-week/smaller smaller
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from lorapack.cli.show import console, table
    from lorapack.core.report import Interval, from_json
    from lorapack.read.adapter import REPORT
    from lorapack.read.files import read_text
    from lorapack.ship.diff import SIZES, compare
    from lorapack.write.card import shown

    files = [Path(each) / REPORT if Path(each).is_dir() else Path(each) for each in (old, new)]
    found = compare(*(from_json(read_text(file), str(file)) for file in files))
    if as_json:
        say(json.dumps(asdict(found), indent=1))
        return

    def cell(figure: Interval | None, name: str) -> str:
        if figure is not None and name in SIZES:
            return f"{figure.value or 0:,.0f}"
        return shown(figure, percent=name in ("gain retained", "same prediction"))

    rows = table("Changes", "figure", "old", "new", "")
    for change in found.changes:
        rows.add_row(change.figure, cell(change.old, change.figure), cell(change.new, change.figure), change.verdict)
    out = console()
    out.print(rows)
    if not found.same_original:
        out.print("They were made from different adapters")
    if found.same_rows is False:
        out.print("They were evaluated on different rows: a change in quality may be one of the rows", soft_wrap=True)
