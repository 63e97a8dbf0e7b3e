"""Bytes from file to file: the untouched by the kernel, the changed in blocks of rows."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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


def change(files: Files, name: str, source: Entry, target: Entry, what: Change) -> None:
    """Write one tensor: converted, replaced, added to, scaled to DoRA's magnitudes.

    Args:
        files: both ends.
        name: for messages.
        source, target: where it lies, and in which type; the same shape.
        what: the change, an empty one to convert only.

    Raises:
        InputError: the type cannot hold a number.
    """
    at = target.start
    for block in blocks(files.source, name, source, target.dtype, what):
        write(files, block, at)
        at += block.nbytes


def blocks(descriptor: int, name: str, source: Entry, dtype: str, what: Change) -> Iterator[Array]:
    """One tensor in blocks of rows, in their order: converted, replaced, added to, scaled to DoRA's magnitudes.

    Args:
        descriptor: of the open file that holds it.
        name: for messages.
        source: where it lies.
        dtype: of the blocks, as stored (`STORED`).
        what: the change, an empty one to convert only.

    Yields:
        (rows, columns), the axes behind the first taken together; overwritten by the next one.

    Raises:
        InputError: the type cannot hold a number.
    """
    if source.start == source.stop:
        return
    left, right = _sides(what)
    sums = partial(_sums, descriptor, source, what.carried, dtype, left, right)
    factors = _magnitudes(what, sums)
    out = spare = np.empty((0, 0))
    for row, values in sums():
        if out.shape[0] < values.shape[0]:
            out, spare = np.empty(values.shape, STORED[dtype]), np.empty((2, *values.shape), np.uint32)
        if factors is not None:
            values *= factors if factors.shape[0] == 1 else factors[row : row + len(values)]
        try:
            narrow(values, dtype, out[: len(values)], spare[:, : len(values)])
        except FloatingPointError:
            raise InputError(f"{name} has numbers too large for {dtype}; choose another --dtype") from None
        yield out[: len(values)]


def _sums(
    descriptor: int, source: Entry, carried: Carried | None, dtype: str, left: Array | None, right: Array | None
) -> Iterator[tuple[int, Array]]:
    """Blocks of rows of the tensor, with what is added; each only until the next. The first row's number comes along.

    Args:
        descriptor, source: where the tensor is read, unless `carried` takes its place.
        dtype: of the result.
        left, right: the matrices whose product is added; None for none.
    """
    stored = carried.dtype if carried else source.dtype
    wide = accumulator(dtype, stored, left is not None)
    rows = left.shape[0] if left is not None else source.shape[0] if source.shape else 1
    columns = int(np.prod(source.shape, dtype=np.int64)) // rows
    size = min(max(1, BLOCK // columns), rows)
    raw, spare = np.empty((size, columns), STORED[stored]), np.empty((size, columns), np.uint32)
    values, added = np.empty((size, columns), wide), np.empty((size if left is not None else 0, columns), wide)
    for row in range(0, rows, size):
        n = min(size, rows - row)
        if carried is None:
            fill(descriptor, raw[:n], source.start + row * columns * raw.itemsize)
        else:
            raw[:n] = carried.read(row * columns, (row + n) * columns).reshape(n, columns)
        widen(raw[:n], stored, values[:n], spare[:n])
        if left is not None and right is not None:
            np.matmul(left[row : row + n], right, out=added[:n])
            values[:n] += added[:n]
        yield row, values[:n]


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
