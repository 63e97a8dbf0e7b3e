"""Several adapters of one base in one pass: the moments of each on what the base alone computes.

The inputs of a module depend on the adapter that is active, so exact moments of N adapters need N passes.
Here the base runs once, without any of them, and every adapter is measured on the inputs x and the
derivatives of the loss that its modules have there: ``h = A x`` and ``u = scale * B^T dloss/dy``. What that
does to a plan is in docs/measure.md.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, digest
from lorapack.core.statistics import Statistics
from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.measure.moments import Hook, on_layer, run
from lorapack.measure.sums import Average, Sums, Weights
from lorapack.model.load import Loaded, check_fits
from lorapack.model.point import place, point


def measure_moments_on_base(
    loaded: Loaded,
    adapters: Mapping[str, Adapter],
    batches: Iterable[Batch],
    *,
    loss: bool = False,
    average: Average = "token",
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Statistics]:
    """Sum the moments of several adapters over the same batches, in one pass of the base without any of them.

    Each adapter's are what this function gives for it alone. The loaded model is left pointing to no adapter.

    Args:
        loaded: the base; which adapter it was loaded with does not matter.
        adapters: by a name; they need not act on the same modules or have the same ranks.
        batches: of rows; padding is left out.
        loss: also the backward moments, of the base's own loss.
        average: each token weighs 1, or each row does.
        provenance: facts to keep with each result, beside the adapter's digest and ``"activations": "base"``.

    Returns:
        For each name its statistics.

    Raises:
        InputError: an adapter does not fit the base, or carries tensors (a trained head, biases, embeddings)
            without which the base is not the model it was trained as; a module that is never reached.
    """
    for name, adapter in adapters.items():
        check_fits(adapter, loaded.base, loaded.base_model)
        if adapter.carried or len(adapter.linear) < len(adapter.modules):
            what = next(iter(adapter.carried), None) or next(m for m in adapter.modules if m not in adapter.linear)
            raise InputError(f"{name} changes more of the base than linear modules ({what}): measure it alone")
    weights = Weights(average)
    users: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for name, adapter in adapters.items():
        for m in adapter.linear:
            pair = adapter.factors(m)
            a, b = (factor.to(loaded.device, torch.float32) for factor in (pair.A, pair.B))
            users.setdefault(m, {})[name] = a, b, adapter.scale(m)
    sums = Sums(weights, {m: {name: (a, b) for name, (a, b, _) in of.items()} for m, of in users.items()})
    layers = {m: _base_layer(loaded, m) for m in users}

    def hook(module: str) -> Hook:
        all_a = torch.cat([a for a, _, _ in users[module].values()])
        all_b = torch.cat([scale * b for _, b, scale in users[module].values()], dim=1)
        return on_layer(sums, module, all_a, all_b, loss)

    with base_alone(loaded):
        run(replace(loaded, layers=layers), {m: (layers[m], hook(m)) for m in users}, batches, weights, loss, sums)
    facts = {**(provenance or {}), "activations": "base"}
    return {
        name: sums.statistics(name, adapter.linear, {**facts, "adapter": digest(adapter)})
        for name, adapter in adapters.items()
    }


@contextmanager
def base_alone(loaded: Loaded) -> Iterator[None]:
    """The base without any adapter for as long as the block runs; point to one again afterwards."""
    point(loaded, place(None, loaded.device))
    try:
        with loaded.model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        loaded.model.requires_grad_(False)  # PEFT enables an adapter for training


def _base_layer(loaded: Loaded, module: str) -> Any:
    found = loaded.base.get_submodule(module)
    return getattr(found, "base_layer", found)
