"""The model in two stages: the body once, then the head where it counts, a chunk at a time.

A language model's head turns hidden states into one logit a word of the vocabulary. For all tokens of
a batch that is by far the largest tensor of a step, and nearly all of it is thrown away: nothing is
predicted inside a prompt. Here the head sees only the positions with a label, so many at a time that
their logits fit in `CHUNK` numbers. What the model itself does around its head (a cap, a scale) stays
the model's: its own `forward` runs, with the body's part of it done already.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapack.data.batches import Batch
from lorapack.data.encode import IGNORED
from lorapack.model.forward import acts_on_head, inputs, no_cache, predict, single
from lorapack.model.load import Loaded
from lorapack.model.point import Placed, point

CHUNK = 2**23  # logits at a time: 32 MB of float32, a handful of which are alive at once

# what a model's body returns, by model; None where body and head cannot be told apart
_split: "weakref.WeakKeyDictionary[Loaded, type | None]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Features:
    """The model's last hidden states where something is to be predicted; row by row of the batch.

    Attributes:
        values: (n, width) what the head is given, or (n, classes) logits where the head is done already.
        targets: (n,) the class, or the number for regression.
        rows: (n,) which row of the batch each belongs to.
        headless: whether the head is still to be applied.
    """

    values: Tensor
    targets: Tensor
    rows: Tensor
    headless: bool

    def __len__(self) -> int:
        return len(self.targets)


def features(loaded: Loaded, batch: Batch) -> Features:
    """Run the body. For a classifier, and a model whose head cannot be told apart, this is the whole model."""
    if not separable(loaded):
        found = predict(loaded, batch)
        return Features(found.logits, found.targets, found.rows, headless=False)
    hidden = loaded.base.base_model(**inputs(batch), **no_cache(loaded))[0].to(batch.labels.device)  # of a split model
    wanted = batch.labels[:, 1:] != IGNORED  # the state at t predicts the token at t + 1
    return Features(hidden[:, :-1][wanted], batch.labels[:, 1:][wanted], wanted.nonzero()[:, 0], headless=True)


def logits(loaded: Loaded, placed: Placed | None, found: Features, states: Tensor) -> Tensor:
    """(n, classes) float32 of some of the states of `found`, (n, width).

    Where the adapter acts on the head, its factors of `placed` are used; None for those that are in use.
    """
    if not found.headless:
        return states
    if placed is not None and acts_on_head(loaded):
        point(loaded, placed)
    with _body_done(loaded, states[None].clone()):  # FSDP minds that its module gives a view
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        output: Tensor = loaded.base(input_ids=ids, **no_cache(loaded)).logits[0]
    return single(output.to(states.device))


def backward(
    loaded: Loaded, found: Features, chunk: Callable[[slice, Tensor], None], beside: Tensor | None = None
) -> None:
    """The backward pass in two stages: chunk by chunk through the head, then once through the body.

    Args:
        loaded: the model.
        found: with a graph.
        chunk: given a stretch of the positions and their states, (n, width), it computes its part of the
            loss from them and calls `backward`.
        beside: a part of the loss that the body alone decides.
    """
    slopes = torch.zeros_like(found.values)
    for part in parts(loaded, found):
        states = found.values[part].detach().requires_grad_()
        chunk(part, states)
        if states.grad is not None:
            slopes[part] = states.grad
    reached = [(found.values, slopes)] if found.values.requires_grad else []
    if beside is not None and beside.requires_grad:
        reached.append((beside, torch.ones_like(beside)))
    if reached:
        torch.autograd.backward([loss for loss, _ in reached], [slope for _, slope in reached])


def parts(loaded: Loaded, found: Features) -> list[slice]:
    """Stretches of the positions whose logits fit in `CHUNK`."""
    classes = loaded.base.config.get_text_config().vocab_size if found.headless else found.values.shape[1]
    size = max(1, CHUNK // classes)
    return [slice(start, start + size) for start in range(0, len(found), size)]


def at_once(loaded: Loaded, tokens: int) -> int:
    """How many of `tokens` a batch may have: fewer where the model's own head makes logits of all of them."""
    return tokens if separable(loaded) else loaded.tokens_with_logits(tokens)


def separable(loaded: Loaded) -> bool:
    """Whether body and head, run apart, are the model: tried once on a few tokens.

    It is not for a model whose `forward` does not call its body as a whole (OPT), or that hands the
    head more than the last hidden state.
    """
    if loaded not in _split:
        _split[loaded] = _tried(loaded) if loaded.task == "CAUSAL_LM" else None
    return _split[loaded] is not None


def _tried(loaded: Loaded) -> type | None:
    ids = torch.arange(1, 5, device=loaded.device)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        try:
            whole = loaded.base(**given, **no_cache(loaded)).logits
            output = loaded.base.base_model(**given, **no_cache(loaded))
            _split[loaded] = type(output)
            with _body_done(loaded, output[0]) as calls:
                apart = loaded.base(input_ids=ids, **no_cache(loaded)).logits
        except (TypeError, ValueError, AttributeError, KeyError, IndexError):  # a forward of another make
            return None
    same = len(calls) == 1 and whole.shape == apart.shape and torch.allclose(whole, apart, rtol=1e-3, atol=1e-4)
    return type(output) if same else None


@contextlib.contextmanager
def _body_done(loaded: Loaded, hidden: Tensor) -> Iterator[list[int]]:
    """For as long as the block runs, the body gives these hidden states, whatever it is given."""
    body, kind, calls = loaded.base.base_model, _split[loaded], []
    before = vars(body).get("forward")
    assert kind is not None

    def done(*_: Any, **__: Any) -> Any:
        calls.append(1)
        return kind(last_hidden_state=hidden)

    body.forward = done
    try:
        yield calls
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
