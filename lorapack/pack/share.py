"""One adapter for several layers, in closed form (docs/sharing.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapack.core.adapter import Factors
from lorapack.core.linalg import basis, root
from lorapack.pack.truncate import balanced

SWEEPS = 100


@dataclass(frozen=True, eq=False)
class Member:
    """A layer that will share.

    Attributes:
        factors: A (r, d_in), B (d_out, r).
        scale: its update is ``scale * B @ A``.
        inputs: (q, q) float64, E[y y^T] of ``y = Q x``, its inputs in the group's basis `Q`.
    """

    factors: Factors
    scale: float
    inputs: Tensor


@dataclass(frozen=True, eq=False)
class Shared:
    """The common factors, each member's scale, and the expected squared error after each sweep."""

    factors: Factors
    scales: tuple[float, ...]
    errors: tuple[float, ...]


def input_basis(group: Sequence[Factors]) -> Tensor:
    """Q: orthonormal rows that span all of the group's A, (q, d_in) float64 with q <= sum of ranks."""
    return basis(torch.cat([f.A.double() for f in group]).T).T


def share(members: Sequence[Member], q: Tensor, rank: int) -> Shared:
    """The shared factors and scales with the least sum of E||(W_l - c_l W_s) x||^2 over the members.

    Alternates two exact steps, so the error never rises: for fixed scales c_l, with
    ``C = sum c_l^2 C_l`` and ``P = sum c_l W_l C_l``, ``W_s = [P C^-1/2]_rank C^-1/2``; for a fixed
    W_s, ``c_l = tr(W_l C_l W_s^T) / tr(W_s C_l W_s^T)``. All in the coordinates of `q` and of an
    orthonormal basis of the stacked B, so nothing of size d x d is formed. It ends in a local
    minimum: the better one of two starts, all scales 1 and the layers' common direction.

    Args:
        members: layers of equal shape, at least one.
        q: their `input_basis`, (q, d_in).
        rank: of the shared factors.

    Returns:
        `Shared`; its scales are normalised to a mean square of 1 (all 0 for all-zero layers).
    """
    outputs = basis(torch.cat([m.factors.B.double() for m in members], dim=1))
    cores = [m.scale * (outputs.T @ m.factors.B.double()) @ (m.factors.A.double() @ q.T) for m in members]
    moments = [m.inputs for m in members]
    weighted = [w @ c for w, c in zip(cores, moments, strict=True)]
    energy = sum(float((w * wc).sum()) for w, wc in zip(cores, weighted, strict=True))

    def solve(scales: list[float]) -> tuple[Tensor, Tensor]:
        pooled = sum((s * s * c for s, c in zip(scales, moments, strict=True)), torch.zeros_like(moments[0]))
        target = sum((s * wc for s, wc in zip(scales, weighted, strict=True)), torch.zeros_like(weighted[0]))
        _, inverse = root(pooled)
        u, s, vt = torch.linalg.svd(target @ inverse.T, full_matrices=False)
        return (u * s)[:, :rank], (vt @ inverse)[:rank]

    def rescale(common: Tensor) -> list[float]:
        found = []
        for wc, c in zip(weighted, moments, strict=True):
            length = float(((common @ c) * common).sum())
            found.append(float((wc * common).sum()) / length if length > 0 else 0.0)
        return found

    def error(common: Tensor, scales: list[float]) -> float:
        gained = 0.0
        for s, wc, c in zip(scales, weighted, moments, strict=True):
            gained += 2 * s * float((wc * common).sum()) - s * s * float(((common @ c) * common).sum())
        return energy - gained

    def alternate(scales: list[float]) -> tuple[Tensor, Tensor, list[float], list[float]]:
        b, a = solve(scales)
        errors = [error(b @ a, scales)]
        for _ in range(SWEEPS):
            scales = rescale(b @ a)
            if not any(scales):
                break
            b, a = solve(scales)
            errors.append(error(b @ a, scales))
            if errors[-2] - errors[-1] <= 1e-9 * energy:
                break
        return b, a, scales, errors

    starts = [[1.0] * len(members), _common_direction(cores, moments)]
    b, a, scales, errors = min((alternate(start) for start in starts), key=lambda found: found[3][-1])
    mean_square = sum(s * s for s in scales) / len(scales)
    if mean_square > 0:
        unit = mean_square**0.5
        scales, b = [s / unit for s in scales], b * unit
    b, a = outputs @ b, a @ q
    if missing := rank - a.shape[0]:
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    b, a = balanced(b, a)
    like = members[0].factors
    return Shared(Factors(a.to(like.A.dtype), b.to(like.B.dtype)), tuple(scales), tuple(errors))


def _common_direction(cores: Sequence[Tensor], moments: Sequence[Tensor]) -> list[float]:
    """The scales that are best where all layers see the same inputs and the rank is not bounded.

    Layers that are multiples of each other, opposite ones too, are met exactly.
    """
    pooled = sum(moments, torch.zeros_like(moments[0]))
    weighted = [core @ pooled for core in cores]
    gram = torch.stack([torch.stack([(wc * w).sum() for w in cores]) for wc in weighted])
    top: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -1]
    found: list[float] = (top if top.sum() >= 0 else -top).tolist()
    return found
