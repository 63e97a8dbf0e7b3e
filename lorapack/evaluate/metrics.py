"""Figures from row scores, each with a bootstrap interval over the rows."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lorapack.core.report import Interval, Quality
from lorapack.evaluate.scores import Numbers, Scores

RESAMPLES = 2000
LEVEL = 0.95
Counts = NDArray[np.float64]  # (resamples, rows): how often each row was drawn
Metric = Callable[[Counts, Scores], Numbers]


def resamples(rows: int, seed: int) -> Counts:
    """The rows as they are, then `RESAMPLES` drawings with replacement; (1 + RESAMPLES, rows)."""
    drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.concatenate([np.ones((1, rows)), drawn.astype(np.float64)])


def interval(values: Numbers) -> Interval:
    """The first value, with the percentile interval of the others."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn):
        return Interval(float(values[0]), None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))


def loss(counts: Counts, scores: Scores) -> Numbers:
    """Mean over the predictions, nats (or squared error)."""
    return (counts @ scores.loss) / (counts @ scores.predictions)


def perplexity(counts: Counts, scores: Scores) -> Numbers:
    return np.exp(loss(counts, scores))


def divergence(counts: Counts, scores: Scores) -> Numbers:
    return (counts @ scores.divergence) / (counts @ scores.predictions)


def agreement(counts: Counts, scores: Scores) -> Numbers:
    return (counts @ scores.agreement) / (counts @ scores.predictions)


def accuracy(counts: Counts, scores: Scores) -> Numbers:
    right = (scores.target == scores.predicted).astype(np.float64)
    found: Numbers = (counts @ right) / counts.sum(axis=1)
    return found


def f1(counts: Counts, scores: Scores, classes: int) -> Numbers:
    """Of class 1 where there are two classes, the mean over the classes otherwise."""
    table = confusion(counts, scores, classes)
    hit = np.diagonal(table, axis1=1, axis2=2)
    total = table.sum(axis=1) + table.sum(axis=2)
    with np.errstate(invalid="ignore"):
        each = np.where(total > 0, 2 * hit / total, 0.0)
    found: Numbers = each[:, 1] if each.shape[1] == 2 else each.mean(axis=1)
    return found


def matthews(counts: Counts, scores: Scores, classes: int) -> Numbers:
    """Matthews' correlation, for any number of classes (Gorodkin 2004); 0 where it is undefined."""
    table = confusion(counts, scores, classes)
    total, hit = table.sum(axis=(1, 2)), np.trace(table, axis1=1, axis2=2)
    true, predicted = table.sum(axis=2), table.sum(axis=1)
    covariance = hit * total - (true * predicted).sum(axis=1)
    spread = (total**2 - (predicted**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Numbers = np.where(spread > 0, covariance / np.sqrt(spread), 0.0)
    return found


def spearman(counts: Counts, scores: Scores) -> Numbers:
    """Rank correlation of predicted and true numbers, ties at their mean rank."""
    return np.array([_spearman(c, scores.target, scores.predicted) for c in counts])


def confusion(counts: Counts, scores: Scores, classes: int) -> Numbers:
    """(resamples, classes, classes) counts by true and predicted class."""
    cell = (scores.target * classes + scores.predicted).astype(int)
    found: Numbers = (counts @ np.eye(classes * classes)[cell]).reshape(-1, classes, classes)
    return found


def quality(scores: Mapping[str, Scores], classes: int | None, seed: int) -> Quality:
    """The figures of the variants, on the same resamples, so that differences are paired.

    Args:
        scores: by variant: ``original`` and any of ``base`` and ``compressed``, on the same rows.
        classes: of a classifier; 1 where a number is predicted; None for a language model.
        seed: of the resampling.
    """
    rows = len(scores["original"].loss)
    counts = resamples(rows, seed)
    metrics: dict[str, Metric] = {"loss": loss}
    if classes is None:
        metrics["perplexity"] = perplexity
    elif classes == 1:
        metrics = {"squared error": loss, "spearman": spearman}
    else:
        metrics |= {
            "accuracy": accuracy,
            "f1": partial(f1, classes=classes),
            "matthews": partial(matthews, classes=classes),
        }
    table = {
        name: {variant: interval(metric(counts, found)) for variant, found in scores.items()}
        for name, metric in metrics.items()
    }
    kept = None
    if {"base", "compressed"} <= scores.keys():
        kept = retained(*(loss(counts, scores[variant]) for variant in ("base", "original", "compressed")))
    other = scores.get("compressed")
    increase = loss(counts, other) - loss(counts, scores["original"]) if other else None
    return Quality(
        rows=rows,
        predictions=int(scores["original"].predictions.sum()),
        metrics=table,
        divergence=interval(divergence(counts, other)) if other else None,
        agreement=interval(agreement(counts, other)) if other and classes != 1 else None,
        retained=kept,
        increase=None if increase is None else interval(increase),
    )


def retained(base: Numbers, original: Numbers, compressed: Numbers) -> Interval | None:
    """Gain retained, (base - compressed) / (base - original) in loss.

    None where the interval of the gain itself reaches zero: a share of nothing says nothing.
    """
    gain = base - original
    low = interval(gain).low
    if low is None or not low > 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval(np.where(gain > 0, (base - compressed) / gain, np.nan))


def _spearman(count: Numbers, target: Numbers, predicted: Numbers) -> float:
    chosen = np.repeat(np.arange(len(count)), count.astype(int))
    a, b = _ranks(target[chosen]), _ranks(predicted[chosen])
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def _ranks(values: Numbers) -> Numbers:
    _, where, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[where]
