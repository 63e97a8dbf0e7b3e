"""What each variant of the model does on each row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.model.forward import divergences, losses_of, outcomes
from lorapack.model.head import features, logits, parts
from lorapack.model.load import Loaded
from lorapack.model.memory import piecewise
from lorapack.model.point import Placed, point
from lorapack.processes import add_up, rounds

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums a row, so that any resampling of the rows is a weighted sum. All (rows,) float64.

    Attributes:
        predictions: how many tokens (or 1 label) were predicted.
        loss: sum over them of the cross entropy in nats, or the squared error.
        divergence: sum of KL(original || this) in nats; 0 for the original.
        agreement: how often the most likely prediction is the original's.
        target, predicted: with a label: the class or number, true and predicted.
    """

    predictions: Numbers
    loss: Numbers
    divergence: Numbers
    agreement: Numbers
    target: Numbers
    predicted: Numbers


FIELDS = tuple(field.name for field in fields(Scores))


def joined(parts: Sequence[Scores]) -> Scores:
    """Of some rows and then others."""
    return Scores(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS})


def score(
    loaded: Loaded, variants: Mapping[str, Placed], reference: str, batches: Iterable[Batch], rows: int
) -> dict[str, Scores]:
    """Run every variant on every batch.

    Args:
        loaded: the base model; it is left pointing at the last variant.
        variants: the factors to compare.
        reference: the variant that the others are compared with.
        batches: together they have each of the rows once.
        rows: how many there are.
    """
    tables = {name: {field: np.zeros(rows) for field in FIELDS} for name in variants}
    with torch.no_grad():
        for batch in rounds(batches):
            for places, found in piecewise(loaded, batch, partial(_scores, loaded, variants, reference)):
                for name, table in found.items():
                    for field, values in table.items():
                        tables[name][field][places] = values
    add_up([torch.from_numpy(values) for table in tables.values() for values in table.values()])
    return {name: Scores(**table) for name, table in tables.items()}


def _scores(
    loaded: Loaded, variants: Mapping[str, Placed], reference: str, batch: Batch
) -> tuple[list[int], dict[str, dict[str, Numbers]]]:
    """The places of a batch's rows, and what `Scores` holds of them, by variant."""
    names = [reference, *(name for name in variants if name != reference)]
    tables = {name: {field: np.zeros(len(batch.places)) for field in FIELDS} for name in names}
    seen = {}
    for name in names:
        point(loaded, variants[name])
        seen[name] = features(loaded, batch)
    for part in parts(loaded, seen[reference]):
        of_reference: tuple[Tensor, Tensor, Tensor] | None = None
        for name in names:
            ours = seen[name]
            found = logits(loaded, variants[name], ours, ours.values[part])
            outcome, best = outcomes(loaded, found), found.argmax(-1)
            if of_reference is None:  # it comes first
                of_reference = outcome, outcome.exp(), best
            teacher, expected, top = of_reference
            which, targets = ours.rows[part].cpu().numpy(), ours.targets[part]
            value = found[:, 0] if loaded.is_regression else best
            table = tables[name]
            for field, values in (
                ("predictions", torch.ones_like(value)),
                ("loss", losses_of(loaded, outcome, targets)),
                ("divergence", divergences(loaded, teacher, expected, outcome)),
                ("agreement", best == top),
            ):
                np.add.at(table[field], which, values.double().cpu().numpy())
            if loaded.task == "SEQ_CLS":
                table["target"][which] = targets.double().cpu().numpy()
                table["predicted"][which] = value.double().cpu().numpy()
    return list(batch.places), tables
