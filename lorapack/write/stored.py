"""Factors stored in fewer bytes, as tensors and the manifest's entry: the other half of `lorapack.read.stored`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorapack.core.codes import SPARSE, Codes, Sparse
from lorapack.read.stored import STEM, mask_bits


def stored_form(pairs: Mapping[str, Codes | Sparse]) -> tuple[dict[str, dict[str, list[int]]], dict[str, Tensor]]:
    """The manifest's ``stored`` and its tensors.

    Args:
        pairs: codes by group or module.
    """
    entry: dict[str, dict[str, list[int]]] = {}
    tensors: dict[str, Tensor] = {}
    sparse = {name: found for name, found in sorted(pairs.items()) if isinstance(found, Sparse)}
    if sparse:
        entry[SPARSE] = {name: list(found.shape) for name, found in sparse.items()}
        tensors[f"{STEM}{SPARSE}.mask"] = torch.cat([mask_bits(found.mask) for found in sparse.values()])
        tensors[f"{STEM}{SPARSE}.numbers"] = torch.cat([found.numbers for found in sparse.values()])
    coded = {name: found for name, found in sorted(pairs.items()) if isinstance(found, Codes)}
    for store in sorted({codes.store for codes in coded.values()}):
        these = {name: codes for name, codes in coded.items() if codes.store == store}
        entry[store] = {n: [c.A.shape[0], c.B.shape[0], c.A.shape[1]] for n, c in these.items()}
        tensors[f"{STEM}{store}.codes"] = torch.cat([_raw(codes) for codes in these.values()])
        tensors[f"{STEM}{store}.scales"] = torch.cat([codes.scales.reshape(-1) for codes in these.values()])
    return entry, tensors


def _raw(codes: Codes) -> Tensor:
    numbers = torch.cat([codes.A.reshape(-1), codes.B.reshape(-1)])
    if codes.store == "int8":
        return numbers
    if numbers.numel() % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(1)])
    halves = (numbers + 8).to(torch.uint8).reshape(-1, 2)
    return halves[:, 0] | (halves[:, 1] << 4)
