"""Refit what is left by least squares, layer by layer, before any gradient step (docs/recovery.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors
from lorapack.data.batches import batches, collate
from lorapack.data.encode import Encoded
from lorapack.model.forward import inputs, no_cache
from lorapack.model.head import at_once
from lorapack.model.load import Loaded
from lorapack.model.point import place, point
from lorapack.pack.store import stored_as
from lorapack.processes import from_first
from lorapack.recover.objective import Objective, Teacher, measured

TOKENS = 8192  # to fit on: some hundred times as many as a row of B has numbers
RIDGE = 1e-3  # of the mean square of h, towards the B that is there


@dataclass(frozen=True)
class Refit:
    """What the refit did: the objective on the selection rows before, and of each way to refit.

    Attributes:
        before: of the packed adapter.
        own: each module's own update is fitted; `whole`: with what has gone wrong before it.
        kept: ``before``, ``own`` or ``whole``, the least of the three.
    """

    before: float
    own: float
    whole: float
    kept: str


def refit(
    loaded: Loaded,
    original: Adapter,
    packed: Adapter,
    rows: Sequence[Encoded],
    selection: Sequence[Encoded],
    objective: Objective = "kl",
    batch_tokens: int = 4096,
) -> tuple[Adapter, Refit]:
    """The best of the packed adapter and two refits of it, by the objective on the selection rows.

    Args:
        loaded: the base model.
        original: what the result should do.
        packed: what is refitted.
        rows: to fit on, as many as `TOKENS` allow.
        selection: rows of another part.
        objective: see `lorapack.recover.Settings`.
        batch_tokens: tokens a batch for the selection rows.
    """
    held = batches(selection, at_once(loaded, batch_tokens), loaded.pad)
    teacher = Teacher(loaded, place(original, loaded.device))
    refits = {k: fitted(loaded, original, packed, rows, k == "whole") for k in ("own", "whole")}
    tried = {"before": packed, **{k: stored_as(found, packed) for k, found in refits.items()}}
    found = {k: measured(loaded, place(a, loaded.device), teacher, held, objective) for k, a in tried.items()}
    kept = min(found, key=lambda k: found[k])  # the first of equals: before
    return from_first(tried[kept]), Refit(found["before"], found["own"], found["whole"], kept)


def fitted(loaded: Loaded, original: Adapter, packed: Adapter, rows: Sequence[Encoded], whole: bool) -> Adapter:
    """Least squares for B of every module, on the activations of the adapter refitted so far.

    One forward pass with every row twice, once as the original sees it (x) and once as the packed
    adapter does (x~). When it comes to a module, its B is solved for at once, with ``h = s' A' x~``,

        B* = B' + E[(t - B' h) h^T] (E[h h^T] + lambda I)^-1,

    and used from there on, so later modules see what earlier ones have become. The target t is the
    original's update ``W x``; with `whole` also the base layer's ``W_0 (x - x~)``, which undoes what
    went wrong before. A pair that several modules share, or that has a core, keeps
    its factors; the scales are fitted.

    Returns:
        The packed adapter with other B and scales; modules that the pass does not reach stay.
    """
    batch = collate(list(enumerate(_within(rows))), loaded.pad).to(loaded.device)
    mask, n = batch.attention_mask.bool(), len(batch.input_ids)
    pool, pointers, shared = dict(packed.pool), dict(packed.modules), packed.groups

    def hook(module: str) -> Callable[[Any, Any, Tensor], Tensor]:
        whole_update = original.factors(module), original.scale(module)

        def forward(_: Any, given: tuple[Tensor, ...], base: Tensor) -> Tensor:
            x = given[0]
            ours = _update(x[:n], *whole_update)
            if module not in packed.modules:
                return torch.cat([base[:n] + ours, base[n:]])
            target = ours + (base[:n] - base[n:]) if whole else ours
            chosen = mask if x.ndim == 3 else torch.ones(n, dtype=torch.bool, device=x.device)  # a vector a row
            name, scale = pointers[module].factors, packed.scale(module)
            pair = packed.factors(module)  # with its core and output vector, where it has them
            a, b = pair.A.to(x), pair.B.to(x)
            h, t = scale * (x[n:][chosen].float() @ a.float().T), target[chosen].float()
            if name in shared:
                y = h @ b.float().T
                length = float((y * y).sum())
                if length > 0:
                    scale *= float((t * y).sum()) / length
                pointers[module] = replace(pointers[module], scale=scale)
            else:
                gram = (h.T @ h).double()
                ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                rest = ((t - h @ b.float().T).T @ h).double()
                solved = b + torch.linalg.lstsq(gram + ridge, rest.T).solution.T.to(b)
                pool[name] = pair = Factors(pair.A, solved.to(pair.B))
            return torch.cat([base[:n] + ours, base[n:] + _update(x[n:], pair, scale)])

        return forward

    point(loaded, place(None, loaded.device))
    handles = [loaded.layers[module].register_forward_hook(hook(module)) for module in original.linear]
    twice = {name: torch.cat([value, value]) for name, value in inputs(batch).items()}
    try:
        with torch.no_grad():
            loaded.base.base_model(**twice, **no_cache(loaded))
    finally:
        for handle in handles:
            handle.remove()
    return packed.with_pool(pool, pointers)


def _update(x: Tensor, factors: Factors, scale: float) -> Tensor:
    return scale * (x @ factors.A.to(x).T @ factors.B.to(x).T)


def _within(rows: Sequence[Encoded]) -> list[Encoded]:
    """The first rows that have, padded, no more than `TOKENS`; at least one."""
    longest = 0
    chosen: list[Encoded] = []
    for row in rows:
        longest = max(longest, len(row.input_ids))
        if chosen and longest * (len(chosen) + 1) > TOKENS:
            break
        chosen.append(row)
    return chosen
