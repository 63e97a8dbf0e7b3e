"""First-order sensitivity of the loss to every element of the factors, and to every singular triplet."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.model.forward import losses, predict
from lorapack.model.load import Loaded
from lorapack.model.memory import piecewise
from lorapack.model.point import place, point
from lorapack.pack.truncate import canonical

SMOOTHING = 0.85  # beta_1 and beta_2 of AdaLoRA


def measure_gradients(
    loaded: Loaded, adapter: Adapter, batches: Iterable[Batch]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """``theta * dloss/dtheta`` of the canonical factors, and AdaLoRA's importance of their triplets.

    The canonical factors (`lorapack.pack.truncate.canonical`) of an update are the same whatever
    basis the checkpoint keeps it in, so these figures are as well.

    With w = B A = sum b_i a_i^T, balanced, b_i = sqrt(lambda_i) p_i and a_i = sqrt(lambda_i) q_i, so
    p * dloss/dp = b * dloss/db element by element, and lambda_i * dloss/dlambda_i is their sum over
    column i. Over the batches, in order, AdaLoRA keeps the running mean I of the absolute value and
    the running mean U of its deviation; an element's importance is I * U, a triplet's that of
    lambda_i and the means of those of p_i and q_i.

    Args:
        loaded: the base the adapter is attached to.
        adapter: without shared factors.
        batches: of rows.

    Returns:
        For each linear module (r, d_in) and (d_out, r) float64 sums over the predictions, and (r,).

    Raises:
        InputError: factors that several modules share, whose gradient is not one module's.

    Source: SNIP (arXiv 1810.02340) eq. 4; AdaLoRA (arXiv 2303.10512) eqs. 8 to 10.
    """
    if adapter.groups:
        shared = next(iter(adapter.groups))
        raise InputError(f"gradients are per module, and {shared!r} is shared: `lorapack expand` the adapter first")
    placed = place(replace(adapter, pool={n: canonical(f) for n, f in adapter.pool.items()}), loaded.device, True)
    point(loaded, placed)
    of_module = {module: placed.pairs[name] for module, (name, _) in placed.pointers.items()}
    totals: dict[str, list[Tensor]] = {}
    running: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def pull(piece: Batch) -> int:
        each = losses(loaded, predict(loaded, piece))
        each.sum().backward()  # type: ignore[no-untyped-call]
        return len(each)

    def forget() -> None:
        for pair in of_module.values():
            for p in pair:
                p.grad = None

    for batch in batches:
        count = sum(piecewise(loaded, batch, pull, forget))
        for module, pair in of_module.items():
            a, b = (p.detach().double() * p.grad.double() / count for p in pair)  # type: ignore[union-attr]
            now = [a.abs(), b.abs(), b.sum(dim=0).abs()]
            before = running.get(module) or [(torch.zeros_like(t), torch.zeros_like(t)) for t in now]
            running[module] = [_smoothed(t, *past) for t, past in zip(now, before, strict=True)]
            sums = totals.setdefault(module, [torch.zeros_like(a), torch.zeros_like(b)])
            sums[0] += a * count
            sums[1] += b * count
        forget()
    found = {}
    for module, (a, b) in totals.items():
        of_a, of_b, of_lambda = (mean * spread for mean, spread in running[module])
        found[module] = (a.cpu(), b.cpu(), (of_lambda + of_a.mean(dim=1) + of_b.mean(dim=0)).cpu())
    return found


def _smoothed(now: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    mean = SMOOTHING * mean + (1 - SMOOTHING) * now
    return mean, SMOOTHING * spread + (1 - SMOOTHING) * (now - mean).abs()
