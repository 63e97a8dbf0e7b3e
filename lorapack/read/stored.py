"""Factors stored in few bits: from the tensors of a compact file to codes (docs/format.md).

All pairs of one store stand one after another, in the order of their names, in two tensors:
``lorapack.int4.codes`` and ``lorapack.int4.scales``. The manifest's ``stored`` gives the shapes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorapack.core.codes import LOWEST, Codes, packed_bytes
from lorapack.core.names import PREFIX
from lorapack.errors import InputError

STEM = "lorapack."
TYPES = {"int8": torch.int8, "int4": torch.uint8}
Shape = tuple[int, int, int]  # rank, d_out, d_in


def unstored(
    stored: Mapping[str, Mapping[str, Shape]],
    groups: Mapping[str, list[str]],
    tensors: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Codes]]:
    """Put float32 factors in the place of codes and scales.

    Args:
        stored: of the manifest: store to the pairs in it, by group or module.
        groups: of the manifest.
        tensors: of the file.
        where: the file, for messages.

    Returns:
        The tensors as a compact file without stored pairs has them, and the codes by group or module.

    Raises:
        InputError: an unknown store, a tensor that is missing, of the wrong type or size, a scale that is
            not finite, or a pair that is there twice. Nothing is allocated before the sizes agree.
    """
    plain = {name.removeprefix(PREFIX) if name.startswith(PREFIX + STEM) else name: t for name, t in tensors.items()}
    found: dict[str, Codes] = {}
    for store, shapes in stored.items():
        if store not in LOWEST:
            raise InputError(f"{where}: the store {store!r} is unknown; this lorapack reads {', '.join(LOWEST)}")
        for name, shape in shapes.items():
            if min(shape) < 1:
                raise InputError(f"{where}: {name} is stored with the shape {shape}; all must be 1 or more")
            if name in found:
                raise InputError(f"{where}: {name} is stored more than once")
            for part in "AB":
                if (taken := _tensor_name(name, part, groups)) in plain:
                    raise InputError(f"{where}: {name} is stored as {store} and has the tensor {taken!r} too")
            found[name] = Codes(store, torch.empty(0), torch.empty(0), torch.empty(0))  # type: ignore[arg-type]
        bytes_of = {name: packed_bytes(store, s[0] * (s[1] + s[2])) for name, s in shapes.items()}
        codes = _taken(plain, f"{STEM}{store}.codes", TYPES[store], sum(bytes_of.values()), where)
        scales = _taken(plain, f"{STEM}{store}.scales", torch.bfloat16, 2 * sum(s[0] for s in shapes.values()), where)
        if not torch.isfinite(scales).all():
            raise InputError(f"{where}: {STEM}{store}.scales holds NaN or infinite numbers")
        at = row = 0
        for name in sorted(shapes):
            rank, d_out, d_in = shapes[name]
            numbers = _numbers(codes[at : at + bytes_of[name]], store, rank * (d_in + d_out), f"{where}: {name}")
            a, b = numbers[: rank * d_in].reshape(rank, d_in), numbers[rank * d_in :].reshape(d_out, rank)
            found[name] = Codes(store, a, b, scales[row : row + 2 * rank].reshape(rank, 2))  # type: ignore[arg-type]
            at, row = at + bytes_of[name], row + 2 * rank
    for name, pair in found.items():
        for part, values in zip("AB", pair.values(), strict=True):
            plain[_tensor_name(name, part, groups)] = values
    return plain, found


def _tensor_name(name: str, part: str, groups: Mapping[str, list[str]]) -> str:
    return f"{STEM}{name}.{part}" if name in groups else f"{PREFIX}{name}.lora_{part}.weight"


def _taken(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, length: int, where: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"{where}: the tensor {name!r} is missing")
    tensor = tensors.pop(name)
    if tensor.dtype != dtype or tuple(tensor.shape) != (length,):
        raise InputError(
            f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"the manifest wants {dtype} of shape ({length},)"
        )
    return tensor


def _numbers(raw: Tensor, store: str, count: int, where: str) -> Tensor:
    """The codes of one pair, int8."""
    if store == "int4":  # two a byte, the first in the low half, each with 8 added
        raw = torch.stack([raw & 15, raw >> 4], dim=1).reshape(-1).to(torch.int8) - 8
        if raw[count:].any():
            raise InputError(f"{where}: the unused half of its last byte is not a zero")
    return raw[:count]
