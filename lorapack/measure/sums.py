"""What is added up over the tokens of all batches: r x r products, for each module."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.statistics import Moments, Statistics
from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.measure.totals import Totals

Average = Literal["token", "sample"]
Adapted = tuple[str, str]
"""A module, and the name of an adapter that it has."""

# By the kind of device, so many numbers of h are held back, to be added up together, those of one shape in one product.
# A CPU's caches hold a module's; elsewhere many small products, one after the other, would take longer than the model.
HELD = {"cpu": 0, "cuda": 2**22}  # 64 modules of rank 16 with 4096 tokens, so temporary tensors of 32 MB


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
        """The values at the tokens, padding left out, (modules, tokens, n) float64.

        Args:
            module: the first of the modules, for the message.
            values: (modules, rows, length, n), or (modules, rows, n) where one vector a row is seen (by a pooler): each
                of them is counted once.
        """
        values = values.detach()
        if values.ndim == 3 and values.shape[1] == self.shape[0]:
            return values.double()
        if values.ndim != 4 or values.shape[1:3] != self.shape:
            raise InputError(
                f"{module} sees values of shape {tuple(values.shape[1:])} for a batch of {tuple(self.shape)} tokens, "
                "so padding cannot be told apart; it cannot be measured"
            )
        flat = values.flatten(1, 2)
        return (flat if self.at is None else flat.index_select(1, self.at.to(flat.device))).double()

    def weigh(self, picked: Tensor) -> Tensor:
        """Some picked values times the weight of their token; the vector of a whole row weighs 1."""
        if self.average == "token" or picked.shape[1] == self.shape[0]:
            return picked
        return picked * self.values[:, None].to(picked.device)  # of a model that is split, this layer's

    def by_row(self, left: Tensor, right: Tensor) -> Tensor:
        """Each row's sum of ``left right^T`` over its tokens, (modules, rows, m, n).

        Args:
            left, right: picked, (modules, tokens, m) and (modules, tokens, n).
        """
        return self._rows(left).mT @ self._rows(right)

    def _rows(self, picked: Tensor) -> Tensor:
        """(modules, rows, length, n), zeros for padding."""
        if picked.shape[1] == self.shape[0]:
            return picked[:, :, None]
        if self.at is not None:
            whole = picked.new_zeros(len(picked), self.shape.numel(), picked.shape[2])
            picked = whole.index_copy_(1, self.at.to(picked.device), picked)
        return picked.view(len(picked), *self.shape, -1)

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
        self._grams: dict[Adapted, tuple[Tensor, Tensor]] = {}
        self._held: list[tuple[str, tuple[Tensor, ...]]] = []
        self._numbers = 0

    def forward(self, module: str, h: Tensor) -> None:
        """Add a batch's ``h = A x``, of the module's adapters side by side."""
        self._hold(module, h)

    def backward(self, module: str, h: Tensor, u: Tensor) -> None:
        """Add what the batch's ``u = dloss/dh`` makes with its ``h``."""
        self._hold(module, h, u)

    def settle(self) -> None:
        """Add up what is held back. Due before the next batch, whose padding is another."""
        held = self._held
        self.forget()
        alike: dict[Any, list[tuple[str, tuple[Tensor, ...]]]] = {}
        for module, values in held:
            kind = (tuple(self._ranks[module].values()), *((v.shape, v.dtype, v.device) for v in values))
            alike.setdefault(kind, []).append((module, values))
        for group in alike.values():
            modules = [module for module, _ in group]
            seen = [self.weights.pick(modules[0], _stacked(each)) for each in zip(*(v for _, v in group), strict=True)]
            for adapted, parts in self._by_rank(modules, seen):
                self._add_up(adapted, *parts)

    def forget(self) -> None:
        """Leave what is held back out."""
        self._held, self._numbers = [], 0

    def _hold(self, module: str, *values: Tensor) -> None:
        h = values[0]
        self._held.append((module, tuple(v.detach() for v in values)))
        self._numbers += h.numel()
        if self._numbers > HELD.get(h.device.type, HELD["cuda"]):
            self.settle()

    def _by_rank(self, modules: Sequence[str], seen: Sequence[Tensor]) -> Iterator[tuple[list[Adapted], list[Tensor]]]:
        """Modules and their adapters, those of one rank together, with their columns, (adapted, tokens, r)."""
        ranks = list(self._ranks[modules[0]].values())
        names = [list(self._ranks[m]) for m in modules]
        columns = [torch.split(values, ranks, dim=2) for values in seen]
        for rank in dict.fromkeys(ranks):
            places = [n for n, r in enumerate(ranks) if r == rank]
            adapted = [(m, name[n]) for n in places for m, name in zip(modules, names, strict=True)]
            yield adapted, [_joined([split[n] for n in places]) for split in columns]

    def _add_up(self, adapted: Sequence[Adapted], hs: Tensor, us: Tensor | None = None) -> None:
        weigh = self.weights.weigh
        if us is None:
            self._add(adapted, "forward", weigh(hs).mT @ hs)
            return
        of_row = self.weights.of_row[:, :, None].to(hs.device)
        grams = [self._gram(of, hs.device) for of in adapted]
        inside_a, inside_b = (_stacked(each) for each in zip(*grams, strict=True))
        for part, left, right in (
            ("backward", us, us),
            ("cross", us, hs),
            ("token_forward", hs * ((us @ inside_a) * us).sum(2, True), hs),
            ("token_backward", us * ((hs @ inside_b) * hs).sum(2, True), us),
        ):
            self._add(adapted, part, weigh(left).mT @ right)
        rows = self.weights.by_row(us, hs)
        self._add(adapted, "row_forward", (of_row * (rows.mT @ inside_a[:, None] @ rows)).sum(1))
        self._add(adapted, "row_backward", (of_row * (rows @ inside_b[:, None] @ rows.mT)).sum(1))

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

    def _gram(self, of: Adapted, device: torch.device) -> tuple[Tensor, Tensor]:
        """A A^T and B^T B, where they are needed: a model that is split has its layers elsewhere than its factors."""
        if of not in self._grams:
            a, b = (factor.detach().double() for factor in self._factors[of])
            self._grams[of] = (a @ a.T).to(device), (b.T @ b).to(device)
        return self._grams[of]

    def _add(self, adapted: Sequence[Adapted], part: str, products: Tensor) -> None:
        for (module, name), product in zip(adapted, products, strict=True):
            self.weights.totals.add((name, module, part), product)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)) if len(values) > 1 else values[0][None]


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if len(values) > 1 else values[0]
