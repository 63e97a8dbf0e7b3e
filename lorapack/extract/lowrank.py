"""The best low-rank pair for a matrix, by randomised singular value decomposition."""

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING, ITERATIONS = 10, 2
FIRST = 32  # rank of the first try where an error is asked for


@dataclass(frozen=True, eq=False)
class LowRank:
    """A of shape (rank, d_in) and B (d_out, rank), both float64, with B @ A the approximation.

    Attributes:
        error: ‖matrix - B @ A‖ / ‖matrix‖, in the Frobenius norm.
    """

    A: Tensor
    B: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def of_rank(matrix: Tensor, rank: int, seed: int = 0) -> LowRank:
    """The best pair of a rank, or of the matrix's own where that is lower.

    Args:
        matrix: (d_out, d_in) float64, not zero.
        rank: ≥ 1.
        seed: of the sketch.
    """
    u, s, v = _svd(matrix, rank + OVERSAMPLING, seed)
    return _pair(matrix, u, s, v, min(rank, _support(s)))


def of_error(matrix: Tensor, error: float, seed: int = 0) -> LowRank:
    """The pair of the smallest rank whose relative error is at most `error`.

    The sketch is doubled until it holds enough of the matrix.

    Args:
        matrix: (d_out, d_in) float64, not zero.
        error: 0 < error < 1.
        seed: of the sketch.
    """
    total = matrix.square().sum()
    size = FIRST
    while True:
        u, s, v = _svd(matrix, size, seed)
        left = (total - s.square().cumsum(0)).clamp_min(0).sqrt() / total.sqrt()
        enough = (left <= error).nonzero()
        if len(enough) or len(s) == min(matrix.shape):
            rank = int(enough[0]) + 1 if len(enough) else len(s)
            return _pair(matrix, u, s, v, min(rank, _support(s)))
        size *= 2


def _svd(matrix: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `size` largest singular triplets: U (d_out, size), values, V (d_in, size); all of them where that is cheaper.

    Source: Halko, Martinsson, Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    if 2 * size >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh.T
    generator = torch.Generator(matrix.device).manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], size, dtype=matrix.dtype, device=matrix.device, generator=generator)
    q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    small, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ small, s, vh.T


def _support(values: Tensor) -> int:
    """How many singular values are more than the rounding of the largest."""
    return max(1, int((values > values[0] * 1e-14).sum()))


def _pair(matrix: Tensor, u: Tensor, s: Tensor, v: Tensor, rank: int) -> LowRank:
    """The first triplets, their values shared evenly between A and B."""
    roots = s[:rank].sqrt()
    a, b = (v[:, :rank] * roots).T.contiguous(), (u[:, :rank] * roots).contiguous()
    left = (matrix.square().sum() - s[:rank].square().sum()).clamp_min(0)
    return LowRank(a, b, float((left / matrix.square().sum()).sqrt()))
