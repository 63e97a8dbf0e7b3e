"""One adapter on one base with one set of data: what compressing, searching and sweeping have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.plan import Metric, Plan
from lorapack.core.report import Quality
from lorapack.core.statistics import Statistics
from lorapack.data.batches import Batch, batches
from lorapack.data.encode import Encoded
from lorapack.data.prepare import Prepared
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import score
from lorapack.measure.moments import Average, measure_inputs, measure_moments
from lorapack.model.head import at_once
from lorapack.model.load import Loaded
from lorapack.model.point import place, point
from lorapack.pack.pack import ShareInit, group_bases, pack_adapter
from lorapack.plan import METHODS, Method
from lorapack.watch import Watch, unwatched

CLOSE = 1.03  # a search for the smallest size ends when two sizes are this near


@dataclass(frozen=True, eq=False)
class Job:
    """What stays the same while plans are tried.

    Attributes:
        adapter: the original.
        loaded: its base, in memory once.
        prepared: the data's parts.
        average, share_init, seed, batch_tokens: see `lorapack.compress_adapter`.
        watch: sees the batches go by.
    """

    adapter: Adapter
    loaded: Loaded
    prepared: Prepared
    average: Average = "token"
    share_init: ShareInit = "closed"
    seed: int = 0
    batch_tokens: int = 4096
    watch: Watch = unwatched

    def batches(self, rows: Sequence[Encoded], logits: bool) -> list[Batch]:
        tokens = at_once(self.loaded, self.batch_tokens) if logits else self.batch_tokens
        return batches(rows, tokens, self.loaded.pad)


@dataclass(frozen=True)
class Search:
    """How the smallest size was found.

    Attributes:
        share: the gain that was to be retained.
        tried: (parameters, lower bound of the gain retained on the selection rows), in the order tried.
    """

    share: float
    tried: tuple[tuple[int, float], ...] = field(default_factory=tuple)


def measure(job: Job, needs: Metric) -> Statistics | None:
    """The statistics that a metric needs, on the calibration rows; None where it needs none."""
    if needs == "weight":
        return None
    point(job.loaded, place(job.adapter, job.loaded.device))
    return measure_moments(
        job.loaded,
        job.adapter.linear,
        job.watch("measure", job.batches(job.prepared.calibration, logits=needs == "loss")),
        loss=needs == "loss",
        average=job.average,
        provenance={
            "adapter": digest(job.adapter),
            "base_model": job.loaded.base_model,
            "data": job.prepared.facts,
        },
    )


def packed(job: Job, plan: Plan, statistics: Statistics | None) -> Adapter:
    """Carry out a plan; where layers share in closed form, their inputs are measured first."""
    inputs = None
    if plan.groups and job.share_init == "closed":
        point(job.loaded, place(job.adapter, job.loaded.device))
        bases = group_bases(job.adapter, plan)
        of_module = {m: bases[group] for group in plan.groups for m in plan.members(group)}
        calibration = job.batches(job.prepared.calibration, logits=False)
        inputs = measure_inputs(job.loaded, of_module, job.watch("measure shared", calibration), job.average)
    return pack_adapter(job.adapter, plan, statistics, inputs, job.share_init, job.seed)


def figures(job: Job, rows: Sequence[Encoded], compressed: Adapter, step: str = "evaluate") -> Quality:
    """Base, original and compressed on some rows."""
    variants = {
        "base": place(None, job.loaded.device),
        "original": place(job.adapter, job.loaded.device),
        "compressed": place(compressed, job.loaded.device),
    }
    seen = job.watch(step, job.batches(rows, logits=True))
    found = score(job.loaded, variants, "original", seen, len(rows))
    return quality(found, job.loaded.reader.classes, job.seed)


def plan_budget(budget: str, adapter: Adapter) -> int:
    """A budget in parameters: ``"50%"`` of the adapter's linear factors, or a number of them.

    Raises:
        InputError: neither, or not above 0.
    """
    whole = size(adapter).parameters
    try:
        wanted = float(budget[:-1]) / 100 * whole if budget.endswith("%") else float(int(budget))
    except ValueError:
        raise InputError(f"--budget {budget!r} is neither a percentage like 50% nor a number of parameters") from None
    if not 0 < wanted <= 1e18:
        raise InputError(f"--budget {budget!r} must be above 0")
    return int(wanted)


def chosen_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, its options checked.

    Raises:
        InputError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    METHODS[name].check_options(name, options)
    return METHODS[name]


def plan_adapter(
    adapter: Adapter,
    statistics: Statistics | None,
    method: str = "lora-drop",
    *,
    budget: str | None = None,
    **options: Any,
) -> Plan:
    """Plan with a method by its name.

    Args:
        adapter: to plan for.
        statistics: measured on it; None where the method needs none.
        method: a key of `lorapack.METHODS`.
        budget: see `plan_budget`.
        options: the method's own, for example ``threshold`` of lora-drop.

    Raises:
        InputError: an unknown method, statistics of another adapter, or what the method refuses.
    """
    chosen = chosen_method(method, options)
    measured_on = statistics.provenance.get("adapter") if statistics is not None else None
    if measured_on not in (None, digest(adapter)):
        raise InputError("the statistics were measured on another adapter; measure this one")
    if statistics is None and chosen.needs(options) != "weight":
        raise InputError(f"{method} needs measurements: give --data, or --statistics from `lorapack measure`")
    limit = plan_budget(budget, adapter) if budget is not None else None
    return chosen.run(adapter, statistics, limit, options)


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
    whole = size(job.adapter).parameters
    tried: list[tuple[int, float]] = []

    def attempt(budget: int) -> Plan | None:
        try:
            plan = method.run(job.adapter, statistics, budget, options)
        except InputError:  # too small for any plan
            return None
        smaller = packed(job, plan, statistics)
        found = figures(job, job.prepared.selection, smaller, "search").retained
        if found is None or found.low is None:
            raise InputError(
                "--retain: on the selection rows the original is not measurably better than the base; "
                "give more data, or a --budget instead"
            )
        tried.append((size(smaller).parameters, found.low))
        return plan if found.low >= share else None

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
