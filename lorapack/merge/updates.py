"""What an adapter does to its base, as numpy arrays that are read when they are needed.

A plain PEFT checkpoint in safetensors is read here, without torch: importing it would take several times
as long as the merge. Anything else, and anything that looks odd, goes to `lorapack.read`, which
reads every format and says what is wrong with a damaged one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapack.core.names import LORA, PREFIX
from lorapack.errors import InputError
from lorapack.merge.layout import FLOATS, Entry, Shard, fill, read_shard
from lorapack.merge.numbers import STORED, Array, widen
from lorapack.read.config import LoraSettings, check_config
from lorapack.read.files import CONFIG, SAFETENSORS, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from lorapack.core.adapter import Adapter, Kind


CHECKED = 1 << 20  # numbers at once
MERGED_ONLY = ("use_dora", "target_parameters")  # what is not compressed and yet merged
FROZEN = ".base_layer."  # in the names of weights below a LoRA that are saved with it
MAGNITUDE = re.compile(r"^(?P<module>.+)\.(?P<part>lora_magnitude_vector)(?:\.weight)?$")


@dataclass(frozen=True, eq=False)
class Update:
    """One module's ``scale * B @ A``.

    Attributes:
        kind: ``linear``, ``embedding`` or ``conv``.
        a, b: the shapes of A and B as stored, the rank first in A and second in B.
        scale: the factor of the product.
        read: A of shape (r, d_in) and B of shape (d_out, r), float32 (float64 if stored so); the kernel of a
            convolution is flattened into d_in.
        magnitude: DoRA's, (d_out,); an embedding's is (width,). None without DoRA.
    """

    kind: "Kind"
    a: tuple[int, ...]
    b: tuple[int, ...]
    scale: float
    read: Callable[[], tuple[Array, Array]]
    magnitude: Callable[[], Array] | None = None

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight of a linear layer, an embedding or a convolution that it fits."""
        if self.kind == "embedding":  # A is (r, numbers), B (width, r), the weight (numbers, width)
            return self.a[1], self.b[0]
        return (self.b[0], *self.a[1:])


@dataclass(frozen=True, eq=False)
class Carried:
    """A tensor that takes the place of one of the base's.

    Attributes:
        dtype: its type (`STORED`).
        shape: its shape.
        read: the stored numbers from one position to another.
        frozen: it is the base's own weight as the adapter saw it, below the LoRA: whatever is tied to it has it too.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Array]
    frozen: bool = False


@dataclass(frozen=True, eq=False)
class Updates:
    """An adapter, for merging.

    Attributes:
        config: its `adapter_config.json`.
        settings: the same, checked.
        modules: the updates, by the module's name in the base.
        carried: saved modules and biases, by the tensor's name in the base.
    """

    config: Mapping[str, Any]
    settings: LoraSettings
    modules: Mapping[str, Update]
    carried: Mapping[str, Carried]


def read_updates(directory: Path) -> Updates:
    """Read an adapter directory of any format lorapack knows.

    Raises:
        InputError: what `lorapack.read_adapter` refuses.
    """
    found = _plain(directory)
    if found is None:
        from lorapack.read.adapter import read_adapter

        found = from_adapter(read_adapter(directory))
    return found


def is_fused(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a pair of factors belongs to bare parameters: the experts of a layer, side by side."""
    owners = {name.rpartition(".")[0] for name in config.get("target_parameters") or ()}
    return any(f".{module.replace('.base_layer', '')}".endswith(f".{owner}") for owner in owners)


def weighted(found: Sequence[Updates], weights: Sequence[float]) -> Updates:
    """The weighted sum of adapters' updates as one adapter: the factors of a module side by side, one product.

    Args:
        found: adapters of one base; with saved modules, biases or DoRA only alone and with weight 1.
        weights: one an adapter.

    Raises:
        InputError: an adapter that no sum is defined for, or adapters that do not fit together.
    """
    if len(found) == 1 and weights[0] == 1:
        return found[0]
    for each in found:
        whole = [*each.carried, *(m for m, update in each.modules.items() if update.magnitude is not None)]
        if whole:
            raise InputError(
                f"an adapter with saved modules, biases or DoRA ({whole[0]}) cannot be weighed; merge it alone"
            )
    if len({each.settings.fan_in_fan_out for each in found}) > 1:
        raise InputError("one of the adapters has fan_in_fan_out and another has not: they are not of one base")
    members: dict[str, list[tuple[Update, float]]] = {}
    for each, weight in zip(found, weights, strict=True):
        for module, update in each.modules.items():
            members.setdefault(module, []).append((update, weight))
    return replace(found[0], modules={module: _sum(module, parts) for module, parts in members.items()})


def _sum(module: str, parts: Sequence[tuple[Update, float]]) -> Update:
    first = parts[0][0]
    if len({(update.kind, update.weight) for update, _ in parts}) > 1:
        raise InputError(f"{module} has different shapes in the adapters: they are not of one base")
    rank = sum(update.a[0] for update, _ in parts)

    def read() -> tuple[Array, Array]:
        pairs = [(update.read(), update.scale * weight) for update, weight in parts]
        scaled = [a.astype(np.float64) * scale for (a, _), scale in pairs]
        return np.concatenate(scaled), np.concatenate([b for (_, b), _ in pairs], axis=1)

    return Update(first.kind, (rank, *first.a[1:]), (first.b[0], rank, *first.b[2:]), 1.0, read)


