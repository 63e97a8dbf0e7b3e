"""What a run will need of memory, from the headers of the base's files: nothing is loaded (docs/scale.md)."""

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lorapack.core.adapter import Adapter, size
from lorapack.errors import InputError
from lorapack.hub import find_base
from lorapack.merge.layout import Entry, read_shard
from lorapack.model.head import CHUNK
from lorapack.model.load import LONGEST, MOST_LOGITS, Device, DType, find_device
from lorapack.read.files import read_json
from lorapack.recover.layers import MOST
from lorapack.recover.objective import MOST_KEPT
from lorapack.recover.recover import AT_ONCE, rows_a_step
from lorapack.recover.refit import TOKENS

LIBRARIES = 370 * 10**6  # bytes of Python, torch, transformers and PEFT, on the CPU, before a model is there
ALIVE = {"measure": 4, "recover": 5, "evaluate": 6}  # tensors as large as a chunk of logits, at the same time
KEPT = 2.1  # copies of the input and output of every linear layer, for the backward pass: measured on two Llamas
Command = Literal["compress", "measure", "recover", "evaluate"]
STEPS: Mapping[Command, tuple[str, ...]] = {
    "compress": ("measure", "refit", "recover", "evaluate"),
    "measure": ("measure",),
    "recover": ("refit", "recover", "evaluate"),
    "evaluate": ("evaluate",),
}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes by step and part.

    Attributes:
        device: where the model runs.
        steps: for each step what is in memory at its peak, by part.
        host: bytes needed on the CPU, where the device is another.
        free: bytes that are free now, on the device and on the ``host``.
    """

    device: str
    steps: Mapping[str, Mapping[str, int]]
    host: int
    free: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.steps.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.free[self.device] and self.host <= self.free["cpu"]


@dataclass(frozen=True)
class _Base:
    """A model as its headers tell it: bytes, the widths of its linear layers, and of its states and vocabulary."""

    bytes: int
    layers: tuple[tuple[int, int], ...]
    hidden: int
    vocabulary: int


def plan_memory(
    adapter: Adapter,
    base: str | None = None,
    command: Command = "compress",
    *,
    recover_steps: int = 100,
    batch_size: int | None = None,
    objective: str = "both",
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
) -> Footprint:
    """Estimate the memory of a command with these settings.

    For every token that is measured on or trained on, the input and the output of each linear layer count `KEPT`
    times. Rows count as if each were as long as it may be. What one step frees the next one has, so the
    largest step is what a run needs.

    Args:
        adapter: to compress, measure or evaluate; the teacher of a recovery.
        base: another place for the base model than the adapter names.
        command: whose steps are planned, `STEPS`.
        recover_steps, batch_size, objective, max_length, batch_tokens, device, dtype: see
            `lorapack.compress_adapter`.

    Raises:
        InputError: no base, or one without safetensors files.
    """
    source = base or adapter.base_model
    if not source:
        raise InputError("the adapter names no base model; name it with --base")
    where = find_device(device)
    width = WIDTH.get(dtype) or (4 if where.type == "cpu" else 0)
    read = _read(find_base(source, adapter.config.get("revision") if base is None else None), width)
    width = width or 2
    longest = max_length or LONGEST
    kept = int(KEPT * width * sum(d_in + d_out for d_in, d_out in read.layers))  # bytes a token, for the backward pass
    passing = (2 * max(max(pair) for pair in read.layers) + 4 * read.hidden) * width  # bytes a token, without it
    parameters = size(adapter).parameters
    moments = 2 * 7 * 8 * sum(adapter.factors(m).rank ** 2 for m in adapter.linear)

    def head(step: str, tokens: int) -> int:
        return ALIVE[step] * 4 * min(CHUNK, tokens * read.vocabulary)

    measured = max(longest, min(batch_tokens, MOST_LOGITS // read.vocabulary))
    at_once = batch_tokens if where.type == "cuda" else min(batch_tokens, AT_ONCE)
    rows = rows_a_step(batch_size, adapter.task_type)
    trained = max(longest, min(at_once, rows * longest))
    scored = max(longest, batch_tokens)
    always = {"libraries": LIBRARIES if where.type == "cpu" else 0, "base": read.bytes}
    states = MOST + 1 if objective != "task" else 0
    steps = {
        "measure": {
            "adapters": 3 * 4 * parameters,
            "statistics": moments,
            "activations": measured * kept,
            "logits": head("measure", measured),
        },
        "refit": {
            "adapters": 5 * 4 * parameters,
            "activations": 2 * TOKENS * passing,
        },
        "recover": {
            "adapters": 5 * 4 * parameters,
            "optimiser": 5 * 4 * parameters,  # gradient, two moments, the best state and the one at hand
            "teacher": min(MOST_KEPT, recover_steps * rows * longest * read.hidden * width * states),
            "activations": trained * kept,
            "logits": head("recover", trained),
        },
        "evaluate": {
            "adapters": 5 * 4 * parameters,
            "activations": scored * (passing + 3 * read.hidden * width),
            "logits": head("evaluate", scored),
        },
    }
    left_out = () if recover_steps else ("refit", "recover") if command == "compress" else ("recover",)
    taken = {name: always | steps[name] for name in STEPS[command] if name not in left_out}
    host = 0 if where.type == "cpu" else LIBRARIES + read.bytes
    return Footprint(where.type, taken, host, _free(where))


def _read(directory: Path, width: int) -> _Base:
    """Read the headers; weights are of `width` bytes a number, 0 for that of the files."""
    config = read_json(directory / "config.json")
    config = config.get("text_config") or config
    entries = dict(_entries(directory))
    vocabulary = int(config.get("vocab_size") or 1)
    pairs = [_sides(entry) for entry in entries.values() if len(entry.shape) == 2]
    layers = tuple(pair for pair in pairs if vocabulary not in pair and min(pair) > 1)
    if not layers:
        raise InputError(f"{directory}: its files hold no linear layer")
    hidden = int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or min(layers[0]))
    total = sum(_bytes(entry, width) for entry in entries.values())
    return _Base(total, layers, hidden, vocabulary)


def _entries(directory: Path) -> Iterable[tuple[str, Entry]]:
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{directory} has no .safetensors file, whose header tells sizes; a plan needs one")
    for shard in shards:
        yield from read_shard(shard).entries.items()


def _sides(entry: Entry) -> tuple[int, int]:
    """Of a weight matrix; packed, with two 4-bit numbers a byte in one column, those of a square one."""
    if entry.dtype == "U8" and entry.shape[1] == 1:
        return (math.isqrt(2 * entry.shape[0]),) * 2
    return entry.shape[0], entry.shape[1]


def _bytes(entry: Entry, width: int) -> int:
    """In memory: a number of floating point in the width asked for, a quantised one as it is in the file."""
    stored = entry.stop - entry.start
    return math.prod(entry.shape) * width if width and entry.dtype in ("F64", "F32", "F16", "BF16") else stored


def _free(where: torch.device) -> dict[str, int]:
    """Bytes that are free on the CPU, as the system and the group of processes allow, and on the device."""
    found = {"cpu": _free_on_cpu()}
    if where.type == "cuda":
        found["cuda"] = torch.cuda.mem_get_info()[0]
    return found


def _free_on_cpu() -> int:
    free = []
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        free.append(next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def to_json(found: Footprint) -> dict[str, Any]:
    return {
        "device": found.device,
        "steps": {name: {**parts, "total": sum(parts.values())} for name, parts in found.steps.items()},
        "host": found.host,
        "peak": found.peak,
        "free": dict(found.free),
        "fits": found.fits,
    }
