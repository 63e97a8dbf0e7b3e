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
        spare: uint32, two arrays of the same shape, overwritten.

    Raises:
        FloatingPointError: a number that the type cannot hold.
    """
    if dtype != "BF16":
        with np.errstate(over="raise"):
            np.copyto(out, values, casting="same_kind")
        return
    spare, words = spare
    with np.errstate(over="raise"):
        np.copyto(words.view(np.float32), values, casting="same_kind")
    if values.dtype == np.float64:
        _off_the_middle(words, values, spare)
    np.right_shift(words, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(words, spare, out=words)
    np.right_shift(words, 16, out=words)
    np.copyto(out, words, casting="unsafe")


def _off_the_middle(words: Array, values: Array, spare: Array) -> None:
    """Where rounding to float32 fell on the middle of two bfloat16 numbers, go back to the side it came from.

    Without this the second rounding would not know that side: the result would be rounded twice.

    Args:
        words: the bits of `values` in float32, changed.
        values: float64.
        spare: overwritten.
    """
    np.bitwise_and(words, 0xFFFF, out=spare)
    middle = np.flatnonzero(spare == 0x8000)  # one number in 65,536
    if middle.size:
        flat = words.reshape(-1)
        there, exact = np.abs(flat[middle].view(np.float32)), np.abs(values.reshape(-1)[middle])
        flat[middle] += (exact > there).astype(np.uint32) - (exact < there).astype(np.uint32)
