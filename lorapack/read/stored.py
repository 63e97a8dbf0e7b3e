"""Factors stored in fewer bytes: from the tensors of a compact file to codes (docs/format.md).

All pairs of one store stand one after another, in the order of their names, in two tensors:
``lorapack.int4.codes`` and ``lorapack.int4.scales``, or ``lorapack.sparse.mask`` and
``lorapack.sparse.numbers``. The manifest's ``stored`` gives the shapes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorapack.core.codes import LOWEST, SPARSE, Codes, Sparse, mask_bytes, packed_bytes
from lorapack.core.names import PREFIX
from lorapack.errors import InputError

STEM = "lorapack."
TYPES = {"int8": torch.int8, "int4": torch.uint8}
BITS = torch.arange(8, dtype=torch.uint8)
Shape = tuple[int, int, int]  # rank, d_out, d_in


def unstored(
    stored: Mapping[str, Mapping[str, Shape]],
    groups: Mapping[str, list[str]],
    tensors: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Codes | Sparse]]:
    """Put float32 factors in the place of codes and scales, or of masks and numbers.

    Args:
        stored: of the manifest: store to the pairs in it, by group or module.
        groups: of the manifest.
        tensors: of the file.
        where: the file, for messages.

    Returns:
        The tensors as a compact file without stored pairs has them, and the codes by group or module.

    Raises:
        InputError: an unknown store, a tensor that is missing, of the wrong type or size, a scale or number that
            is not finite, or a pair that is there twice. Nothing is allocated before the sizes agree.
    """
    plain = {name.removeprefix(PREFIX) if name.startswith(PREFIX + STEM) else name: t for name, t in tensors.items()}
    found: dict[str, Codes | Sparse] = {}
    for store, shapes in stored.items():
        if store not in (*LOWEST, SPARSE):
            raise InputError(
                f"{where}: the store {store!r} is unknown; this lorapack reads {', '.join(LOWEST)}, {SPARSE}"
            )
        for name, shape in shapes.items():
            if min(shape) < 1:
                raise InputError(f"{where}: {name} is stored with the shape {shape}; all must be 1 or more")
            if any(name in others for other, others in stored.items() if other != store):
                raise InputError(f"{where}: {name} is stored more than once")
            for part in "AB":
                if (taken := _tensor_name(name, part, groups)) in plain:
                    raise InputError(f"{where}: {name} is stored as {store} and has the tensor {taken!r} too")
        found |= _sparse(plain, shapes, where) if store == SPARSE else _coded(plain, store, shapes, where)
    for name, pair in found.items():
        for part, values in zip("AB", pair.values(), strict=True):
            plain[_tensor_name(name, part, groups)] = values
    return plain, found


def _coded(tensors: dict[str, Tensor], store: str, shapes: Mapping[str, Shape], where: str) -> dict[str, Codes]:
    """The pairs of int8 or int4; their two tensors are taken out of `tensors`."""
    bytes_of = {name: packed_bytes(store, s[0] * (s[1] + s[2])) for name, s in shapes.items()}
    codes = _taken(tensors, f"{STEM}{store}.codes", TYPES[store], sum(bytes_of.values()), where)
    scales = _taken(tensors, f"{STEM}{store}.scales", torch.bfloat16, 2 * sum(s[0] for s in shapes.values()), where)
    _check_finite(scales, f"{STEM}{store}.scales", where)
    found = {}
    at = row = 0
    for name in sorted(shapes):
        rank, d_out, d_in = shapes[name]
        numbers = _numbers(codes[at : at + bytes_of[name]], store, rank * (d_in + d_out), f"{where}: {name}")
        a, b = numbers[: rank * d_in].reshape(rank, d_in), numbers[rank * d_in :].reshape(d_out, rank)
        found[name] = Codes(store, a, b, scales[row : row + 2 * rank].reshape(rank, 2))  # type: ignore[arg-type]
        at, row = at + bytes_of[name], row + 2 * rank
    return found


def _sparse(tensors: dict[str, Tensor], shapes: Mapping[str, Shape], where: str) -> dict[str, Sparse]:
    """The pairs of which few elements are stored; their two tensors are taken out of `tensors`."""
    elements = {name: s[0] * (s[1] + s[2]) for name, s in shapes.items()}
    bits = _taken(tensors, f"{STEM}{SPARSE}.mask", torch.uint8, sum(map(mask_bytes, elements.values())), where)
    masks = {}
    at = 0
    for name in sorted(shapes):
        raw = bits[at : at + mask_bytes(elements[name])]
        mask = (raw[:, None] >> BITS & 1).bool().reshape(-1)
        if mask[elements[name] :].any():
            raise InputError(f"{where}: {name}: the unused bits of its last byte are not zeros")
        masks[name] = mask[: elements[name]]
        at += len(raw)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    numbers = _taken(tensors, f"{STEM}{SPARSE}.numbers", torch.float32, sum(counts.values()), where)
    _check_finite(numbers, f"{STEM}{SPARSE}.numbers", where)
    parts = torch.split(numbers, list(counts.values()))
    return {name: Sparse(shapes[name], masks[name], part) for name, part in zip(counts, parts, strict=True)}


def mask_bits(mask: Tensor) -> Tensor:
    """A bool a bit, the first in the lowest bit of the first byte, unused ones 0: (n,) to (ceil(n / 8),) uint8."""
    padded = torch.cat([mask, mask.new_zeros(-mask.numel() % 8)]).to(torch.uint8).reshape(-1, 8)
    return (padded << BITS).sum(dim=1, dtype=torch.uint8)


def _check_finite(tensor: Tensor, name: str, where: str) -> None:
    if not torch.isfinite(tensor).all():
        raise InputError(f"{where}: {name} holds NaN or infinite numbers")


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
