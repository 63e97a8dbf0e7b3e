"""What a result says of where it came from."""

import hashlib
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorapack.core.report import Interval

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def code() -> str:
    """Which lorapack it was: a digest of its sources."""
    state = hashlib.sha256()
    for path in sorted((ROOT / "lorapack").rglob("*.py")):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, so that a run can be stopped at any time; a figure a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(as_text(value))
    beside.replace(path)


def as_text(value: dict[str, Any]) -> str:
    """JSON in which every entry of a list or table at the top stands on a line of its own."""

    def lines(item: Any) -> str:
        if isinstance(item, dict) and item:
            return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in item.items()) + "\n }"
        if isinstance(item, list) and item:
            return "[\n" + ",\n".join(f"  {json.dumps(v)}" for v in item) + "\n ]"
        return json.dumps(item)

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {lines(v)}" for k, v in value.items()) + "\n}\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def rounded(value: Any, digits: int = 6) -> Any:
    """Six significant digits are enough for a record; what is not a finite number is null."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def triple(found: Interval | None) -> list[float | None] | None:
    """A figure and the ends of its interval; None where there is none, or nobody knows it."""
    if found is None or found.value is None or not math.isfinite(found.value):
        return None
    return [found.value, found.low, found.high]
