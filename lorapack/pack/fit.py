"""Shared factors with a core and an output vector in every layer, by alternating least squares (docs/sharing.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorapack.core.adapter import Factors, Pointer
from lorapack.core.linalg import FLOOR, basis, root
from lorapack.core.sharing import CORES, OUTPUTS, Sharing
from lorapack.pack.share import Member, share
from lorapack.pack.truncate import balanced

SWEEPS = 200
ENOUGH = 1e-5  # of the energy: a sweep that gains less is the last
SAFE = 1e-4  # of the largest pivot: below it a system is solved in its range
INNER = 30  # steps of conjugate gradients for A


@dataclass(frozen=True, eq=False)
class Fitted:
    """The common factors, what each layer has of its own, and the expected squared error after each step.

    Attributes:
        factors: A (rank, d_in), B (d_out, rank).
        scales: one number a member.
        cores: (rank,) or (rank, rank) each.
        outputs: (d_out,) each, or None.
        errors: after every step of the alternation, falling.
    """

    factors: Factors
    scales: tuple[float, ...]
    cores: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] | None
    errors: tuple[float, ...]

    def pointer(self, group: str, number: int) -> Pointer:
        """What a member points to the factors with."""
        output = None if self.outputs is None else self.outputs[number]
        return Pointer(group, self.scales[number], self.cores[number], output)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A member in the coordinates that are worked in: its update is ``b @ a`` and C its inputs' moment."""

    b: Tensor
    a: Tensor
    moment: Tensor
    seen: Tensor  # a @ C


@dataclass(frozen=True, eq=False)
class _State:
    b: Tensor  # (p, k)
    a: Tensor  # (k, q)
    cores: tuple[Tensor, ...]  # (k,) or (k, k)
    outputs: tuple[Tensor, ...] | None  # (p,)

    def inner(self, number: int) -> Tensor:
        """K A of a layer, (k, q)."""
        return _times(self.cores[number], self.a)

    def outer(self, number: int) -> Tensor:
        """diag(v) B of a layer, (p, k)."""
        return self.b if self.outputs is None else self.outputs[number][:, None] * self.b


