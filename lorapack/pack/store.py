"""Store factors in fewer bytes (docs/store.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Pointer, decoded
from lorapack.core.codes import DTYPES, LOWEST, Coded, Codes, Store
from lorapack.core.linalg import FLOOR
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError
from lorapack.pack.truncate import atoms, balanced

SWEEPS = 4  # of re-rounding; the error has settled by then
CLIPS = 40  # scales tried an atom, from the largest number down to a fifth of it


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of the vectors on one side of an update: their second moment, ``c I + Q^T (K - c I) Q``.

    Attributes:
        q: (k, d) orthonormal rows, the directions that the adapter looked in when it was measured.
        inside: (k, k) the moment K there.
        outside: c, its median there, taken for all other directions.
    """

    q: Tensor
    inside: Tensor
    outside: float

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ moment``, (n, d) to (n, d)."""
        seen = rows @ self.q.T
        return self.outside * rows + (seen @ self.inside - self.outside * seen) @ self.q


def side(rows: Tensor, moment: Tensor) -> Side | None:
    """The second moment C of vectors of which ``rows C rows^T`` was measured; None where nothing was seen.

    Args:
        rows: (r, d) float64, A for the inputs x, B^T for the loss's derivatives by the outputs.
        moment: (r, r) float64.
    """
    u, s, vt = torch.linalg.svd(rows, full_matrices=False)
    live = s > s[:1] * FLOOR
    back = (u[:, live] / s[live]).T
    inside = back @ moment @ back.T
    if not live.any() or not float(inside.trace()) > 0:
        return None
    return Side(vt[live], inside, float(torch.linalg.eigvalsh(inside).clamp_min(0).median()))


Sides = tuple[Side | None, Side | None]


def sides(original: Adapter, statistics: Statistics | None) -> dict[str, Sides]:
    """By module, what the original's statistics say of its inputs and of the derivatives by its outputs."""
    found: dict[str, Sides] = {}
    for module, moments in statistics.modules.items() if statistics else ():
        factors = original.factors(module)
        derivatives = None if moments.backward is None else side(factors.B.double().T, moments.backward)
        found[module] = (side(factors.A.double(), moments.forward), derivatives)
    return found


def store_adapter(adapter: Adapter, store: Store | None, known: Mapping[str, Sides] | None = None) -> Adapter:
    """The adapter with its linear factors held in another form; what is carried stays as it is.

    Args:
        adapter: unchanged.
        known: `sides` by module, where there are some; a pair that several modules share has none.
        store: ``fp32``, ``bf16`` and ``fp16`` round to the nearest; ``int8`` and ``int4`` as `quantised`, with
            the cores and output vectors that layers have of their own in bf16; None leaves everything as it is.

    Raises:
        InputError: a number too large for fp16; names the factors.
    """
    if store is None:
        return adapter
    pool = {name: _stored(adapter, name, store, known or {}) for name in adapter.pool}
    dtype = DTYPES.get(store, torch.bfloat16)

    def pointer(old: Pointer) -> Pointer:
        core, output = (None if t is None else t.to(dtype) for t in (old.core, old.output))
        return replace(old, core=core, output=output)

    return replace(adapter, pool=pool, modules={module: pointer(old) for module, old in adapter.modules.items()})


def stored_as(adapter: Adapter, like: Adapter) -> Adapter:
    """The adapter with its pairs in as few bits as the pairs of another of the same pool.

    Args:
        adapter: the same modules with the same factors but for their values, which something has trained.
        like: how it was held. A pair whose values are its own still is taken from it, bit for bit.
    """

    def stored(name: str, factors: Factors) -> Factors:
        before = like.pool[name]
        if not isinstance(before.codes, Codes):
            return factors
        if torch.equal(factors.A, before.A) and torch.equal(factors.B, before.B):
            return before
        return _stored(adapter, name, before.codes.store, {})

    return replace(adapter, pool={name: stored(name, factors) for name, factors in adapter.pool.items()})


