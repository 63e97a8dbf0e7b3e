"""The memory plan of a command, as a table or JSON."""

import json
from collections.abc import Mapping
from typing import Any

from lorapack.cli.say import say
from lorapack.cli.show import console, table
from lorapack.core.adapter import Adapter
from lorapack.footprint import Command, plan_memory, to_json

ASKED = ("recover_steps", "batch_size", "objective", "max_length", "batch_tokens", "device", "dtype")


def tell_memory(adapter: Adapter, settings: Mapping[str, Any], command: Command, as_json: bool = False) -> None:
    """Print what a command with these settings will need."""
    asked = {name: settings[name] for name in ASKED if name in settings}
    found = plan_memory(adapter, settings["base"], command, **asked)
    if as_json:
        say(json.dumps(to_json(found), indent=1))
        return
    parts = list(dict.fromkeys(part for step in found.steps.values() for part in step))
    rows = table(f"Memory on the {_name(found.device)}, MB at the peak of each step", "", *found.steps)
    for part in parts:
        rows.add_row(part, *(_megabytes(step[part]) if part in step else "" for step in found.steps.values()))
    rows.add_row("together", *(_megabytes(sum(step.values())) for step in found.steps.values()))
    console().print(rows)
    needs = {found.device: found.peak} | ({"cpu": found.host} if found.host else {})
    for place, needed in needs.items():
        word = "fits" if needed <= found.free[place] else "does NOT fit"
        say(f"{_name(place)}: {_megabytes(needed)} MB of {_megabytes(found.free[place])} MB free: {word}")
    if not found.fits:
        say("Smaller: --batch-tokens, --max-length, --dtype bfloat16; --device split goes on with less")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def _name(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}[device]
