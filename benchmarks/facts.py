"""What a result says of its figures, and of where they come from."""

import json
import os
import platform
import statistics as stats
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": stats.median(values), "min": min(values), "max": max(values)}


def machine(threads: int | None = None) -> str:
    """Processor, cores, threads of the work, and what else the machine had to do."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    used = "" if threads is None else f", {threads} threads"
    return f"{platform.machine()}, {os.cpu_count()} cores{used} (load {load})"


def device_name(device: str) -> str:
    """The card's name where it is a GPU."""
    import torch  # not at the top: the benchmarks that start processes do without it

    return torch.cuda.get_device_name() if device == "cuda" else device


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def tell(result: dict[str, Any], out: Path | None) -> None:
    """Print a result, and write it where that was asked for."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
