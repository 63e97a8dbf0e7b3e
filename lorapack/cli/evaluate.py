"""`lorapack evaluate`."""

from typing import Any

import click

from lorapack.cli import options


@click.command()
@options.ADAPTER
@options.DATA
@click.option("--original", metavar="DIR", help="The adapter it was made from, to compare with.")
@options.SEED
@options.MODEL
@options.REVISION
@options.JSON
def evaluate(
    adapter: str, data: str, original: str | None, revision: str | None, as_json: bool, **settings: Any
) -> None:
    """Evaluate ADAPTER on held-out rows, beside its base and its original.

    Rows that ADAPTER was compressed with, as its report.json says, are left out.
    """
    import json
    from dataclasses import asdict

    from lorapack.cli.files import read_report
    from lorapack.cli.progress import watch
    from lorapack.evaluate import evaluate_adapters
    from lorapack.hub import find_adapter, read_adapter

    directory = find_adapter(adapter, revision)
    found = read_adapter(directory)
    report = read_report(directory)
    first, second = (read_adapter(original), found) if original else (found, None)
    quality, facts = evaluate_adapters(
        first, data, compressed=second, used=report.used_rows() if report else (), watch=watch, **settings
    )
    if as_json:
        click.echo(json.dumps({"quality": asdict(quality), "data": facts}, indent=1))
        return
    from lorapack.cli.show import print_quality

    print_quality(quality)
    if facts["rows_used_before"]:
        click.echo(f"{facts['rows_used_before']} rows were used to compress it and are left out")
