"""What is added up over the tokens of all batches: r x r products, for each module."""

from collections.abc import Iterable, Iterator, Mapping
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

    shape: torch.Size
    at: Tensor | None
    values: Tensor
    of_row: Tensor

    def __init__(self, average: Average) -> None:
        self.average = average
        self.totals = Totals()

    def set(self, batch: Batch) -> None:
        """Once a batch, so that no module has to look for the padding (and no accelerator to wait for the answer)."""
        mask = batch.attention_mask.bool()
        lengths = batch.attention_mask.sum(dim=1, keepdim=True).double()
        self.of_row = torch.ones_like(lengths) if self.average == "token" else 1 / lengths
        self.values = self.of_row.expand_as(mask)[mask]
        self.shape = mask.shape
        self.at = None if mask.all() else mask.flatten().nonzero()[:, 0]
        self.totals.add(("weight",), self.values.sum())
        self.totals.add(("tokens",), lengths.sum())
        self.totals.add(("samples",), lengths.new_tensor(len(mask)))

    def pick(self, module: str, values: Tensor) -> Tensor:
        """The values at the tokens, padding left out, (tokens, n) float64.

        A module that sees one vector a row (a pooler) has each of them counted once.
        """
        values = values.detach()
        if values.ndim == 2 and len(values) == self.shape[0]:
            return values.double()
        if values.ndim != 3 or values.shape[:2] != self.shape:
            raise InputError(
                f"{module} sees values of shape {tuple(values.shape)} for a batch of {tuple(self.shape)} tokens, "
                "so padding cannot be told apart; it cannot be measured"
            )
        flat = values.flatten(0, 1)
        return (flat if self.at is None else flat.index_select(0, self.at.to(flat.device))).double()

    def weigh(self, picked: Tensor) -> Tensor:
        """Some picked values times the weight of their token; the vector of a whole row weighs 1."""
        if self.average == "token" or len(picked) == self.shape[0]:
            return picked
        return picked * self.values[:, None].to(picked.device)  # of a model that is split, this layer's

    def by_row(self, left: Tensor, right: Tensor) -> Tensor:
        """Each row's sum of ``left right^T`` over its tokens, (rows, m, n), of picked (tokens, m) and (tokens, n)."""
        return self._rows(left).mT @ self._rows(right)

    def _rows(self, picked: Tensor) -> Tensor:
        """(rows, length, n), zeros for padding."""
        if len(picked) == self.shape[0]:
            return picked[:, None]
        if self.at is not None:
            picked = picked.new_zeros(self.shape.numel(), picked.shape[1]).index_copy_(
                0, self.at.to(picked.device), picked
            )
        return picked.view(*self.shape, -1)

    def total(self, what: str) -> float:
        """The ``weight`` of all tokens so far, or how many ``tokens`` or ``samples`` there were."""
        return float(self.totals.done[what,])


class Sums:
    """What is added up: the parts of the `Moments` of every module and adapter, float64.

    Args:
        weights: of the batch at hand.
        factors: for every module, by the adapter's name, A (r, d_in) and B (d_out, r).
    """

    def __init__(self, weights: Weights, factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
        self.weights = weights
        self._ranks = {m: {name: len(a) for name, (a, _) in pairs.items()} for m, pairs in factors.items()}
        self._factors = {(m, name): pair for m, pairs in factors.items() for name, pair in pairs.items()}
        self._grams: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def forward(self, module: str, h: Tensor) -> None:
        """Add a batch's ``h = A x``, of the module's adapters side by side."""
        seen = self.weights.pick(module, h)
        for name, hs in self._split(module, seen):
            self._add(module, name, "forward", self.weights.weigh(hs).T @ hs)

    def backward(self, module: str, h: Tensor, u: Tensor) -> None:
        """Add what the batch's ``u = dloss/dh`` makes with its ``h``."""
        seen, found = self.weights.pick(module, h), self.weights.pick(module, u)
        weigh, of_row = self.weights.weigh, self.weights.of_row[:, :, None].to(seen.device)
        for (name, hs), (_, us) in zip(self._split(module, seen), self._split(module, found), strict=True):
            inside_a, inside_b = (gram.to(seen.device) for gram in self._gram(module, name))
            for part, left, right in (
                ("backward", us, us),
                ("cross", us, hs),
                ("token_forward", hs * ((us @ inside_a) * us).sum(1, True), hs),
                ("token_backward", us * ((hs @ inside_b) * hs).sum(1, True), us),
            ):
                self._add(module, name, part, weigh(left).T @ right)
            rows = self.weights.by_row(us, hs)
            self._add(module, name, "row_forward", (of_row * (rows.mT @ inside_a @ rows)).sum(0))
            self._add(module, name, "row_backward", (of_row * (rows @ inside_b @ rows.mT)).sum(0))

    def statistics(self, name: str, modules: Iterable[str], provenance: Mapping[str, Any]) -> Statistics:
        """All of one adapter.

        Raises:
            InputError: a module was never reached.
        """
        parts_of: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
        for key, value in self.weights.totals.done.items():
            if key[0] == name and len(key) == 3:
                parts_of[key[1]][key[2]] = value
        found = {}
        for module, parts in parts_of.items():
            if not parts:
                raise InputError(f"{module} was never reached by the calibration data, so it cannot be measured")
            found[module] = Moments(**{part: value.cpu() for part, value in parts.items()})
        return Statistics(
            modules=found,
            weight=self.weights.total("weight"),
            tokens=int(self.weights.total("tokens")),
            samples=int(self.weights.total("samples")),
            average=self.weights.average,
            provenance=dict(provenance),
        )

    def _gram(self, module: str, name: str) -> tuple[Tensor, Tensor]:
        """A A^T and B^T B."""
        if (module, name) not in self._grams:
            a, b = (factor.detach().double() for factor in self._factors[module, name])
            self._grams[module, name] = a @ a.T, b.T @ b
        return self._grams[module, name]

    def _split(self, module: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The columns of each adapter, by its name."""
        ranks = self._ranks[module]
        return zip(ranks, torch.split(values, list(ranks.values()), dim=1), strict=True)

    def _add(self, module: str, name: str, part: str, product: Tensor) -> None:
        self.weights.totals.add((name, module, part), product)
