"""Bytes as numbers and back, rounded once to nearest, ties to even. numpy has no bfloat16, so it is done here."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
STORED: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_HIGH = slice(1, None, 2)  # the upper half of each little-endian word


def accumulator(dtype: str) -> Any:
    """What sums are made in, so that they are rounded once: float64 for wide results, float32 for 16-bit ones."""
    return np.dtype("<f8") if dtype in ("F64", "F32") else np.dtype("<f4")


def widen(raw: Array, dtype: str, out: Array) -> None:
    """Numbers as stored (`STORED`) into a float32 or float64 array of the same shape."""
    if dtype == "BF16" and out.dtype == np.float32:
        words = out.view(np.uint32)
        np.copyto(words, raw)
        np.left_shift(words, 16, out=words)
    elif dtype == "BF16":
        out[...] = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        np.copyto(out, raw, casting="same_kind")


def narrow(values: Array, dtype: str, out: Array, spare: Array) -> None:
    """Floats rounded into an array as stored; `values` is overwritten.

    Args:
        values: float32 or float64, contiguous.
        dtype: of `STORED`.
        out: the same shape.
        spare: uint32, the same shape, overwritten.

    Raises:
        FloatingPointError: a number that the type cannot hold.
    """
    if dtype != "BF16":
        with np.errstate(over="raise"):
            np.copyto(out, values, casting="same_kind")
        return
    words = values.astype(np.float32, copy=False).view(np.uint32)
    np.right_shift(words, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(words, spare, out=words)
    out[...] = words.view(np.uint16)[..., _HIGH]
