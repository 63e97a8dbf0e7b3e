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


def accumulator(dtype: str, stored: str, adding: bool) -> Any:
    """What numbers are held in between: float64 for a sum and for wide types, float32 for mere changes of type."""
    narrow_enough = {dtype, stored} <= {"BF16", "F16"} or (stored == "F32" and dtype in ("BF16", "F16"))
    return np.dtype("<f4") if narrow_enough and not adding else np.dtype("<f8")


def widen(raw: Array, dtype: str, out: Array, spare: Array) -> None:
    """Numbers as stored (`STORED`) into a float32 or float64 array of the same shape; `spare`: uint32, overwritten."""
    if dtype != "BF16":
        np.copyto(out, raw, casting="same_kind")
        return
    np.copyto(spare, raw)
    np.left_shift(spare, 16, out=spare)
    np.copyto(out, spare.view(np.float32))


def narrow(values: Array, dtype: str, out: Array, spare: Array) -> None:
    """Floats rounded once into an array as stored.

    Args:
        values: float32 or float64, contiguous.
        dtype: of `STORED`.
        out: the same shape.
        spare: uint32, the same shape, overwritten.

    Raises:
        FloatingPointError: a number that the type cannot hold.
    """
    with np.errstate(over="raise"):
        np.copyto(spare.view(np.float32) if dtype == "BF16" else out, values, casting="same_kind")
    if dtype != "BF16":
        return
    np.add(spare, 0x8000, out=spare)  # the upper half is now rounded, from the middle always up
    np.copyto(out, spare, casting="unsafe")  # the lower half: 0 for what was on the middle
    middle = np.flatnonzero(out == 0)  # one number in 65,536
    if middle.size:
        _down(spare.reshape(-1), values.reshape(-1), middle)
    np.right_shift(spare, 16, out=spare)
    np.copyto(out, spare, casting="unsafe")


def _down(words: Array, values: Array, middle: Array) -> None:
    """Of numbers that went up from the middle of two bfloat16 ones, take back those that had to go down.

    They were rounded to float32 before, so the middle may not be where they were: the side they came from decides,
    and between two equally near ones the even one. Rounding the float32 alone would be rounding twice.

    Args:
        words: the bits in float32, 0x8000 added; changed.
        values: the numbers.
        middle: which of them.
    """
    risen = words[middle]
    there, exact = np.abs((risen - 0x8000).view(np.float32)), np.abs(values[middle])
    odd = (risen >> 16) & 1 == 1
    words[middle] = risen - ((exact < there) | ((exact == there) & odd))
