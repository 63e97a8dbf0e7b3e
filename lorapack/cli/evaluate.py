"""`lorapack evaluate`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@options.DATA
@click.option("--original", metavar="DIR", help="The adapter it was made from, to compare with.")
@options.SEED
@options.MODEL
@options.GATES
@options.REVISION
@options.PLAN_MEMORY
@options.JSON
def evaluate(
    adapter: str,
    data: str,
    original: str | None,
    revision: str | None,
    plan_memory: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Evaluate ADAPTER on held-out rows, beside its base and its original.

    Rows that ADAPTER was compressed with, as its report.json says, are left out. A gate that is not
    met ends it with exit code 3, after the figures were printed.
    """
    import json
    from dataclasses import asdict

    from lorapack.cli.files import read_report
    from lorapack.cli.gates import settle, take_gates
    from lorapack.cli.progress import watch
    from lorapack.core.adapter import size
    from lorapack.evaluate import evaluate_adapters
    from lorapack.hub import find_adapter, read_adapter
    from lorapack.processes import others_leave
    from lorapack.ship.gates import judge

    gates, junit = take_gates(settings, quality=original is not None, without="--original")
    directory = find_adapter(adapter, revision)
    found = read_adapter(directory)
    first, second = (read_adapter(original), found) if original else (found, None)
    if plan_memory:
        from lorapack.cli.footprint import tell_memory

        tell_memory(first, settings, "evaluate", as_json)
        return
    report = read_report(directory)
    quality, facts = evaluate_adapters(
        first, data, compressed=second, used=report.used_rows() if report else (), watch=watch, **settings
    )
    others_leave()
    outcomes = judge(gates, size(found), quality)
    if as_json:
        said = {"quality": asdict(quality), "data": facts, "gates": [asdict(outcome) for outcome in outcomes]}
        say(json.dumps(said, indent=1))
    else:
        from lorapack.cli.show import print_quality

        print_quality(quality)
        if facts["rows_used_before"]:
            say(f"{facts['rows_used_before']} rows were used to compress it and are left out")
    settle(outcomes, junit, "lorapack evaluate", tell=not as_json)
