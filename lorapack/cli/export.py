"""`lorapack export`."""

from typing import Any

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@options.OUT
@options.BASE
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the weights; int8: ONNX Runtime's dynamic quantisation.",
)
@click.option("--separate", is_flag=True, help="The base's graph, and the adapter in a file beside it.")
@click.option(
    "--adapter-only", metavar="DIR", help="Only the adapter's file, for the graph that --separate wrote into DIR."
)
@click.option("--verify/--no-verify", default=True, help="Compare with torch before writing.  [default: verify]")
@options.REVISION
def export(adapter: str, out: str, adapter_only: str | None, **settings: Any) -> None:
    """Export ADAPTER and its base model to ONNX."""
    from lorapack.export.export import export_adapter, export_further

    if adapter_only is None:
        record = export_adapter(adapter, out, **settings)
    else:
        del settings["dtype"], settings["separate"]
        record = export_further(adapter, out, adapter_only, **settings)
    for what, figures in (record.verification or {}).items():
        say(
            f"{what}: {figures['numbers']:,} numbers differ from torch's by at most {figures['largest']:.1e}"
            + (f", {figures['equal']} of {figures['decisions']} choices the same" if figures["decisions"] else "")
        )
    say(f"Wrote {out}")