def from_adapter(adapter: "Adapter") -> Updates:
    """The updates of an adapter in memory: shared factors, cores, vectors and codes as plain pairs."""
    modules = {}
    for name in adapter.modules:
        factors = adapter.factors(name)
        modules[name] = Update(
            factors.kind,
            tuple(factors.A.shape),
            tuple(factors.B.shape),
            adapter.scale(name),
            lambda n=name: _arrays(adapter, n),  # type: ignore[misc]
        )
    carried = {
        _base_name(name): replace(_carried(tensor), frozen=FROZEN in name) for name, tensor in adapter.carried.items()
    }
    return Updates(adapter.config, check_config(adapter.config, CONFIG), modules, carried)


def _arrays(adapter: "Adapter", module: str) -> tuple[Array, Array]:
    import torch

    factors = adapter.factors(module)
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (factors.A, factors.B))
    return a.reshape(a.shape[0], -1).numpy(), b.reshape(b.shape[0], -1).numpy()


def _carried(tensor: "Tensor") -> Carried:
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if tensor.dtype not in names:
        return Carried(str(tensor.dtype), tuple(tensor.shape), lambda start, stop: np.empty(0))
    dtype = names[tensor.dtype]
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(STORED[dtype])
    return Carried(dtype, tuple(tensor.shape), lambda start, stop: raw[start:stop])


def _base_name(name: str) -> str:
    """The name in the base of a tensor that an adapter brings along."""
    return name.removeprefix(PREFIX).replace(FROZEN, ".").replace(".modules_to_save.", ".")


def _plain(directory: Path) -> Updates | None:
    """A plain PEFT checkpoint; None where anything is not as expected."""
    if not ((directory / CONFIG).is_file() and (directory / SAFETENSORS).is_file()):
        return None
    config = read_json(directory / CONFIG)
    settings = check_config(config, str(directory / CONFIG), MERGED_ONLY)
    if config["peft_type"] != "LORA":
        return None
    try:
        shard = read_shard(directory / SAFETENSORS)
    except InputError:
        return None
    pairs: dict[str, dict[str, str]] = {}
    carried = {}
    for name, entry in shard.entries.items():
        match = LORA.match(name) or MAGNITUDE.match(name)
        if entry.dtype not in FLOATS or not name.startswith(PREFIX):
            return None
        if match:
            pairs.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = name
        elif ".lora_" in name:
            return None
        else:
            carried[_base_name(name)] = replace(_lazy(shard, entry), frozen=FROZEN in name)
    if any(("lora_magnitude_vector" in parts) != bool(config.get("use_dora")) for parts in pairs.values()):
        return None
    modules = {name: _update(shard, name, parts, settings, is_fused(name, config)) for name, parts in pairs.items()}
    checked = {name: update for name, update in modules.items() if update is not None}
    if not checked or len(checked) != len(modules) or not all(map(_finite, carried.values())):
        return None
    return Updates(config, settings, checked, carried)


def _update(shard: Shard, module: str, parts: Mapping[str, str], settings: LoraSettings, fused: bool) -> Update | None:
    """The update of a pair of factors; None where something is not as expected."""
    for names in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if parts.keys() - {"lora_magnitude_vector"} == set(names):
            a, b = (shard.entries[parts[name]] for name in names)
            break
    else:
        return None
    kind: Kind = "embedding" if "embedding" in names[0] else "conv" if len(a.shape) == 4 else "linear"
    dimensions = 4 if kind == "conv" else 2
    rank = settings.r if fused else a.shape[0]
    if not len(a.shape) == len(b.shape) == dimensions or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        return None
    if (a.shape[0] % rank if fused else settings.rank(module) != rank) or not all(
        map(_finite, (_lazy(shard, a), _lazy(shard, b)))
    ):
        return None
    magnitude = None
    if "lora_magnitude_vector" in parts:
        entry = shard.entries[parts["lora_magnitude_vector"]]
        if max(entry.shape, default=0) != b.shape[0] or not _finite(_lazy(shard, entry)):
            return None
        magnitude = lambda: _matrix(shard, entry).reshape(-1)  # noqa: E731
    return Update(
        kind,
        a.shape,
        b.shape,
        settings.scale(module, rank),
        lambda: (_matrix(shard, a), _matrix(shard, b)),
        magnitude,
    )


def _lazy(shard: Shard, entry: Entry) -> Carried:
    return Carried(entry.dtype, entry.shape, lambda start, stop: _stored(shard, entry, start, stop))


def _stored(shard: Shard, entry: Entry, start: int, stop: int) -> Array:
    raw = np.empty(stop - start, STORED[entry.dtype])
    with open(shard.path, "rb") as file:
        fill(file.fileno(), raw, entry.start + start * raw.itemsize)
    return raw


def _matrix(shard: Shard, entry: Entry) -> Array:
    raw = _stored(shard, entry, 0, math.prod(entry.shape))
    values = np.empty(raw.shape, np.float64 if entry.dtype == "F64" else np.float32)
    widen(raw, entry.dtype, values, np.empty(raw.shape, np.uint32))
    return values.reshape(entry.shape[0], -1)


def _finite(tensor: Carried) -> bool:
    count = math.prod(tensor.shape)
    blocks = (tensor.read(start, min(count, start + CHECKED)) for start in range(0, count, CHECKED))
    if tensor.dtype == "BF16":
        return not any(((raw & 0x7F80) == 0x7F80).any() for raw in blocks)
    return all(np.isfinite(raw).all() for raw in blocks)
