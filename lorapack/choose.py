"""Choosing among plans on the selection rows: the nearest to the original, or the smallest that keeps enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapack.core.adapter import Adapter, size
from lorapack.core.paired import error_of_sum
from lorapack.core.plan import Plan, parameters
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import Numbers, Scores, joined
from lorapack.job import Job, packed, scores
from lorapack.measure.measure import measure_rows_again
from lorapack.pack.store import sides, store_adapter
from lorapack.plan import Method
from lorapack.processes import from_first

CLOSE = 1.03  # a search for the smallest size ends when two sizes are this near
FIRST, LEAST = 8, 200  # rows, and predictions, after which plans are compared for the first time
BEHIND = 3.0  # standard errors by which a plan is farther away than the nearest when no more rows are spent on it
ALIKE = 0.02  # of the distance: plans that differ by no more are not worth more rows


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan, the statistics that it was made from and has to be packed with, and what it comes to as it is stored."""

    plan: Plan
    statistics: Statistics | None
    adapter: Adapter


@dataclass(frozen=True)
class Search:
    """How the smallest size was found.

    Attributes:
        share: the gain that was to be retained.
        tried: (parameters, lower bound of the gain retained on the selection rows), in the order tried.
    """

    share: float
    tried: tuple[tuple[int, float], ...] = field(default_factory=tuple)


def best_plan(
    job: Job, statistics: Statistics | None, method: Method, budget: int | None, options: Mapping[str, Any]
) -> tuple[Plan, Statistics | None]:
    """The method's plan; where it has options to try that are not given, the best of several on the selection rows.

    The best is the nearest to the original's predictions (`nearest`), without recovery. A method that wants it
    (`Method.again`) is asked once more with what is measured where its first plan has changed the model; the best of
    all these plans is taken.

    Returns:
        The plan, and the statistics that it was made from and has to be packed with.

    Raises:
        InputError: what the method refuses.
    """
    plans = _plans(job, statistics, method, budget, options)
    # statistics of many adapters in one pass of the base: another pass for each is what they are to save
    on_base = statistics is not None and statistics.provenance.get("activations") == "base"
    once = not method.again or on_base
    if not job.prepared.selection or (len(plans) == 1 and once):
        return plans[0], statistics
    best, _ = _best(job, _candidates(job, plans, statistics))
    if once or statistics is None:
        return best.plan, best.statistics
    again = measure_rows_again(
        job.loaded,
        job.adapter,
        packed(job, best.plan, statistics),
        job.prepared,
        statistics,
        average=job.average,
        batch_tokens=job.batch_tokens,
        watch=job.watch,
    )
    others = _plans(job, again, method, budget, options)
    best, _ = _best(job, [best, *_candidates(job, others, again)])
    return best.plan, best.statistics


def _plans(
    job: Job, statistics: Statistics | None, method: Method, budget: int | None, options: Mapping[str, Any]
) -> list[Plan]:
    """One for each combination of the options that are to be tried, the same ones once."""
    variants: list[Mapping[str, Any]] = [options]
    for option, values in method.tried.items():
        if option not in options:
            variants = [{**variant, option: value} for variant in variants for value in values]
    plans = from_first([method.run(job.adapter, statistics, budget, variant) for variant in variants])
    return [
        plan
        for n, plan in enumerate(plans)
        if (plan.choices, plan.metric) not in [(p.choices, p.metric) for p in plans[:n]]
    ]


def _candidates(job: Job, plans: Sequence[Plan], statistics: Statistics | None) -> list[Candidate]:
    of_store = sides(job.adapter, statistics if job.store else None)
    return [Candidate(p, statistics, store_adapter(packed(job, p, statistics), job.store, of_store)) for p in plans]


def _best(job: Job, candidates: Sequence[Candidate]) -> tuple[Candidate, list[Scores]]:
    place, seen = nearest(job, [candidate.adapter for candidate in candidates])
    return candidates[place], seen


