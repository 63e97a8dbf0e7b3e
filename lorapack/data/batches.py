"""Batches of rows of similar length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapack.data.encode import IGNORED, Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded rows.

    Attributes:
        input_ids, attention_mask: (rows, length) int64, padded on the right.
        labels: (rows, length) int64 for a language model, (rows,) otherwise.
        token_types: (rows, length) int64 or None.
        places: (rows,) where each row stands in the sequence that was batched.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_types: Tensor | None
    places: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        types = self.token_types.to(device) if self.token_types is not None else None
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), types, self.places
        )


def batches(rows: Sequence[Encoded], tokens: int, pad: int) -> list[Batch]:
    """All rows, longest first (memory runs out at once or not at all), at most `tokens` a batch, padding included."""
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].input_ids), place))
    found, at = [], 0
    while at < len(order):
        count = max(1, tokens // len(rows[order[at]].input_ids))
        found.append(collate([(place, rows[place]) for place in order[at : at + count]], pad))
        at += count
    return found


def training_batches(rows: Sequence[Encoded], size: int, steps: int, pad: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of rows of similar length, in random order, epoch after epoch.

    They have `size` rows, or fewer where that is no divisor of the number of rows: as many batches as needed,
    in which the numbers of rows differ by one at most. A remainder of a row or two would be a step like any other.
    """
    generator = random.Random(seed)
    count, made = -(-len(rows) // size), 0
    while True:
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].input_ids) + 8 * generator.random())
        chunks = [order[len(order) * n // count : len(order) * (n + 1) // count] for n in range(count)]
        generator.shuffle(chunks)
        for chunk in chunks:
            if made == steps:
                return
            made += 1
            yield collate([(place, rows[place]) for place in chunk], pad)


def cut(batch: Batch, tokens: int) -> Iterator[Batch]:
    """A batch in pieces of at most `tokens`, padding included, or one row; longest rows first."""
    lengths = batch.attention_mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    at = 0
    while at < len(order):
        length = int(lengths[order[at]])
        rows = order[at : at + max(1, tokens // length)]
        at += len(rows)
        yield chosen(batch, rows, length)


def chosen(batch: Batch, rows: Tensor, length: int) -> Batch:
    """Some rows of a batch, (n,) int64, padded to a length that none of them has more of."""
    labels = batch.labels[rows]
    return Batch(
        batch.input_ids[rows, :length],
        batch.attention_mask[rows, :length],
        labels[:, :length] if labels.ndim == 2 else labels,
        batch.token_types[rows, :length] if batch.token_types is not None else None,
        tuple(batch.places[row] for row in rows.tolist()),
    )


def stand_in(of_tokens: bool) -> Batch:
    """A row that is in no data, of two tokens; its labels are of each token, or of the row."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), ids if of_tokens else ids[:, 0], None, (-1,))


def collate(rows: Sequence[tuple[int, Encoded]], pad: int) -> Batch:
    length = max(len(row.input_ids) for _, row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*v, *[fill] * (length - len(v))] for v in values])

    first = rows[0][1].labels
    labels = (
        padded([r.labels for _, r in rows if isinstance(r.labels, tuple)], IGNORED)
        if isinstance(first, tuple)
        else torch.tensor([r.labels for _, r in rows])
    )
    types = [r.token_types for _, r in rows if r.token_types is not None]
    return Batch(
        padded([r.input_ids for _, r in rows], pad),
        padded([[1] * len(r.input_ids) for _, r in rows], 0),
        labels,
        padded(types, 0) if types else None,
        tuple(place for place, _ in rows),
    )
