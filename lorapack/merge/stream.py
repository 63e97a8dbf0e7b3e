"""Bytes from file to file: the untouched by the kernel, the changed in blocks of rows."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lorapack.errors import InputError
from lorapack.merge.layout import Entry, fill
from lorapack.merge.match import Change
from lorapack.merge.numbers import STORED, Array, accumulator, narrow, widen
from lorapack.merge.updates import Carried

BLOCK = 1 << 16  # numbers at once: a few arrays of half a megabyte, which stay in the processor's cache
PIECE = 1 << 20  # bytes at once through memory
_UNABLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class Files:
    """A shard that is read and the one that is written, both open."""

    source: int
    target: int


def copy(files: Files, start: int, stop: int, to: int) -> None:
    """Bytes `start` to `stop` of the source to the place `to` of the target."""
    while start < stop:
        try:
            done = os.copy_file_range(files.source, files.target, stop - start, start, to)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _UNABLE:
                raise
            done = copy_through(files, start, min(stop, start + PIECE), to)
        if not done:
            raise InputError("the base was cut off while it was read")
        start, to = start + done, to + done


def copy_through(files: Files, start: int, stop: int, to: int) -> int:
    """The same through memory, where the kernel cannot; returns how many bytes."""
    block = os.pread(files.source, stop - start, start)
    write(files, block, to)
    return len(block)


def write(files: Files, block: "bytes | Array", to: int) -> None:
    """All of a block, however little the kernel takes at once."""
    view = memoryview(block).cast("B")  # type: ignore[arg-type]  # as in `fill`
    while view:
        done = os.pwrite(files.target, view, to)
        view, to = view[done:], to + done


class Scratch(threading.local):
    """Arrays for the blocks of one tensor after the other, every thread's own.

    Taking them from the system and giving them back for each tensor cost a tenth of a merge.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Any], Array] = {}

    def array(self, use: str, shape: tuple[int, int], dtype: Any) -> Array:
        """The one of this use and type, with whatever is in it."""
        size = shape[0] * shape[1]
        kept = self._kept.get((use, dtype))
        if kept is None or kept.size < size:
            kept = self._kept[use, dtype] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


def change(files: Files, name: str, source: Entry, target: Entry, what: Change, scratch: Scratch) -> None:
    """Write one tensor: converted, replaced, added to, scaled to DoRA's magnitudes.

    Args:
        files: both ends.
        name: for messages.
        source, target: where it lies, and in which type; the same shape.
        what: the change, an empty one to convert only.
        scratch: memory to compute in.

    Raises:
        InputError: the type cannot hold a number.
    """
    at = target.start
    for block in blocks(files.source, name, source, target.dtype, what, scratch):
        write(files, block, at)
        at += block.nbytes


def blocks(descriptor: int, name: str, source: Entry, dtype: str, what: Change, scratch: Scratch) -> Iterator[Array]:
    """One tensor in blocks of rows, in their order: converted, replaced, added to, scaled to DoRA's magnitudes.

    Args:
        descriptor: of the open file that holds it.
        name: for messages.
        source: where it lies.
        dtype: of the blocks, as stored (`STORED`).
        what: the change, an empty one to convert only.
        scratch: memory to compute in, for one tensor at a time.

    Yields:
        (rows, columns), the axes behind the first taken together; overwritten by the next one.

    Raises:
        InputError: the type cannot hold a number.
    """
    if source.start == source.stop:
        return
    left, right = _sides(what)
    sums = partial(_sums, descriptor, source, what.carried, dtype, left, right, scratch)
    factors = _magnitudes(what, sums)
    for row, values in sums():
        if factors is not None:
            values *= factors if factors.shape[0] == 1 else factors[row : row + len(values)]
        out = scratch.array("out", values.shape, STORED[dtype])
        try:
            narrow(values, dtype, out, scratch.array("words", values.shape, np.uint32))
        except FloatingPointError:
            raise InputError(f"{name} has numbers too large for {dtype}; choose another --dtype") from None
        yield out


def _sums(
    descriptor: int,
    source: Entry,
    carried: Carried | None,
    dtype: str,
    left: Array | None,
    right: Array | None,
    scratch: Scratch,
) -> Iterator[tuple[int, Array]]:
    """Blocks of rows of the tensor, with what is added; each only until the next. The first row's number comes along.

    Args:
        descriptor, source: where the tensor is read, unless `carried` takes its place.
        dtype: of the result.
        left, right: the matrices whose product is added; None for none.
        scratch: memory to compute in.
    """
    stored = carried.dtype if carried else source.dtype
    wide = accumulator(dtype, stored, left is not None)
    rows = left.shape[0] if left is not None else source.shape[0] if source.shape else 1
    columns = int(np.prod(source.shape, dtype=np.int64)) // rows
    size = min(max(1, BLOCK // columns), rows)
    for row in range(0, rows, size):
        shape = min(size, rows - row), columns
        raw, values = scratch.array("raw", shape, STORED[stored]), scratch.array("values", shape, wide)
        if carried is None:
            fill(descriptor, raw, source.start + row * columns * raw.itemsize)
        else:
            raw[:] = carried.read(row * columns, (row + shape[0]) * columns).reshape(shape)
        widen(raw, stored, values, scratch.array("words", shape, np.uint32))
        if left is not None and right is not None:
            values += np.matmul(left[row : row + shape[0]], right, out=scratch.array("added", shape, wide))
        yield row, values


def _sides(what: Change) -> tuple[Array | None, Array | None]:
    """Two float64 matrices whose product is what is added: B and s·A, or their transposes in the other order."""
    if what.update is None:
        return None, None
    a, b = what.update.read()
    scaled = a.astype(np.float64) * what.update.scale
    left, right = (scaled.T, b.T) if what.transposed else (b, scaled)
    return np.ascontiguousarray(left, np.float64), np.ascontiguousarray(right, np.float64)


def _magnitudes(what: Change, sums: Callable[[], Iterator[tuple[int, Array]]]) -> Array | None:
    """DoRA's factors m / ‖W + s·B·A‖, (rows, 1) or (1, columns), by one more pass over the tensor; None without DoRA.

    The norm is over the inputs: along a row, or along a column where the weight is stored transposed.
    """
    if what.update is None or what.update.magnitude is None:
        return None
    squares = [(values * values).sum(axis=0 if what.transposed else 1) for _, values in sums()]
    norms = np.sqrt(sum(squares) if what.transposed else np.concatenate(squares))
    factors: Array = what.update.magnitude().astype(np.float64) / norms
    return factors[None, :] if what.transposed else factors[:, None]
