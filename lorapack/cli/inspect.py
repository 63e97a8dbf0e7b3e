"""`lorapack inspect`."""

import click

from lorapack.cli import options
from lorapack.cli.say import say


@click.command()
@options.ADAPTER
@options.REVISION
@options.JSON
def inspect(adapter: str, revision: str | None, as_json: bool) -> None:
    """Show what is inside ADAPTER: base, ranks, sizes, what is shared."""
    import json

    from lorapack.cli.show import console, table
    from lorapack.describe import describe_adapter
    from lorapack.hub import read_adapter

    found = describe_adapter(read_adapter(adapter, revision))
    if as_json:
        say(json.dumps(found, indent=1))
        return
    out = console()
    out.print(
        f"{found['format']}, {found['task_type'] or 'no task_type'}, base model {found['base_model'] or 'not named'}"
    )
    types = table("Modules", "type", "modules", "pairs", "ranks", "scales", "shape", "dtype", "parameters", "bytes")
    for row in found["types"]:
        types.add_row(
            row["type"],
            str(row["modules"]),
            str(row["factors"]),
            row["ranks"],
            row["scales"],
            row["shape"],
            row["dtype"],
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
        )
    out.print(types)
    for group in found["shared"]:
        own = f", {group['core']} cores" if "core" in group else ""
        own += ", output vectors" if "output" in group else ""
        own += f", made from the seed {group['seed']}" if "seed" in group else ""
        out.print(f"{group['name']} (rank {group['rank']}{own}) serves {', '.join(group['modules'])}", soft_wrap=True)
    if found["carried"]:
        carried = table("Carried along untouched", "tensor", "shape", "bytes")
        for row in found["carried"]:
            carried.add_row(row["name"], row["shape"], f"{row['bytes']:,}")
        out.print(carried)
    total = found["size"]
    out.print(
        f"{total['parameters']:,} LoRA parameters in {total['bytes']:,} bytes; {total['carried_bytes']:,} bytes carried"
    )
