"""The measuring pass: hooks on the low-rank branch of every linear module."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorapack.core.statistics import Statistics
from lorapack.data.batches import Batch
from lorapack.measure.sums import Average, Sums, Weights
from lorapack.model import head
from lorapack.model.forward import Predictions, acts_on_head, losses, predict, run_body, single
from lorapack.model.head import features, logits, separable
from lorapack.model.load import NAME, Loaded
from lorapack.model.memory import piecewise
from lorapack.processes import rounds

Hook = Callable[[Any, Any, Tensor], None]
Hooks = Mapping[str, tuple[nn.Module, Hook]]
"""For each module what is hooked, and the hook."""


def measure_moments(
    loaded: Loaded,
    modules: Iterable[str],
    batches: Iterable[Batch],
    *,
    loss: bool = False,
    average: Average = "token",
    provenance: Mapping[str, Any] | None = None,
) -> Statistics:
    """Sum the moments of every module over all tokens of the batches, in float64.

    float64 also on a GPU: the sums are r x r, so even cards with few float64 units lose no time to it,
    and the result does not depend on the order of the batches beyond the last bits.

    Args:
        loaded: the base with the adapter pointed to.
        modules: which to measure.
        batches: of rows; padding is left out.
        loss: also the backward moments. The loss is the sum over the predictions, so u does not
            depend on the batch size. Without it the head is never computed.
        average: each token weighs 1, or each row does.
        provenance: facts to keep with the result.

    Raises:
        InputError: a module that is never reached, or whose tokens cannot be told from padding.
    """
    weights = Weights(average)
    layers = {m: loaded.layers[m] for m in modules}
    sums = Sums(weights, {m: {NAME: (of.lora_A[NAME].weight, of.lora_B[NAME].weight)} for m, of in layers.items()})

    def hook(module: str) -> Hook:
        def forward(_: Any, __: Any, h: Tensor) -> None:
            sums.forward(module, h)
            if loss:
                if not h.requires_grad:
                    h.requires_grad_()  # frozen factors: the graph begins here, no weight gradient is computed
                seen = h.detach()
                h.register_hook(lambda u: sums.backward(module, seen, u))  # type: ignore[no-untyped-call]

        return forward

    run(loaded, {m: (of.lora_A[NAME], hook(m)) for m, of in layers.items()}, batches, weights, loss, sums)
    return sums.statistics(NAME, layers, provenance or {})


def on_layer(sums: Sums, module: str, a: Tensor, b: Tensor, loss: bool) -> Hook:
    """A hook on the module's layer, for factors that the model does not compute with.

    Args:
        sums: that get ``h = A x``, x being what goes into the layer, and ``u = B^T dloss/dy``, y what comes out.
        module: whose they are.
        a: (r, d_in), r being the ranks together where there are several adapters.
        b: (d_out, r), scaled.
        loss: whether there is a backward pass.
    """

    def forward(_: Any, given: tuple[Tensor, ...], y: Tensor) -> None:
        x = single(given[0].detach())
        h = x @ a.to(x).T
        sums.forward(module, h)
        if loss:
            if not y.requires_grad:
                y.requires_grad_()  # all is frozen: the graph begins here

            def backward(slope: Tensor) -> None:
                slope = single(slope)
                sums.backward(module, h, slope @ b.to(slope))

            y.register_hook(backward)  # type: ignore[no-untyped-call]

    return forward


def run(
    loaded: Loaded,
    hooks: Hooks,
    batches: Iterable[Batch],
    weights: Weights,
    loss: bool = False,
    sums: Sums | None = None,
) -> None:
    """This process's batches through the model, forward and, with the loss, backward, while forward hooks look on.

    What the hooks add to the totals of `weights`, or to `sums` with those weights, is there afterwards, of the batches
    of all processes.
    """
    if loss:
        separable(loaded)  # tried before the hooks see what it tries with

    def through(batch: Batch) -> None:
        weights.set(batch)
        if loss:
            pull(loaded, batch)
        else:
            run_body(loaded, batch)
        if sums is not None:
            sums.settle()

    def forget() -> None:
        weights.totals.forget()
        if sums is not None:
            sums.forget()

    with hooked(hooks), torch.set_grad_enabled(loss):
        for batch in rounds(batches):
            piecewise(loaded, batch, through, forget)
            weights.totals.settle()


def pull(loaded: Loaded, batch: Batch) -> None:
    """The backward pass of the summed loss; the head a chunk at a time, unless its inputs are measured as well."""
    if acts_on_head(loaded):
        losses(loaded, predict(loaded, batch)).sum().backward()  # type: ignore[no-untyped-call]
        return
    seen = features(loaded, batch)

    def chunk(part: slice, states: Tensor) -> None:
        output = logits(loaded, None, seen, states)
        losses(loaded, Predictions(output, seen.targets[part], seen.rows[part])).sum().backward()  # type: ignore[no-untyped-call]

    head.backward(loaded, seen, chunk)


def measure_inputs(
    loaded: Loaded, bases: Mapping[str, Tensor], batches: Iterable[Batch], average: Average = "token"
) -> dict[str, Tensor]:
    """E[y y^T] of ``y = Q x`` for the inputs x of some modules: what a shared adapter is fitted to.

    Args:
        loaded: the base with the adapter pointed to.
        bases: for each module its group's Q, (q, d_in).
        batches: of rows; padding is left out.
        average: each token weighs 1, or each row does.

    Returns:
        For each module a (q, q) float64 mean.
    """
    on_device = {id(q): q.to(loaded.device) for q in bases.values()}
    weights = Weights(average)

    def hook(module: str) -> Hook:
        def forward(_: Any, given: tuple[Tensor, ...], __: Tensor) -> None:
            x = weights.pick(module, given[0][None])
            y = x @ on_device[id(bases[module])].to(x.device).T
            weights.totals.add(("inputs", module), (weights.weigh(y).mT @ y)[0])

        return forward

    run(loaded, {m: (loaded.layers[m].lora_A[NAME], hook(m)) for m in bases}, batches, weights)
    weight = weights.total("weight")
    return {key[1]: (total / weight).cpu() for key, total in weights.totals.done.items() if key[0] == "inputs"}


@contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    """Forward hooks, for as long as the block runs."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