def _stored(adapter: Adapter, name: str, store: Store, known: Mapping[str, Sides]) -> Factors:
    factors = adapter.pool[name]
    if (
        factors.kind != "linear"
        or factors.seed is not None
        or (factors.codes is not None and factors.codes.store == store)
    ):
        return factors
    users = [module for module, pointer in adapter.modules.items() if pointer.factors == name]
    apart = adapter.modules[users[0]].core is not None
    if store == "int8" or store == "int4":
        if apart:
            return quantised_apart(factors, store)
        return quantised(factors, store, *known.get(users[0] if len(users) == 1 else "", (None, None)))
    return _cast(name, factors, DTYPES[store], apart)


def _cast(name: str, factors: Factors, dtype: torch.dtype, apart: bool) -> Factors:
    """Both factors in another dtype; `apart` where a core stands between them, so that no atom is theirs alone."""
    a, b = factors.A, factors.B
    if dtype == torch.float16 and factors.A.dtype != dtype:  # of small range: let B and A share it
        b, a = b.double(), a.double()
        if not apart:
            b, a = balanced(b, a)
        elif b.any() and a.any():
            ratio = (a.norm() / b.norm()).sqrt()
            b, a = b * ratio, a / ratio
    a, b = a.to(dtype), b.to(dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError(f"--store: the factors of {name} are too large for {dtype}; use bf16 or fp32")
    return Factors(a, b)


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows of whole numbers, each row with its scale.

    Attributes:
        codes: (n, d) float64, whole numbers from `lowest` to ``-lowest - 1``.
        scales: (n, 1) float64, numbers that bfloat16 holds exactly.
        lowest: the lowest code.
    """

    codes: Tensor
    scales: Tensor
    lowest: int

    @property
    def values(self) -> Tensor:
        return self.codes * self.scales


def quantised(factors: Factors, store: Coded, inputs: Side | None = None, derivatives: Side | None = None) -> Factors:
    """A and B as whole numbers, with a scale for each row of A and each column of B.

    1. The product is rewritten in atoms of equal length (`levelled`): the error of rounding is then least.
    2. Every row of A and column of B gets the scale of the least squared error (`on_grid`).
    3. In turns, B's codes are rounded again so that they make up for A's error, and A's for B's
       (`rerounded`). The error ||BA - B'A'||_F never rises, or what is made up for is weighed by what
       was measured: B's by the inputs that its error meets, A's by the derivatives that its error meets.

    Args:
        factors: A (r, d_in), B (d_out, r), any float dtype; computed in float64.
        store: ``int8`` or ``int4``.
        inputs, derivatives: of d_in and of d_out, None for white.

    Returns:
        Factors with codes, A and B in float32 as reading gives them.
    """
    target_b, target_a = levelled(factors)
    a, b = on_grid(target_a, LOWEST[store]), on_grid(target_b.T, LOWEST[store])
    for _ in range(SWEEPS):
        b = rerounded(b, target_a, target_b, a.values, inputs)
        a = rerounded(a, target_b.T, target_a.T, b.values, derivatives)
    return _coded(store, a, b)


def quantised_apart(factors: Factors, store: Coded) -> Factors:
    """`quantised` where a core K stands between B and A: each is rounded by itself, in the basis it is in.

    Another basis of B and A would be another update, for B R^-1 K R A is not B K A; and what A's rounding has
    spoilt is not for one B to make up for, with another K in every layer.
    """
    a, b = (on_grid(rows.double(), LOWEST[store]) for rows in (factors.A, factors.B.T))
    return _coded(store, a, b)


def _coded(store: Coded, a: Grid, b: Grid) -> Factors:
    """The pair of A (r, d_in) and B^T (r, d_out), both on their grids."""
    numbers = a.codes.to(torch.int8), b.codes.T.contiguous().to(torch.int8)
    return decoded(Codes(store, *numbers, torch.cat([a.scales, b.scales], dim=1).to(torch.bfloat16)))


def levelled(factors: Factors) -> tuple[Tensor, Tensor]:
    """The same product in atoms that are all equally long.

    Rounding to a scale an atom costs about ``sum_i |b_i|^2 |a_i|^2``. Over all ways to write the
    product that is least, ``(sum_i s_i)^2 / r`` for singular values s, where ``B^T B = A A^T`` has a
    constant diagonal. From the SVD, whose diagonal is s, r - 1 plane rotations lead there: each turns
    an atom that is too long and one that is too short until one of them has the mean length.

    Args:
        factors: A (r, d_in), B (d_out, r).

    Returns:
        B (d_out, r) and A (r, d_in), float64, with equal column and row lengths.
    """
    b, a, shares = atoms(factors, "weight")
    half = shares**0.25
    b, a = b / torch.where(half > 0, half, 1.0), a * half[:, None]
    if missing := factors.rank - shares.shape[0]:  # a rank above a dimension
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    gram = torch.diag(a.square().sum(dim=1))
    turn = torch.eye(factors.rank, dtype=torch.float64)
    mean = float(gram.diagonal().mean())
    for _ in range(factors.rank - 1):
        length = gram.diagonal()
        i, j = int(length.argmax()), int(length.argmin())
        high, low, both = float(length[i]), float(length[j]), float(gram[i, j])
        if high - low <= 1e-12 * mean:
            break
        # turned by an angle of tangent t, atom i has the length (high + 2 t both + t^2 low) / (1 + t^2)
        root = (both * both + (high - mean) * (mean - low)) ** 0.5
        t = (high - mean) / (root - both) if both < 0 else (mean - high) / (root + both)
        cos = (1 + t * t) ** -0.5
        rotation = torch.eye(factors.rank, dtype=torch.float64)
        rotation[i, i] = rotation[j, j] = cos
        rotation[i, j], rotation[j, i] = cos * t, -cos * t
        gram, turn = rotation @ gram @ rotation.T, rotation @ turn
    return b @ turn.T, turn @ a


def on_grid(rows: Tensor, lowest: int) -> Grid:
    """Each row rounded to the scale of the least squared error, of both signs, among `CLIPS` that clip more and more.

    Args:
        rows: (n, d) float64.
        lowest: the lowest code.
    """
    most = rows.abs().amax(dim=1, keepdim=True)
    best = Grid(torch.zeros_like(rows), torch.zeros_like(most), lowest)
    least = rows.square().sum(dim=1, keepdim=True)
    for clip in torch.linspace(1.0, 0.2, CLIPS).tolist():
        for sign in (1, -1):
            scales = (most * clip / (sign * lowest)).bfloat16().double()
            codes = nearest(rows, scales, lowest)
            error = (codes * scales - rows).square().sum(dim=1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(torch.where(better, codes, best.codes), torch.where(better, scales, best.scales), lowest)
    return best


def nearest(rows: Tensor, scales: Tensor, lowest: int) -> Tensor:
    """The codes nearest to the rows; 0 where the scale is 0."""
    safe = torch.where(scales != 0, scales, torch.ones_like(scales))
    return torch.where(scales != 0, (rows / safe).round().clamp(lowest, -lowest - 1), torch.zeros_like(rows))


def rerounded(grid: Grid, other: Tensor, target: Tensor, partner: Tensor, weigh: Side | None = None) -> Grid:
    """One sweep of coordinate descent over the atoms, the partner fixed.

    With X = grid.values^T (m, r) and P = partner (r, d), the least ||target @ other - X P||_F^2: atom by
    atom the best code given all others, ``x_i - ((X P - T) p_i) / |p_i|^2`` rounded, then the best scale.
    Weighed, the rows of T - X P are measured by the moment C of the vectors that they meet, and p_i
    is C p_i.

    Args:
        grid: (r, m), what is rounded again: B^T, or A.
        other, target: the product aimed at is ``target @ other``, (m, r) @ (r, d).
        partner: (r, d), the rounded factor on the other side.
        weigh: the moment, (d, d); None for white.
    """
    met = partner if weigh is None else weigh(partner)
    gram = met @ partner.T
    wanted = (target @ (other @ met.T)).T  # (r, m): <T, p_i>
    codes, scales = grid.codes.clone(), grid.scales.clone()
    values = grid.values
    for i in range(codes.shape[0]):
        if scales[i] == 0 or gram[i, i] <= 0:
            continue
        # what atom i should be, were it free
        free = values[i] + (wanted[i] - gram[i] @ values) / gram[i, i]
        codes[i] = nearest(free, scales[i], grid.lowest)
        length = codes[i] @ codes[i]
        if length > 0:
            fitted = ((codes[i] @ free) / length).bfloat16().double()
            closer = (fitted * codes[i] - free).square().sum() < (scales[i] * codes[i] - free).square().sum()
            if closer:
                scales[i] = fitted
        values[i] = codes[i] * scales[i]
    return Grid(codes, scales, grid.lowest)
