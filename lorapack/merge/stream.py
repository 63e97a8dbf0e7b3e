"""Bytes from file to file: the untouched by the kernel, the changed in blocks of rows."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lorapack.errors import InputError
from lorapack.merge.layout import Entry, fill
from lorapack.merge.match import Change
from lorapack.merge.numbers import STORED, Array, accumulator, narrow, widen

BLOCK = 1 << 18  # numbers at once: a few arrays of a megabyte, which stay in the processor's cache
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
            done = copy_through(files, start, min(stop, start + 4 * BLOCK), to)
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
    """Write one tensor: converted, replaced, added to.

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
    """One tensor in blocks of rows, in their order: converted, replaced, added to.

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
    replaced = what.carried.read() if what.carried else None
    stored = what.carried.dtype if what.carried else source.dtype
    wide = accumulator(dtype)
    left, right = _sides(what, wide)
    rows = left.shape[0] if left is not None else source.shape[0] if source.shape else 1
    count = int(np.prod(source.shape, dtype=np.int64))
    columns = count // rows
    at_once = max(1, BLOCK // columns)
    size = min(at_once, rows)
    raw = np.empty((size, columns), STORED[stored])
    out = np.empty((size, columns), STORED[dtype])
    values, added = np.empty((size, columns), wide), np.empty((size, columns), wide)
    spare = np.empty((size, columns), np.uint32)
    for row in range(0, rows, at_once):
        n = min(at_once, rows - row)
        if replaced is None:
            fill(descriptor, raw[:n], source.start + row * columns * raw.itemsize)
            widen(raw[:n], stored, values[:n])
        else:
            widen(replaced[row * columns : (row + n) * columns].reshape(n, columns), stored, values[:n])
        if left is not None and right is not None:
            np.matmul(left[row : row + n], right, out=added[:n])
            values[:n] += added[:n]
        try:
            narrow(values[:n], dtype, out[:n], spare[:n])
        except FloatingPointError:
            raise InputError(f"{name} has numbers too large for {dtype}; choose another --dtype") from None
        yield out[:n]


def _sides(what: Change, wide: "np.dtype[np.floating]") -> tuple[Array | None, Array | None]:
    """Two matrices whose product is what is added: B and s·A, or their transposes in the other order."""
    if what.update is None:
        return None, None
    a, b = what.update.read()
    scaled = (a.astype(np.float64) * what.update.scale).astype(wide)
    left, right = (scaled.T, b.T) if what.transposed else (b, scaled)
    return np.ascontiguousarray(left, wide), np.ascontiguousarray(right, wide)
