"""The moments of an adapter where the model computes with another one: with what a first plan made of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.core.statistics import Statistics
from lorapack.data.batches import Batch
from lorapack.measure.moments import run
from lorapack.measure.sums import Average, Sums, Weights
from lorapack.model.forward import single
from lorapack.model.load import Loaded
from lorapack.model.point import place, point


def measure_moments_elsewhere(
    loaded: Loaded,
    adapter: Adapter,
    at: Adapter,
    batches: Iterable[Batch],
    *,
    average: Average = "token",
) -> Statistics:
    """Sum an adapter's moments, the backward ones too, on the inputs and slopes that its modules have with `at`.

    With x the input of a module and g the loss's derivative by its output, both as they are where the model computes
    with `at`: ``h = A x`` and ``u = scale * B^T g``, A and B those of `adapter`. Where `at` is `adapter` itself these
    are the moments of `measure_moments`.

    Args:
        loaded: the base; it is left pointing to `at`.
        adapter: whose factors are measured.
        at: of the same modules.
        batches: of rows; padding is left out.
        average: each token weighs 1, or each row does.

    Raises:
        InputError: a module that is never reached, or whose tokens cannot be told from padding.
    """
    pairs = {m: adapter.factors(m) for m in adapter.linear}
    factors = {
        m: (f.A.to(loaded.device, torch.float32), f.B.to(loaded.device, torch.float32)) for m, f in pairs.items()
    }
    weights = Weights(average)
    sums = Sums(weights, {m: {"": pair} for m, pair in factors.items()})

    def hook(module: str) -> Callable[[Any, Any, Tensor], None]:
        a, b = factors[module]
        b = adapter.scale(module) * b

        def forward(_: Any, given: tuple[Tensor, ...], y: Tensor) -> None:
            x = single(given[0].detach())
            h = x @ a.to(x).T
            sums.forward(module, h)
            if not y.requires_grad:
                y.requires_grad_()  # frozen factors: the graph begins here

            def backward(slope: Tensor) -> None:
                slope = single(slope)
                sums.backward(module, h, slope @ b.to(slope))

            y.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    point(loaded, place(at, loaded.device))
    run(loaded, {m: (loaded.layers[m], hook(m)) for m in factors}, batches, weights, loss=True)
    return sums.statistics("", factors, {})
