"""The measuring pass: hooks on the low-rank branch of every linear module."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.statistics import Moments, Statistics
from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.measure.sums import Sums
from lorapack.model import head
from lorapack.model.forward import Predictions, acts_on_head, losses, predict, run_body
from lorapack.model.head import features, logits, separable
from lorapack.model.load import NAME, Loaded

Average = Literal["token", "sample"]


class _Weights:
    """The batch at hand: which positions are tokens, and what each weighs in the sums."""

    mask: Tensor
    values: Tensor
    of_row: Tensor

    def set(self, batch: Batch, average: Average) -> None:
        self.mask = batch.attention_mask.bool()
        lengths = batch.attention_mask.sum(dim=1, keepdim=True).double()
        each = torch.ones_like(lengths) if average == "token" else 1 / lengths
        self.of_row = each
        self.values = each.expand_as(self.mask)[self.mask]

    def pick(self, module: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values at the tokens, padding left out, (tokens, n) float64, and the weight of each, (tokens, 1).

        A module that sees one vector a row (a pooler) has each of them counted once.
        """
        if values.ndim == 2 and len(values) == len(self.mask):
            found = values.detach().double()
            return found, torch.ones_like(found[:, :1])
        if values.ndim != 3 or values.shape[:2] != self.mask.shape:
            raise InputError(
                f"{module} sees values of shape {tuple(values.shape)} for a batch of {tuple(self.mask.shape)} tokens, "
                "so padding cannot be told apart; it cannot be measured"
            )
        return values.detach()[self.mask].double(), self.values[:, None]

    def by_row(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's sum of ``left right^T`` over its tokens, (rows, m, n) float64, and its weight, (rows, 1, 1)."""
        if left.ndim == 2:
            return left.detach().double()[:, :, None] * right.detach().double()[:, None, :], self.of_row[:, :, None]
        hidden = ~self.mask[:, :, None]
        one, two = (values.detach().double().masked_fill(hidden, 0.0) for values in (left, right))
        return one.transpose(1, 2) @ two, self.of_row[:, :, None]


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
    modules = list(modules)
    if loss:
        separable(loaded)  # tried before the hooks see what it tries with
    sums: Sums[tuple[str, str]] = Sums()
    weights = _Weights()

    def sum_up(module: str, part: str, product: Tensor) -> None:
        sums.add((module, part), product)

    def add(module: str, part: str, left: Tensor, right: Tensor, each: Tensor) -> None:
        sum_up(module, part, (left * each).T @ right)

    def gram(module: str) -> tuple[Tensor, Tensor]:
        """A A^T and B^T B."""
        layer = loaded.layers[module]
        a, b = layer.lora_A[NAME].weight.detach().double(), layer.lora_B[NAME].weight.detach().double()
        return a @ a.T, b.T @ b

    def hook(module: str) -> Callable[[Any, Any, Tensor], None]:
        def forward(_: Any, __: Any, h: Tensor) -> None:
            seen, each = weights.pick(module, h)
            add(module, "forward", seen, seen, each)
            if loss:
                if not h.requires_grad:
                    h.requires_grad_()  # frozen factors: the graph begins here, no weight gradient is computed

                def backward(u: Tensor) -> None:
                    found, _ = weights.pick(module, u)
                    add(module, "backward", found, found, each)
                    add(module, "cross", found, seen, each)
                    inside_a, inside_b = gram(module)
                    add(module, "token_forward", seen, seen, each * ((found @ inside_a) * found).sum(1, True))
                    add(module, "token_backward", found, found, each * ((seen @ inside_b) * seen).sum(1, True))
                    rows, of_row = weights.by_row(u, h)
                    sum_up(module, "row_forward", (of_row * (rows.mT @ inside_a @ rows)).sum(0))
                    sum_up(module, "row_backward", (of_row * (rows @ inside_b @ rows.mT)).sum(0))

                h.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    def run(batch: Batch) -> None:
        weights.set(batch, average)
        sums.add(("", "weight"), weights.values.sum())
        sums.add(("", "tokens"), weights.mask.sum().double())
        sums.add(("", "samples"), weights.of_row.new_tensor(len(batch.input_ids)))
        if loss:
            _pull(loaded, batch)
        else:
            run_body(loaded, batch)

    with hooked(loaded, {module: hook(module) for module in modules}), torch.set_grad_enabled(loss):
        sums.over(loaded, batches, run)
    found: dict[str, dict[str, Tensor]] = {module: {} for module in ("", *modules)}
    for (module, part), value in sums.done.items():
        found[module][part] = value.cpu()
    counts = {part: float(value) for part, value in found[""].items()}
    for module in modules:
        if not found[module]:
            raise InputError(f"{module} was never reached by the calibration data, so it cannot be measured")
    return Statistics(
        modules={module: Moments(**found[module]) for module in modules},
        weight=counts["weight"],
        tokens=int(counts["tokens"]),
        samples=int(counts["samples"]),
        average=average,
        provenance=dict(provenance or {}),
    )


def _pull(loaded: Loaded, batch: Batch) -> None:
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
    sums: Sums[str] = Sums()
    weights = _Weights()

    def hook(module: str) -> Callable[[Any, Any, Tensor], None]:
        def forward(_: Any, given: tuple[Tensor, ...], __: Tensor) -> None:
            x, each = weights.pick(module, given[0])
            y = x @ on_device[id(bases[module])].T
            sums.add(module, (y * each).T @ y)

        return forward

    def run(batch: Batch) -> None:
        weights.set(batch, average)
        sums.add("", weights.values.sum())
        run_body(loaded, batch)

    with hooked(loaded, {module: hook(module) for module in bases}), torch.no_grad():
        sums.over(loaded, batches, run)
    weight = float(sums.done.pop(""))
    return {module: (sums.done[module] / weight).cpu() for module in bases if module in sums.done}


@contextmanager
def hooked(loaded: Loaded, hooks: Mapping[str, Callable[[Any, Any, Tensor], None]]) -> Iterator[None]:
    """Forward hooks on the first factor (A) of some modules, for as long as the block runs."""
    handles = [loaded.layers[module].lora_A[NAME].register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
