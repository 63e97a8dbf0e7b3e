"""Factors in few bits: whole numbers times one scale an atom (docs/store.md)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Store = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Coded = Literal["int8", "int4"]
STORES: tuple[str, ...] = get_args(Store)
LOWEST: dict[str, int] = {"int8": -128, "int4": -8}  # codes reach from here to one less on the other side
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_BYTES = 4  # an atom: two bfloat16


@dataclass(frozen=True, eq=False)
class Codes:
    """A pair of factors as it is stored; atom i is row i of A and column i of B.

    Attributes:
        store: ``int8`` or ``int4``.
        A: (rank, d_in) int8, from `LOWEST` on.
        B: (d_out, rank) int8, likewise.
        scales: (rank, 2) bfloat16: of A's rows and of B's columns. A negative one turns the longer side of
            the codes to the positive numbers.
    """

    store: Coded
    A: Tensor
    B: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Of codes and scales; int4 holds two codes a byte."""
        return packed_bytes(self.store, self.A.numel() + self.B.numel()) + self.scales.numel() * 2

    def values(self) -> tuple[Tensor, Tensor]:
        """A and B in float32. Exact: eight bits of a code times eight of a scale."""
        scales = self.scales.float()
        return self.A.float() * scales[:, :1], self.B.float() * scales[:, 1]


def packed_bytes(store: str, codes: int) -> int:
    """The bytes of so many codes of one pair."""
    return codes if store == "int8" else -(-codes // 2)


def bytes_of_atom(store: Store, length: int) -> int:
    """The most bytes that a rank-one atom of ``length = d_in + d_out`` numbers takes."""
    if store in DTYPES:
        return length * DTYPES[store].itemsize
    return packed_bytes(store, length) + SCALE_BYTES
