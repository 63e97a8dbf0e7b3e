"""Factors in fewer bytes: whole numbers times one scale an atom, or few elements (docs/store.md)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

Store = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Coded = Literal["int8", "int4"]
STORES: tuple[str, ...] = get_args(Store)
LOWEST: dict[str, int] = {"int8": -128, "int4": -8}  # codes reach from here to one less on the other side
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_BYTES = 4  # an atom: two bfloat16
SPARSE = "sparse"  # not one of STORES: a method makes it, no rounding does


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


@dataclass(frozen=True, eq=False)
class Sparse:
    """A pair of factors most of whose elements are zero, as it is stored: which are not, a bit each, and those.

    Attributes:
        shape: (rank, d_out, d_in).
        mask: (rank * (d_in + d_out),) bool, A row by row and then B row by row.
        numbers: float32, one for each element of the mask that is true, in its order.
    """

    shape: tuple[int, int, int]
    mask: Tensor
    numbers: Tensor
    store: ClassVar[str] = SPARSE

    @property
    def nbytes(self) -> int:
        return mask_bytes(self.mask.numel()) + 4 * self.numbers.numel()

    @property
    def parameters(self) -> int:
        """The numbers, and the mask as numbers of 32 bits."""
        return sparse_parameters(self.numbers.numel(), self.mask.numel())

    def values(self) -> tuple[Tensor, Tensor]:
        """A and B in float32."""
        rank, d_out, d_in = self.shape
        whole = torch.zeros(self.mask.numel())
        whole[self.mask] = self.numbers
        return whole[: rank * d_in].reshape(rank, d_in), whole[rank * d_in :].reshape(d_out, rank)


def mask_bytes(elements: int) -> int:
    """The bytes of a bit for each element of a pair."""
    return -(-elements // 8)


def sparse_parameters(kept: int, elements: int) -> int:
    """What so many elements of a pair's count for: themselves, and a bit for every element, in numbers of 32 bits."""
    return kept + -(-elements // 32)


def packed_bytes(store: str, codes: int) -> int:
    """The bytes of so many codes of one pair."""
    return codes if store == "int8" else -(-codes // 2)


def bytes_of_atom(store: Store, length: int) -> int:
    """The most bytes that a rank-one atom of ``length = d_in + d_out`` numbers takes."""
    if store in DTYPES:
        return length * DTYPES[store].itemsize
    return packed_bytes(store, length) + SCALE_BYTES
