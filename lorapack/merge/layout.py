"""Where each tensor of a safetensors file lies, checked; the bytes stay on the disk."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapack.errors import InputError
from lorapack.read.files import check_header, diagnose

if TYPE_CHECKING:
    import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")
WIDTHS = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
WIDTHS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2) | dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)


@dataclass(frozen=True)
class Entry:
    """One tensor: its type and shape, and its first byte and the one behind its last, in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: where its data begin, its tensors in the order of their bytes, its metadata."""

    path: Path
    data: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file: no holes, no overlaps, nothing behind the end.

    Raises:
        InputError: cut off, no safetensors file, a Git LFS pointer, or a header that contradicts itself.
    """
    try:
        check_header(path)
        length, data, entries, metadata = _parsed(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(diagnose(path, error.with_traceback(None))) from None  # what was parsed can go
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    at = data
    for name, entry in ordered.items():
        if entry.start != at:
            raise InputError(f"{path} is no valid safetensors file ({name} begins at byte {entry.start}, not {at})")
        at = entry.stop
    if at != length:
        raise InputError(f"{path} has {length:,} bytes, its header wants {at:,}. Download it again")
    return Shard(path, data, ordered, metadata)


def _parsed(path: Path) -> tuple[int, int, dict[str, Entry], dict[str, str]]:
    """The file's length, where its data begin, the tensors and the metadata; raises nearly anything."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        (size,) = struct.unpack("<Q", file.read(8))
        if size > length - 8:
            raise ValueError("its header is too long")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    return length, 8 + size, {name: _entry(name, value, 8 + size) for name, value in header.items()}, metadata


def _entry(name: str, value: Mapping[str, Any], data: int) -> Entry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)) or stop < start:
        raise ValueError(f"{name} has no plain shape and place")
    dtype = value["dtype"]
    if dtype in WIDTHS and stop - start != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"{name} has {stop - start} bytes, which is not its shape")
    return Entry(dtype, shape, data + start, data + stop)


def fill(descriptor: int, array: "np.ndarray[Any, Any]", at: int) -> None:
    """Fill an array with the bytes of an open file from byte `at`.

    Raises:
        InputError: the file ends before.
    """
    view = memoryview(array).cast("B")  # type: ignore[arg-type]  # numpy's stubs name no buffer before Python 3.12
    while view:
        done = os.preadv(descriptor, [view], at)
        if not done:
            raise InputError("a file was cut off while it was read")
        view, at = view[done:], at + done


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a new file with these types and shapes, in this order, and where each tensor then lies."""
    value: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, {}
    for name, entry in entries.items():
        stop = at + math.prod(entry.shape) * WIDTHS[entry.dtype]
        value[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, stop]}
        places[name] = (at, stop)
        at = stop
    raw = json.dumps(value, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    begin = 8 + len(raw)
    return struct.pack("<Q", len(raw)) + raw, {
        name: Entry(e.dtype, e.shape, begin + places[name][0], begin + places[name][1]) for name, e in entries.items()
    }
