"""The weights of a traced graph, read and merged at the moment they are written.

Each is one lazy tensor: `lorapack.merge` reads it from the base's file in blocks and adds the adapter's product, so
there is one of them in memory at a time (a few while several are written side by side).
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lorapack.errors import InputError
from lorapack.export.graph import Weight, forget, weights
from lorapack.merge.base import Base
from lorapack.merge.layout import WIDTHS, Entry
from lorapack.merge.match import Change, match, places
from lorapack.merge.numbers import STORED, Array
from lorapack.merge.stream import Scratch, blocks
from lorapack.merge.updates import Carried, Updates

FIRST = 4096  # bytes of a tensor that its fingerprint is made of
TYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16"}


@dataclass(frozen=True, eq=False)
class Source:
    """Where a weight comes from: a file and a place in it, and what is done to it. The file is None for new ones."""

    file: Path | None
    entry: Entry
    change: Change


def find_sources(model: ir.Model, base: Base, updates: Updates, *, merged: bool) -> dict[str, Source]:
    """Where every weight of a traced graph is found.

    Args:
        model: a traced graph.
        base: the model's files.
        updates: the adapter. A saved head that the base's files lack is taken from it alone.
        merged: whether the updates are added, and the carried tensors take the place of the base's.

    Raises:
        InputError: what `lorapack.merge.match.match` refuses, or a weight that neither holds.
    """
    wanted = weights(model)
    entries = base.entries
    carried = {name: tensor for name, weight in wanted.items() if (tensor := find_carried(weight, updates.carried))}
    in_base = {name: _known(weight, entries) for name, weight in wanted.items()}
    new = [name for name in carried if not _lies_in(base, in_base[name])]
    found = places([in_base[name] for name in wanted if name not in new], entries, str(base.directory))
    kept = {name: tensor for name, tensor in updates.carried.items() if not any(name in wanted[n].names for n in new)}
    changes: Mapping[str, Change] = {}
    if merged:
        matched = match(replace(updates, carried=kept), base)
        if matched.untied:
            raise InputError(
                f"the adapter changes {next(iter(matched.untied.values()))}, which the model has at both ends: "
                "`lorapack merge` unties them; export an adapter of other layers"
            )
        changes = matched.changes
    files = {name: shard.path for shard in base.shards.values() for name in shard.entries}
    sources = {}
    for name in wanted:
        if name in new:
            sources[name] = alone(carried[name])
        else:
            place = found[in_base[name]]
            sources[name] = Source(files[place], entries[place], changes.get(place, Change()))
    return sources


def alone(tensor: Carried) -> Source:
    """A tensor of the adapter as a weight that no file of the base holds."""
    size = math.prod(tensor.shape) * WIDTHS[tensor.dtype]
    return Source(None, Entry(tensor.dtype, tensor.shape, 0, size), Change(carried=tensor))


def fill(model: ir.Model, sources: Mapping[str, Source], replaceable: Collection[str] = ()) -> None:
    """Make initializers of the weights, which are read when the model is saved.

    Args:
        model: a traced graph.
        sources: where each weight is found.
        replaceable: those that stay inputs, with the weight as their default.

    Raises:
        InputError: a weight of another shape than the configuration says.
    """
    wanted = weights(model)
    for value in [value for value in model.graph.inputs if value.name in wanted]:
        name = str(value.name)
        weight, source = wanted[name], sources[name]
        assert value.shape is not None and value.dtype is not None
        shape = source.entry.shape[::-1] if weight.transposed else source.entry.shape
        if tuple(value.shape) != shape:
            raise InputError(
                f"{name} is {list(shape)} in the files and {list(value.shape)} by config.json: they do not belong "
                "together"
            )
        if name not in replaceable:
            model.graph.inputs.remove(value)
        value.const_value = ir.LazyTensor(
            lambda n=name, s=source, t=TYPES[value.dtype], turn=weight.transposed: ir.tensor(read(n, s, t, turn)),  # type: ignore[misc]
            dtype=value.dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        model.graph.register_initializer(value)
    forget(model)


def read(name: str, source: Source, dtype: str, transposed: bool) -> Array:
    """One weight as it is to be written, of `dtype` (`STORED`); of the file's shape, or its transpose.

    Raises:
        InputError: the type cannot hold a number.
    """
    shape = source.entry.shape
    tensor = np.empty(shape[::-1] if transposed else shape, STORED[dtype])
    rows = tensor.T if transposed else tensor.reshape(shape[0] if shape else 1, -1)
    with open(source.file or os.devnull, "rb") as file:
        at = 0
        for block in blocks(file.fileno(), name, source.entry, dtype, source.change, Scratch()):
            rows[at : at + len(block)] = block
            at += len(block)
    return tensor


def _known(weight: Weight, entries: Mapping[str, Entry]) -> str:
    """The name to look for in the base's files: of a tied weight the one that is there."""
    return next((name for name in weight.names if name in entries), weight.names[0])


def find_carried(weight: Weight, carried: Mapping[str, Carried]) -> Carried | None:
    """What the adapter brings along for a weight."""
    return next((carried[name] for name in weight.names if name in carried), None)


def _lies_in(base: Base, name: str) -> bool:
    """Whether the files have it, perhaps with one component less or more in front."""
    short = name.partition(".")[2]
    return any(entry in (name, short) or entry.endswith(f".{name}") for entry in base.entries)


def fingerprint(base: Base) -> str:
    """SHA-256 of every tensor's name, type, shape and first bytes: other weights, another fingerprint."""
    state = hashlib.sha256()
    for shard in base.shards.values():
        with open(shard.path, "rb") as file:
            for name, entry in shard.entries.items():
                start = os.pread(file.fileno(), min(FIRST, entry.stop - entry.start), entry.start)
                state.update(json.dumps([name, entry.dtype, entry.shape]).encode() + start)
    return state.hexdigest()