def fit(members: Sequence[Member], q: Tensor, rank: int, sharing: Sharing) -> Fitted:
    """B and A, a core K_l for each layer, and with ``tied`` v_l: a small sum of E||(W_l - diag(v_l) B K_l A) x||^2.

    Alternates steps none of which raises the error: v_l, K_l and B by their normal equations, A by
    conjugate gradients from where it is (exact in one step where all layers see the same inputs).
    It ends in a local minimum: the best of those reached from `share`, which has the same rank and a scale
    for each layer and is therefore never better, from the dominant subspaces, and from the largest
    atoms of single layers.

    Args:
        members: layers of equal shape, at least one.
        q: their `input_basis`, (q, d_in).
        rank: of the shared factors.
        sharing: ``diagonal``, ``core`` or ``tied``.
    """
    with_outputs = sharing in OUTPUTS
    outputs = None if with_outputs else basis(torch.cat([m.factors.B.double() for m in members], dim=1))
    layers = [_layer(m, q, outputs) for m in members]
    energy = sum(_energy(layer) for layer in layers)
    found = [
        _alternate(layers, start, sharing, energy, SWEEPS // 10)
        for start in _starts(members, layers, q, rank, outputs, sharing)
    ]
    state, first = min(found, key=lambda reached: reached[1][-1])
    state, errors = _alternate(layers, state, sharing, energy, SWEEPS)
    state = _normal(state, full=CORES[sharing] == "full")
    b, a = state.b if outputs is None else outputs @ state.b, state.a @ q
    dtype = members[0].factors.A.dtype
    return Fitted(
        Factors(a.to(dtype), b.to(members[0].factors.B.dtype)),
        (1.0,) * len(members),
        tuple(core.to(dtype) for core in state.cores),
        None if state.outputs is None else tuple(v.to(dtype) for v in state.outputs),
        (*first, *errors),
    )


def fit_frozen(member: Member, q: Tensor, factors: Factors) -> Fitted:
    """d and v with a small E||(W - s diag(v) B diag(d) A) x||^2 for factors that are given, as VeRA has them.

    Alternates exact least squares for d and for v, from all v equal and from all d equal, and takes the
    better end. v and d come out with a mean square of 1, the scale holds their size.

    Args:
        member: the layer.
        q: orthonormal rows that span its A and the given A, (q, d_in).
        factors: A (rank, d_in), B (d_out, rank).

    Source: the form is VeRA's (arXiv 2310.11454), equation 2.
    """
    layers = [_layer(member, q, None)]
    energy = _energy(layers[0])
    b, a = factors.B.double(), factors.A.double() @ q.T
    start = _State(b, a, (torch.ones_like(b[0]),), (torch.ones_like(b[:, 0]),))
    found = [
        _alternate(layers, first(layers, start), "vera", energy, SWEEPS // 10)
        for first in (lambda ls, s: _solve_cores(ls, s, full=False), _solve_outputs)
    ]
    state, first_errors = min(found, key=lambda reached: reached[1][-1])
    state, errors = _alternate(layers, state, "vera", energy, SWEEPS)
    assert state.outputs is not None
    core, vector, scale = state.cores[0], state.outputs[0], 1.0
    sizes = [float(t.square().mean().sqrt()) for t in (core, vector)]
    if all(sizes):
        core, vector, scale = core / sizes[0], vector / sizes[1], sizes[0] * sizes[1]
    dtype = member.factors.A.dtype
    return Fitted(factors, (scale,), (core.to(dtype),), (vector.to(dtype),), (*first_errors, *errors))


def _layer(member: Member, q: Tensor, outputs: Tensor | None) -> _Layer:
    b = member.factors.B.double()
    a = member.scale * (member.factors.A.double() @ q.T)
    return _Layer(b if outputs is None else outputs.T @ b, a, member.inputs, a @ member.inputs)


def _energy(layer: _Layer) -> float:
    return float(((layer.b.T @ layer.b) * (layer.seen @ layer.a.T)).sum())


def _times(core: Tensor, a: Tensor) -> Tensor:
    return core[:, None] * a if core.ndim == 1 else core @ a


def _error(layers: Sequence[_Layer], state: _State) -> float:
    total = 0.0
    for number, layer in enumerate(layers):
        inner, outer = state.inner(number), state.outer(number)
        cross = layer.b.T @ outer @ inner
        own = (outer.T @ outer) * (inner @ layer.moment @ inner.T)
        total += _energy(layer) - 2 * float((layer.seen * cross).sum()) + float(own.sum())
    return total


def _alternate(
    layers: Sequence[_Layer], state: _State, sharing: Sharing, energy: float, sweeps: int
) -> tuple[_State, list[float]]:
    full, frozen = CORES[sharing] == "full", sharing == "vera"
    errors = [_error(layers, state)]
    for _ in range(sweeps):
        before = errors[-1]
        if state.outputs is not None:
            state = _solve_outputs(layers, state)
            errors.append(_error(layers, state))
        state = _solve_cores(layers, state, full)
        errors.append(_error(layers, state))
        if not frozen:
            state = _solve_b(layers, state)
            errors.append(_error(layers, state))
            state = _solve_a(layers, state)
            errors.append(_error(layers, state))
        if before - errors[-1] <= ENOUGH * energy:
            break
    return state, errors


def _solve_outputs(layers: Sequence[_Layer], state: _State) -> _State:
    """The best output vectors: one number for each row of each layer."""
    found = []
    for number, layer in enumerate(layers):
        inner = state.inner(number)
        along = ((layer.b @ (layer.seen @ inner.T)) * state.b).sum(1)
        length = ((state.b @ (inner @ layer.moment @ inner.T)) * state.b).sum(1)
        live = length > FLOOR * length.max().clamp_min(1e-300)
        found.append(torch.where(live, along / length.clamp_min(1e-300), torch.zeros_like(along)))
    return replace(state, outputs=tuple(found))


def _solve_cores(layers: Sequence[_Layer], state: _State, full: bool) -> _State:
    """The best core of each layer: B and A give its normal equations."""
    found = []
    for number, layer in enumerate(layers):
        outer = state.outer(number)
        left, right = outer.T @ outer, state.a @ layer.moment @ state.a.T
        target = (outer.T @ layer.b) @ (layer.seen @ state.a.T)
        found.append(
            _solve(right, _solve(left, target).mT).mT
            if full
            else _solve(left * right, target.diagonal()[:, None])[:, 0]
        )
    return replace(state, cores=tuple(found))


def _solve_b(layers: Sequence[_Layer], state: _State) -> _State:
    """The best B: a system of size rank, one for each row where the rows have weights of their own."""
    k = state.b.shape[1]
    grams, targets = [], []
    for number, layer in enumerate(layers):
        inner = state.inner(number)
        grams.append(inner @ layer.moment @ inner.T)
        targets.append(layer.b @ (layer.seen @ inner.T))
    if state.outputs is None:
        gram = sum(grams, torch.zeros(k, k, dtype=torch.float64))
        return replace(state, b=_solve(gram, sum(targets, torch.zeros_like(state.b)).mT).mT)
    weights = torch.stack(state.outputs)  # (layers, p)
    gram = torch.einsum("lp,lij->pij", weights**2, torch.stack(grams))
    target = (weights[:, :, None] * torch.stack(targets)).sum(0)
    return replace(state, b=_solve(gram, target[:, :, None])[:, :, 0])


def _solve_a(layers: Sequence[_Layer], state: _State) -> _State:
    """A nearer to its best, which solves ``sum_l M_l A C_l = sum_l G_l^T W_l C_l`` with G = diag(v) B K, M = G^T G.

    Conjugate gradients, preconditioned by what the sum would be if all layers saw the mean input.
    """
    outers = []
    for number in range(len(layers)):
        core, outer = state.cores[number], state.outer(number)
        outers.append(outer * core if core.ndim == 1 else outer @ core)
    lefts = [g.T @ g for g in outers]
    target = sum(
        ((g.T @ layer.b) @ layer.seen for g, layer in zip(outers, layers, strict=True)), torch.zeros_like(state.a)
    )

    def apply(a: Tensor) -> Tensor:
        made = (left @ a @ layer.moment for left, layer in zip(lefts, layers, strict=True))
        return sum(made, torch.zeros_like(a))

    left = _pinv(sum(lefts, torch.zeros_like(lefts[0])))
    right = _pinv(sum((layer.moment for layer in layers), torch.zeros_like(layers[0].moment)) / len(layers))
    a = state.a
    rest = target - apply(a)
    direction = step = left @ rest @ right
    size = whole = float((rest * step).sum())
    for _ in range(INNER):
        if size <= FLOOR * whole or size <= 0:
            break
        image = apply(direction)
        curve = float((direction * image).sum())
        if curve <= 0:
            break
        a = a + size / curve * direction
        rest = rest - size / curve * image
        step = left @ rest @ right
        size, last = float((rest * step).sum()), size
        direction = step + size / last * direction
    return replace(state, a=a)


def _starts(
    members: Sequence[Member],
    layers: Sequence[_Layer],
    q: Tensor,
    rank: int,
    outputs: Tensor | None,
    sharing: Sharing,
) -> list[_State]:
    """Where to begin: the best with a scale alone, the dominant subspaces, the largest atoms of single layers."""
    full = CORES[sharing] == "full"
    exact = [replace(m, factors=Factors(m.factors.A.double(), m.factors.B.double())) for m in members]
    scaled = share(exact, q, rank)
    ones = None if outputs is not None else tuple(torch.ones_like(layer.b[:, 0]) for layer in layers)
    b, a = scaled.factors.B, scaled.factors.A @ q.T
    b = b if outputs is None else outputs.T @ b
    unit = torch.eye(rank, dtype=torch.float64) if full else torch.ones(rank, dtype=torch.float64)
    starts = [_State(b, a, tuple(s * unit for s in scaled.scales), ones)]
    pairs = [_dominant(layers, rank), _atoms(layers, rank)]
    for b, a in pairs:
        empty = _State(b, a, tuple(torch.zeros_like(unit) for _ in layers), ones)
        starts.append(_solve_cores(layers, empty, full))
    return starts


def _dominant(layers: Sequence[_Layer], rank: int) -> tuple[Tensor, Tensor]:
    """The output and the input directions with the most energy over all layers, as HOSVD begins."""
    mean = sum((layer.moment for layer in layers), torch.zeros_like(layers[0].moment)) / len(layers)
    square, inverse = root(mean)
    wide = torch.cat([layer.b @ root(layer.seen @ layer.a.T)[0] for layer in layers], dim=1)
    tall = torch.cat([torch.linalg.qr(layer.b).R @ layer.a @ square for layer in layers])
    b = torch.linalg.svd(wide, full_matrices=False)[0][:, :rank]
    a = torch.linalg.svd(tall, full_matrices=False)[2][:rank] @ inverse
    return _filled(b, a, rank)


def _atoms(layers: Sequence[_Layer], rank: int) -> tuple[Tensor, Tensor]:
    """The largest rank-one atoms of the layers, each as if the layer were alone."""
    found: list[tuple[float, Tensor, Tensor]] = []
    for layer in layers:
        square, inverse = root(layer.moment)
        basis_b, r = torch.linalg.qr(layer.b)
        u, s, vt = torch.linalg.svd(r @ layer.a @ square, full_matrices=False)
        b, a = basis_b @ u, vt @ inverse
        found += [(float(s[n]), b[:, n], a[n]) for n in range(min(rank, len(s)))]
    largest = sorted(found, key=lambda atom: -atom[0])[:rank]
    return _filled(torch.stack([b for _, b, _ in largest], dim=1), torch.stack([a for _, _, a in largest]), rank)


def _filled(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With zeros where there are fewer directions than ranks."""
    b = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
    return b, torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])


def _normal(state: _State, full: bool) -> _State:
    """The same updates with cores and output vectors of mean square 1: A and B hold the size, each half of it."""
    b, a, cores, outputs = state.b, state.a, torch.stack(state.cores), state.outputs
    if outputs is not None:
        table = torch.stack(outputs)
        size = _size(table.square().mean(0))
        b, outputs = b * size[:, None], tuple(table / size)
    if not full:
        size = _size(cores.square().mean(0))
        b, a = balanced(b * size, a)
        return _State(b, a, tuple(cores / size), outputs)
    (b, left), (a, right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    a, cores = a.T, left @ cores @ right.T
    size = _size(cores.square().sum((1, 2)).mean() / cores.shape[1])
    b, a = _filled(b * size.sqrt(), a * size.sqrt(), cores.shape[1])
    return _State(b, a, tuple(cores / size), outputs)


def _size(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()


def _solve(matrix: Tensor, target: Tensor) -> Tensor:
    """The shortest solution of symmetric non-negative systems, (…, n, n) and (…, n, m)."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    if not failed.any() and (pivots.amin(-1) > SAFE * pivots.amax(-1)).all():
        return torch.cholesky_solve(target, root)
    return _pinv(matrix) @ target


def _pinv(matrix: Tensor) -> Tensor:
    """Pseudo-inverse of symmetric non-negative matrices (…, n, n), in their range."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    live = values > values[..., -1:].clamp_min(0) * FLOOR
    inverse = torch.where(live, 1 / torch.where(live, values, torch.ones_like(values)), torch.zeros_like(values))
    found: Tensor = (vectors * inverse[..., None, :]) @ vectors.mT
    return found
