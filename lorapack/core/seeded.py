"""Factors that are made from a seed instead of being stored (docs/format.md, "Seeded factors").

The recipe is integer arithmetic modulo 2^64 on the seed and an entry's place, so it gives the same
bits with every version of every library, and an entry does not depend on the size of its matrix: a
module with fewer inputs or outputs has a slice of the larger one's factors. The entries are odd
multiples of 1/256 between -1 and 1, which float32, bfloat16 and float16 all hold exactly.
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the increment and the two multipliers of SplitMix64
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MOST = 2**31  # numbers a pair may have: a file that asks for more is damaged
SEEDS = 2**63


def seeded(seed: int, rank: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank) of a seed.

    With ``mix`` the output function of SplitMix64 (Steele, Lea and Flood, 2014) and all sums modulo 2^64,

        key(m)   = mix(seed + (m + 1) GOLDEN)                   m = 0 for A, 1 for B
        A[i, j]  = entry(mix(mix(key(0) + (i + 1) GOLDEN) + (j + 1) GOLDEN))
        B[o, i]  = entry(mix(mix(key(1) + (i + 1) GOLDEN) + (o + 1) GOLDEN))
        entry(z) = (2 (z >> 56) - 255) / 256

    Args:
        seed: 0 to 2^63 - 1.
        rank: of the pair.
        shape: (d_out, d_in).
        dtype: of the result; float32, bfloat16 and float16 hold the entries exactly.
    """
    d_out, d_in = shape
    return _table(seed, 0, rank, d_in, dtype), _table(seed, 1, rank, d_out, dtype).T.contiguous()


def _table(seed: int, matrix: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    key = _mix(np.array([(seed + (matrix + 1) * GOLDEN) % 2**64], dtype=np.uint64))
    of_row = _mix(key + _steps(rows))
    mixed = _mix(of_row[:, None] + _steps(columns)[None, :])
    odd = (mixed >> np.uint64(56)).astype(np.float32) * 2 - 255
    return torch.from_numpy(odd / 256).to(dtype)


def _steps(count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # wraps around, as it should


def _mix(z: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))
