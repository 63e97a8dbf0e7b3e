"""`lorapack report`."""

from typing import Literal

import click

from lorapack.cli.say import say


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("-o", "--out", metavar="FILE", help="Where to write.  [default: standard output]")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "markdown"]),
    help="[default: markdown for FILE.md and standard output, else html]",
)
@click.option("--sweep", "sweep_file", metavar="FILE", help="Also show what `lorapack sweep --json` printed.")
def report(
    directory: str, out: str | None, overwrite: bool, form: Literal["html", "markdown"] | None, sweep_file: str | None
) -> None:
    """Show what a compression did: one HTML page, or Markdown for a pull request.

    DIR is a directory that `lorapack compress` wrote, or its report.json. The page holds everything it
    shows and asks no network for anything.

    \b
    Examples:
      lorapack report smaller -o report.html
      lorapack report smaller >> "$GITHUB_STEP_SUMMARY"
    """
    from pathlib import Path

    from lorapack.cli.files import read_points
    from lorapack.core.report import from_json
    from lorapack.read.adapter import REPORT
    from lorapack.read.files import read_text
    from lorapack.report import html, markdown
    from lorapack.write.file import refuse_existing, write_text

    file = Path(directory) / REPORT if Path(directory).is_dir() else Path(directory)
    if out is not None:
        refuse_existing(out, overwrite, str(file), sweep_file)
    found = from_json(read_text(file), str(file))
    points = read_points(sweep_file) if sweep_file else []
    is_markdown = form == "markdown" if form else out is None or out.endswith(".md")
    page = markdown(found, points) if is_markdown else html(found, points)
    if out is None:
        say(page, nl=False)
    else:
        write_text(page, out, overwrite=overwrite)
        say(f"Wrote {out}")
