"""The moments of an adapter where the model computes with another one: with what a first plan made of it."""

from collections.abc import Iterable

import torch

from lorapack.core.adapter import Adapter
from lorapack.core.statistics import Statistics
from lorapack.data.batches import Batch
from lorapack.measure.moments import on_layer, run
from lorapack.measure.sums import Average, Sums, Weights
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

    hooks = {
        m: (loaded.layers[m], on_layer(sums, m, a, adapter.scale(m) * b, loss=True)) for m, (a, b) in factors.items()
    }
    point(loaded, place(at, loaded.device))
    run(loaded, hooks, batches, weights, loss=True, sums=sums)
    return sums.statistics("", factors, {})
