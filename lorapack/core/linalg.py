"""Square roots of second moments, and low-rank factorisations that never form a d x d matrix."""

import torch
from torch import Tensor

FLOOR = 1e-12  # eigenvalues below this share of the largest are taken as zero
STEEP = 1e4  # condition in the Frobenius norm: its square times float64's rounding is still below float32's


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


def orthonormal(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR of a (d, n) float64 matrix: Q, (d, k), and R, (k, n) upper triangular, with k = min(d, n).

    Where the columns are far from dependent, R is the Cholesky factor of the n x n Gram matrix and Q is
    ``tall @ R^-1``: matrix products where Householder's way goes column by column. It is exact to a rounding
    times the square of the condition, so `STEEP` is where it ends; Householder's way does the others.
    """
    found = _by_gram(tall)
    if found is None:
        q, r = torch.linalg.qr(tall)
        return q, r
    r, inverse = found
    return tall @ inverse, r


def triangle(tall: Tensor) -> Tensor:
    """R alone of `orthonormal`, (min(d, n), n)."""
    found = _by_gram(tall)
    r: Tensor = torch.linalg.qr(tall, mode="r").R if found is None else found[0]
    return r


def _by_gram(tall: Tensor) -> tuple[Tensor, Tensor] | None:
    """The triangle and its inverse, (n, n) each; None where the columns are dependent, or nearly."""
    r, failed = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return (r, inverse) if r.norm() * inverse.norm() < STEEP else None


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Those of ``B @ A``, falling, (min(r, d_out, d_in),) float64: of the small product of both triangles.

    Args:
        b: (d_out, r), any float dtype.
        a: (r, d_in).
    """
    found: Tensor = torch.linalg.svdvals(triangle(b.double()) @ triangle(a.double().T).T)
    return found