def nearest(job: Job, adapters: Sequence[Adapter]) -> tuple[int, list[Scores]]:
    """Which of several adapters is the nearest to the original on the selection rows: has the least divergence, summed.

    A race: all are looked at on a few rows (`FIRST`, with at least `LEAST` predictions), then each time on twice as
    many. One that is behind the nearest by more than `BEHIND` standard errors of the difference, row by row, is out.
    It ends when no other can be nearer by more than `ALIKE`, or with the rows. So among language models, which differ
    clearly, it takes a part of the rows; among classifiers, with one prediction a row, it takes them all.

    Returns:
        Its place, and its scores on the rows that it was looked at on, the first ones.
    """
    rows = job.prepared.selection
    left = list(range(len(adapters)))
    found: dict[int, list[Scores]] = {n: [] for n in left}
    predictions, at, until = 0.0, 0, FIRST
    while len(left) > 1 and at < len(rows):
        heat = rows[at:until]
        compared = {"original": job.adapter} | {str(n): adapters[n] for n in left}
        seen = scores(job, heat, compared, "try")
        for n in left:
            found[n].append(seen[str(n)])
        predictions += float(seen["original"].predictions.sum())
        at, until = at + len(heat), 2 * until
        if predictions >= LEAST:
            left = not_behind({n: joined(found[n]).divergence for n in left})
    best = min(left, key=lambda n: sum(float(part.divergence.sum()) for part in found[n]))
    return best, found[best]


def not_behind(distances: Mapping[int, Numbers]) -> list[int]:
    """Who may still be the nearest; the nearest so far alone, where no other can be nearer by more than `ALIKE`.

    Args:
        distances: of each the divergence on the rows so far, (rows,).
    """
    best = min(distances, key=lambda n: distances[n].sum())
    behind = {n: values - distances[best] for n, values in distances.items()}
    errors = {n: error_of_sum(values) for n, values in behind.items()}
    left = [n for n, values in behind.items() if values.sum() <= BEHIND * errors[n]]
    worth = ALIKE * distances[best].sum()
    return left if any(errors[n] * BEHIND - behind[n].sum() > worth for n in left if n != best) else [best]


def smallest_plan(
    job: Job, statistics: Statistics | None, method: Method, options: Mapping[str, Any], share: float
) -> tuple[Plan, Search]:
    """The smallest plan whose gain retained, without recovery, has its lower bound above `share`.

    Bisection over the budget, on a logarithmic scale, with the statistics measured once. The figure
    is taken on the selection rows, so the evaluation rows stay unseen.

    Args:
        job: the adapter and the data.
        statistics: what the method needs.
        method, options: how to plan for a budget.
        share: of the gain, above 0 and below 1.

    Raises:
        InputError: the gain cannot be told from nothing on the selection rows, or even the whole
            adapter does not reach the share.
    """
    whole, rows = size(job.adapter).parameters, job.prepared.selection
    tried: list[tuple[int, float]] = []
    known = scores(job, rows, {"original": job.adapter, "base": None}, "search")

    def attempt(budget: int) -> Plan | None:
        try:
            plans = _plans(job, statistics, method, budget, options)
        except InputError:  # too small for any plan
            return None
        best, seen = _best(job, _candidates(job, plans, statistics))
        rest = rows[sum(len(part.loss) for part in seen) :]
        if rest:
            seen.append(scores(job, rest, {"compressed": best.adapter}, "search")["compressed"])
        found = quality(known | {"compressed": joined(seen)}, job.loaded.reader.classes, job.seed).retained
        if found is None or found.low is None:
            raise InputError(
                "--retain: on the selection rows the original is not measurably better than the base; "
                "give more data, or a --budget instead"
            )
        tried.append((parameters(best.plan, job.adapter), found.low))
        return best.plan if found.low >= share else None

    best = attempt(whole)
    if best is None:
        raise InputError(f"--retain {share:.1%}: even the whole adapter does not keep that much with this method")
    low, high = max(1, whole // 1000), whole
    while high > low * CLOSE:
        middle = int((low * high) ** 0.5)
        plan = attempt(middle)
        if plan is None:
            low = middle
        else:
            best, high = plan, middle
    return best, Search(share, tuple(tried))
