"""Square roots of second moments, and low-rank factorisations that never form a d x d matrix."""

import torch
from torch import Tensor

FLOOR = 1e-12  # eigenvalues below this share of the largest are taken as zero


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric non-negative matrix and its pseudo-inverse, in the matrix's range.

    Args:
        moment: (n, n) float64, possibly singular.

    Returns:
        S with ``S S^T = moment`` up to `FLOOR`, (n, k), and its pseudo-inverse, (k, n), where k is
        the numerical rank (0 for a zero matrix).
    """
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    live = values > values[-1:].clamp_min(0) * FLOOR
    values, vectors = values[live], vectors[:, live]
    return vectors * values.sqrt(), (vectors * values.rsqrt()).T


def basis(columns: Tensor) -> Tensor:
    """Orthonormal basis of the column space of a (d, n) matrix: (d, k) with k its numerical rank."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    live: Tensor = u[:, s > s[:1] * FLOOR]
    return live


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Those of ``B @ A``, falling, (min(r, d_out, d_in),) float64: of the small product of both triangles of a QR.

    Args:
        b: (d_out, r), any float dtype.
        a: (r, d_in).
    """
    left = torch.linalg.qr(b.double(), mode="r").R
    right = torch.linalg.qr(a.double().T, mode="r").R
    found: Tensor = torch.linalg.svdvals(left @ right.T)
    return found
