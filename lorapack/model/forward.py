"""Run a batch: through the body alone, or up to the logits that count."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lorapack.data.batches import Batch
from lorapack.data.encode import IGNORED
from lorapack.model.load import Loaded


@dataclass(frozen=True, eq=False)
class Predictions:
    """The model's output where something is to be predicted.

    Attributes:
        logits: (n, classes) float32.
        targets: (n,) the class, or the number for regression.
        rows: (n,) which row of the batch each belongs to.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


def inputs(batch: Batch) -> dict[str, Tensor]:
    found = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return found | ({"token_type_ids": batch.token_types} if batch.token_types is not None else {})


def run_body(loaded: Loaded, batch: Batch) -> None:
    """Run the layers without the head, unless the adapter acts on the head."""
    base = loaded.base
    run = base if acts_on_head(loaded) else base.base_model
    run(**inputs(batch), **no_cache(loaded))


def predict(loaded: Loaded, batch: Batch) -> Predictions:
    """The logits at the positions with a label.

    A language model's head sees only the columns that have one, unless the adapter acts on it: then
    it sees all tokens, as every other layer does.
    """
    base = loaded.base
    if loaded.task == "SEQ_CLS":
        logits = single(base(**inputs(batch), **no_cache(loaded)).logits)
        return Predictions(logits, batch.labels, torch.arange(len(logits), device=logits.device))
    wanted = batch.labels[:, 1:] != IGNORED  # the logits at t predict the token at t + 1
    columns = wanted.any(dim=0).nonzero()[:, 0]
    options = no_cache(loaded)
    if "logits_to_keep" in inspect.signature(base.forward).parameters and not acts_on_head(loaded):
        logits = base(**inputs(batch), logits_to_keep=columns, **options).logits
    else:
        logits = base(**inputs(batch), **options).logits[:, columns]
    chosen = wanted[:, columns]
    rows = chosen.nonzero()[:, 0]
    return Predictions(single(logits[chosen]), batch.labels[:, 1:][:, columns][chosen], rows)


def single(values: Tensor) -> Tensor:
    """In float32 where they are coarser: a sum over the vocabulary needs it, and factors of float32 compute in it."""
    return values if values.dtype == torch.float64 else values.float()


def losses(loaded: Loaded, found: Predictions) -> Tensor:
    """(n,) the loss of each prediction: cross entropy, or squared error for regression."""
    return losses_of(loaded, outcomes(loaded, found.logits), found.targets)


def outcomes(loaded: Loaded, logits: Tensor) -> Tensor:
    """(n, classes) log-probabilities; of regression the number as it is. A pass over the vocabulary: made once."""
    return logits if loaded.is_regression else functional.log_softmax(logits, -1)


def losses_of(loaded: Loaded, outcome: Tensor, targets: Tensor) -> Tensor:
    """(n,) as `losses`, of `outcomes`."""
    if loaded.is_regression:
        return (outcome[:, 0] - targets.to(outcome.dtype)) ** 2
    return functional.nll_loss(outcome, targets, reduction="none")


def divergences(loaded: Loaded, teacher: Tensor, expected: Tensor, student: Tensor) -> Tensor:
    """(n,) KL(teacher || student) of the predicted distributions; squared difference for regression.

    Args:
        teacher, student: `outcomes`.
        expected: the teacher's exponential, the same for all students.
    """
    if loaded.is_regression:
        return ((teacher - student) ** 2)[:, 0]
    found: Tensor = torch.linalg.vecdot(expected, teacher - student)
    return found


def acts_on_head(loaded: Loaded) -> bool:
    inside = {id(module) for module in loaded.base.base_model.modules()}
    return any(id(layer) not in inside for layer in loaded.layers.values())


def no_cache(loaded: Loaded) -> dict[str, bool]:
    return {"use_cache": False} if loaded.task == "CAUSAL_LM" else {}
