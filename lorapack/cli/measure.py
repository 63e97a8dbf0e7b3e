"""`lorapack measure`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command(cls=options.MethodCommand)
@options.ADAPTER
@options.DATA
@click.option(
    "-o", "--out", default="statistics.safetensors", show_default=True, metavar="FILE", help="Where to write."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--method", default="adaptive", show_default=True, help="Measure what this method needs.")
@options.SAMPLE
@options.AVERAGE
@options.SEED
@options.MODEL
@options.REVISION
@options.PLAN_MEMORY
@options.JSON
def measure(
    adapter: str,
    data: str,
    out: str,
    overwrite: bool,
    method: str,
    method_options: dict[str, str],
    revision: str | None,
    plan_memory: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure what a method needs to know of ADAPTER on the calibration part of some data.

    What is written can be given to `lorapack plan` and `lorapack compress --statistics`. What is printed is each
    module's output norm, and its share of the norms of its type, LoRA-drop's importance.
    """
    import json

    from lorapack.cli.files import write_statistics
    from lorapack.cli.progress import watch
    from lorapack.cli.show import console, table
    from lorapack.core.statistics import importances, output_norms
    from lorapack.hub import read_adapter
    from lorapack.job import chosen_method
    from lorapack.measure import measure_adapter
    from lorapack.processes import others_leave
    from lorapack.write.file import refuse_existing

    if plan_memory:
        from lorapack.cli.footprint import tell_memory

        tell_memory(read_adapter(adapter, revision), settings, "measure")
        return
    refuse_existing(out, overwrite, adapter, data, settings["base"])
    chosen, chosen_options = chosen_method(method, method_options)
    source = read_adapter(adapter, revision)
    statistics = measure_adapter(source, data, needs=chosen.needs(chosen_options), watch=watch, **settings)
    others_leave()
    write_statistics(statistics, out, overwrite)
    norms = output_norms(source, statistics)
    importance = importances(norms)
    if as_json:
        modules = {m: {"output_norm": norms[m], "importance": importance[m]} for m in norms}
        found = {"tokens": statistics.tokens, "rows": statistics.samples, "statistics": str(out), "modules": modules}
        say(json.dumps(found, indent=1))
        return
    shown = table("Output norms", "module", "E||s B A x||²", "of its type, %")
    for module, norm in norms.items():
        shown.add_row(module, f"{norm:.6g}", f"{100 * importance[module]:.1f}")
    console().print(shown)
    say(f"Measured {statistics.tokens:,} tokens of {statistics.samples:,} rows. Wrote {out}")
