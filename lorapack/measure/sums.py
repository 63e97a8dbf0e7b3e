"""What is added up over the tokens of all batches: r x r products, for each module."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.statistics import Moments, Statistics
from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.measure.totals import Totals

Average = Literal["token", "sample"]


class Weights:
    """The batch at hand: which positions are tokens, what each weighs in the sums; and the sums so far."""

    mask: Tensor
    values: Tensor
    of_row: Tensor

    def __init__(self, average: Average) -> None:
        self.average = average
        self.totals = Totals()

    def set(self, batch: Batch) -> None:
        self.mask = batch.attention_mask.bool()
        lengths = batch.attention_mask.sum(dim=1, keepdim=True).double()
        each = torch.ones_like(lengths) if self.average == "token" else 1 / lengths
        self.of_row = each
        self.values = each.expand_as(self.mask)[self.mask]
        self.totals.add(("weight",), self.values.sum())
        self.totals.add(("tokens",), self.mask.sum().double())
        self.totals.add(("samples",), each.new_tensor(len(each)))

    def total(self, what: str) -> float:
        """The ``weight`` of all tokens so far, or how many ``tokens`` or ``samples`` there were."""
        return float(self.totals.done[what,])

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
        found = values.detach()[self.mask.to(values.device)].double()
        return found, self.values[:, None].to(found.device)

    def by_row(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's sum of ``left right^T`` over its tokens, (rows, m, n) float64, and its weight, (rows, 1, 1)."""
        of_row = self.of_row[:, :, None].to(left.device)
        if left.ndim == 2:
            return left.detach().double()[:, :, None] * right.detach().double()[:, None, :], of_row
        hidden = ~self.mask[:, :, None].to(left.device)
        one, two = (values.detach().double().masked_fill(hidden, 0.0) for values in (left, right))
        return one.transpose(1, 2) @ two, of_row


class Sums:
    """What is added up of one adapter: the parts of each module's `Moments`, float64.

    Args:
        weights: of the batch at hand.
        factors: of every module, A (r, d_in) and B (d_out, r).
        name: of the adapter, where there are several.
    """

    def __init__(self, weights: Weights, factors: Mapping[str, tuple[Tensor, Tensor]], name: str = "") -> None:
        self.weights = weights
        self.name = name
        self.modules = tuple(factors)
        self._inside = {
            m: (a.detach().double() @ a.detach().double().T, b.detach().double().T @ b.detach().double())
            for m, (a, b) in factors.items()
        }

    def forward(self, module: str, h: Tensor) -> None:
        """Add a batch's ``h = A x``."""
        seen, each = self.weights.pick(module, h)
        self._add(module, "forward", (seen * each).T @ seen)

    def backward(self, module: str, h: Tensor, u: Tensor) -> None:
        """Add what the batch's ``u = dloss/dh`` makes with its ``h``."""
        (seen, each), (found, _) = self.weights.pick(module, h), self.weights.pick(module, u)
        inside_a, inside_b = self._inside[module]
        rows, of_row = self.weights.by_row(u, h)
        for part, left, right, weight in (
            ("backward", found, found, each),
            ("cross", found, seen, each),
            ("token_forward", seen, seen, each * ((found @ inside_a) * found).sum(1, True)),
            ("token_backward", found, found, each * ((seen @ inside_b) * seen).sum(1, True)),
        ):
            self._add(module, part, (left * weight).T @ right)
        self._add(module, "row_forward", (of_row * (rows.mT @ inside_a @ rows)).sum(0))
        self._add(module, "row_backward", (of_row * (rows @ inside_b @ rows.mT)).sum(0))

    def statistics(self, provenance: Mapping[str, Any]) -> Statistics:
        """All of it.

        Raises:
            InputError: a module was never reached.
        """
        found: dict[str, dict[str, Tensor]] = {module: {} for module in self.modules}
        for (*of, part), value in self.weights.totals.done.items():
            if len(of) == 2 and of[0] == self.name:
                found[of[1]][part] = value.cpu()
        for module, parts in found.items():
            if not parts:
                raise InputError(f"{module} was never reached by the calibration data, so it cannot be measured")
        return Statistics(
            modules={module: Moments(**parts) for module, parts in found.items()},
            weight=self.weights.total("weight"),
            tokens=int(self.weights.total("tokens")),
            samples=int(self.weights.total("samples")),
            average=self.weights.average,
            provenance=dict(provenance),
        )

    def _add(self, module: str, part: str, product: Tensor) -> None:
        self.weights.totals.add((self.name, module, part), product)
