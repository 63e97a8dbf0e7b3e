"""Cut a pair of factors to a lower rank, in one of four metrics (docs/truncation.md)."""

import torch
from torch import Tensor

from lorapack.core.adapter import Factors
from lorapack.core.linalg import orthonormal, root, triangle
from lorapack.core.plan import Metric
from lorapack.core.statistics import Moments


def atoms(
    factors: Factors, metric: Metric, moments: Moments | None = None, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite ``B @ A`` as a sum of rank-one atoms, the most important first.

    Cutting after k atoms is the best rank-k approximation in the metric:

    - ``weight``: least ||BA - B'A'||_F^2. SVD of the r x r product of both triangles of a QR.
    - ``output``: least E||(BA - B'A')x||^2. With G = E[h h^T] = L L^T, SVD of B L with B's triangle for B.
    - ``loss``: least E[(u^T (h - h'))^2] where u = dloss/dh is taken as independent of h: with
      M = E[u u^T] = R R^T, SVD of the r x r matrix R^T L.
    - ``fisher``: least expected square of what the cut does to a row's loss, to first order,
      E[(sum over the row's tokens of u^T (h - h'))^2], the Fisher matrix taken as a Kronecker
      product. As in ``loss``, with G and M that know which tokens have a large h and a large u at
      once, and that a row's tokens add up; this is few rows' noise, so it is averaged with what it
      were if they did not.

    Args:
        factors: A (r, d_in), B (d_out, r), any float dtype; computed in float64.
        metric: which error is least.
        moments: of this module, as sums or means; needed by ``output`` (forward), ``loss`` (forward
            and backward) and ``fisher``. Singular ones are handled in their range.
        most: make no more atoms than so many; all, by default.

    Returns:
        B' (d_out, n), A' (n, d_in) and every atom's share of the squared error, falling, all
        float64; with all atoms ``B' @ A'`` acts as ``B @ A`` wherever the moments have support, and
        the error of the first k is the sum of the shares from k on. n is the numerical rank, or `most`.

    Source: Eckart-Young in the metric of SVD-LLM (arXiv 2403.07378, section 3) restricted to span(A);
    for ``fisher`` the factors of Shampoo (arXiv 1802.09568) in coordinates in which neither A nor B
    plays a part.
    """
    a, b = factors.A.double(), factors.B.double()
    if metric == "weight":
        (qb, rb), (qa, ra) = orthonormal(b), orthonormal(a.T)
        u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ (u * s)[:, :most], vt[:most] @ qa.T, s**2
    assert moments is not None
    if metric == "output":
        (qb, rb), (left, left_inverse) = orthonormal(b), root(moments.forward)
        u, s, vt = torch.linalg.svd(rb @ left, full_matrices=False)
        return qb @ (u * s)[:, :most], vt[:most] @ left_inverse @ a, s**2
    (left, left_inverse), (right, right_inverse) = map(root, _sides(a, metric, moments))
    u, s, vt = torch.linalg.svd(right.T @ left, full_matrices=False)
    return b @ (right_inverse.T @ (u * s)[:, :most]), vt[:most] @ left_inverse @ a, s**2


def shares(factors: Factors, metric: Metric, moments: Moments | None = None) -> Tensor:
    """What `atoms` gives last, alone: a plan needs no vectors, and without them it is a third of the work."""
    a, b = factors.A.double(), factors.B.double()
    if metric == "weight":
        core = triangle(b) @ triangle(a.T).T
    elif metric == "output":
        assert moments is not None
        core = triangle(b) @ root(moments.forward)[0]
    else:
        assert moments is not None
        forward, backward = _sides(a, metric, moments)
        core = root(backward)[0].T @ root(forward)[0]
    found: Tensor = torch.linalg.svdvals(core) ** 2
    return found


def _sides(a: Tensor, metric: Metric, moments: Moments) -> tuple[Tensor, Tensor]:
    """The two moments, (r, r) each, whose Kronecker product is the metric: of h, and of u."""
    if metric == "loss":
        assert moments.backward is not None
        return moments.forward, moments.backward
    assert moments.row_forward is not None and moments.row_backward is not None
    assert moments.token_forward is not None and moments.token_backward is not None
    inside = a @ a.T
    of_row, of_token = (float((inside * m).sum()) or 1.0 for m in (moments.row_backward, moments.token_backward))
    forward = (moments.row_forward / of_row + moments.token_forward / of_token) / 2
    backward = (moments.row_backward / of_row + moments.token_backward / of_token) / 2
    return forward, backward * (of_row + of_token) / 2


def truncate(factors: Factors, rank: int, metric: Metric, moments: Moments | None = None) -> tuple[Factors, float]:
    """Best rank-`rank` approximation of ``B @ A`` in a metric, never forming ``B @ A``.

    Args:
        factors: A (r, d_in), B (d_out, r).
        rank: 1 to r. Where fewer atoms exist the rest is zero.
        metric, moments: as in `atoms`.

    Returns:
        Factors of that rank in the dtype they came in, A's and B's atoms scaled to equal length,
        and the squared error in the metric (for means: per token).
    """
    b, a, errors = atoms(factors, metric, moments, rank)
    error = float(errors[rank:].sum())
    if missing := rank - a.shape[0]:
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    b, a = balanced(b, a)
    return Factors(a.to(factors.A.dtype), b.to(factors.B.dtype)), error


def canonical(factors: Factors) -> Factors:
    """The same update in a basis that the update alone determines: its singular vectors, balanced.

    The atoms' signs are free, and where singular values are equal their order; nothing else is.
    """
    return truncate(factors, factors.rank, "weight")[0] if factors.kind == "linear" else factors


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Move length between b's columns and a's rows until they are equal: one dtype suits both."""
    columns, rows = b.norm(dim=0), a.norm(dim=1)
    live = (columns > 0) & (rows > 0)
    ratio = torch.where(live, (rows / columns.clamp_min(1e-300)).sqrt(), torch.ones_like(rows))
    ratio = torch.where(live, ratio, torch.ones_like(ratio))
    return b * ratio, a / ratio[:, None]
