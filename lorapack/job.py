"""One adapter on one base with one set of data: what compressing, searching and sweeping have in common."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.codes import Store, bytes_of_atom
from lorapack.core.plan import Plan
from lorapack.core.report import Quality
from lorapack.core.statistics import Need, Statistics
from lorapack.data.batches import Batch, batches
from lorapack.data.encode import Encoded
from lorapack.data.prepare import Prepared
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import Scores, score
from lorapack.measure.measure import measure_rows
from lorapack.measure.moments import measure_inputs
from lorapack.measure.sums import Average
from lorapack.model.head import at_once
from lorapack.model.load import Loaded
from lorapack.model.point import place, point
from lorapack.pack.pack import ShareInit, module_bases, pack_adapter
from lorapack.plan import DEFAULT, METHODS, Method
from lorapack.processes import from_first
from lorapack.watch import Watch, unwatched

UNITS: dict[str, float] = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


@dataclass(frozen=True, eq=False)
class Job:
    """What stays the same while plans are tried.

    Attributes:
        adapter: the original.
        loaded: its base, in memory once.
        prepared: the data's parts.
        average, share_init, seed, batch_tokens, store: see `lorapack.compress_adapter`.
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
    store: Store | None = None

    def batches(self, rows: Sequence[Encoded], logits: bool) -> list[Batch]:
        tokens = at_once(self.loaded, self.batch_tokens) if logits else self.batch_tokens
        return batches(rows, tokens, self.loaded.pad)


def measure(job: Job, needs: Collection[Need]) -> Statistics | None:
    """What plans need, on the calibration rows; None where they need nothing."""
    if not set(needs) - {"nothing"}:
        return None
    return measure_rows(
        job.loaded,
        job.adapter,
        job.prepared,
        needs,
        average=job.average,
        seed=job.seed,
        batch_tokens=job.batch_tokens,
        watch=job.watch,
    )


def packed(job: Job, plan: Plan, statistics: Statistics | None) -> Adapter:
    """Carry out a plan; where layers share in closed form, their inputs are measured first."""
    inputs = None
    if plan.groups and job.share_init == "closed":
        point(job.loaded, place(job.adapter, job.loaded.device))
        of_module = module_bases(job.adapter, plan, job.seed)
        calibration = job.batches(job.prepared.calibration, logits=False)
        inputs = measure_inputs(job.loaded, of_module, job.watch("measure shared", calibration), job.average)
    return from_first(pack_adapter(job.adapter, plan, statistics, inputs, job.share_init, job.seed))


def scores(job: Job, rows: Sequence[Encoded], adapters: Mapping[str, Adapter | None], step: str) -> dict[str, Scores]:
    """Adapters (None is the base alone) on some rows; the first is the one that the others are compared with."""
    variants = {name: place(adapter, job.loaded.device) for name, adapter in adapters.items()}
    seen = job.watch(step, job.batches(rows, logits=True))
    return score(job.loaded, variants, next(iter(adapters)), seen, len(rows))


def figures(job: Job, rows: Sequence[Encoded], compressed: Adapter, step: str = "evaluate") -> Quality:
    """Base, original and compressed on some rows."""
    found = scores(job, rows, {"original": job.adapter, "base": None, "compressed": compressed}, step)
    return quality(found, job.loaded.reader.classes, job.seed)


def plan_budget(budget: str, adapter: Adapter, store: Store | None = None) -> int:
    """A budget in parameters of the linear factors.

    Bytes (`byte_budget`) are turned into the parameters that surely fit, scales included.

    Args:
        budget: ``"50%"`` of the parameters (with a store: of the bytes), a number of parameters, or
            bytes: ``"200KB"``.
        adapter: the original.
        store: how the result will be stored; None for the checkpoint's own type.

    Raises:
        InputError: none of these, or not above 0.
    """
    limit = byte_budget(budget, adapter, store)
    if limit is not None:
        wanted = limit / max(_bytes_a_parameter(adapter, module, store) for module in adapter.linear)
    else:
        try:
            whole = size(adapter).parameters
            wanted = float(budget[:-1]) / 100 * whole if budget.endswith("%") else float(int(budget))
        except ValueError:
            raise InputError(
                f"--budget {budget!r} is neither a percentage like 50% nor a number of parameters, nor bytes like 200KB"
            ) from None
    if not 0 < wanted <= 1e18:
        raise InputError(f"--budget {budget!r} must be above 0")
    return int(wanted)


def byte_budget(budget: str, adapter: Adapter, store: Store | None = None) -> float | None:
    """The bytes that the linear factors may take; None for a budget in parameters.

    ``"5000B"``, ``"200KB"``, ``"1.5MB"`` (1 KB = 1000 B), or, with a store, ``"5%"`` of the original's bytes.
    """
    units = UNITS | ({"%": size(adapter).bytes / 100} if store is not None else {})
    unit = next((unit for unit in units if budget.upper().endswith(unit)), "")
    try:
        return float(budget[: -len(unit)]) * units[unit] if unit else None
    except ValueError:
        return None


def _bytes_a_parameter(adapter: Adapter, module: str, store: Store | None) -> float:
    """At most, whatever the rank."""
    factors = adapter.factors(module)
    if store is None:
        return max(factors.A.element_size(), factors.B.element_size())
    return bytes_of_atom(store, sum(factors.shape)) / sum(factors.shape)


def chosen_method(name: str, options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """A method by its name, and its options as values (they may be given as text).

    Raises:
        InputError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name], METHODS[name].parse(name, options)


def plan_adapter(
    adapter: Adapter,
    statistics: Statistics | None,
    method: str = DEFAULT,
    *,
    budget: str | None = None,
    store: Store | None = None,
    **options: Any,
) -> Plan:
    """Plan with a method by its name.

    Args:
        adapter: to plan for.
        statistics: measured on it; None where the method needs none.
        method: a key of `lorapack.METHODS`.
        budget, store: see `plan_budget`.
        options: the method's own, for example ``threshold`` of lora-drop.

    Raises:
        InputError: an unknown method, statistics of another adapter, or what the method refuses.
    """
    chosen, options = chosen_method(method, options)
    if statistics is not None:
        check_measured(adapter, statistics)
    if statistics is None and chosen.needs(options) != "nothing":
        raise InputError(f"{method} needs measurements: give --data, or --statistics from `lorapack measure`")
    limit = plan_budget(budget, adapter, store) if budget is not None else None
    return chosen.run(adapter, statistics, limit, options)


def check_measured(adapter: Adapter, statistics: Statistics) -> None:
    """Refuse statistics of another adapter.

    Raises:
        InputError: they are.
    """
    if statistics.provenance.get("adapter") not in (None, digest(adapter)):
        raise InputError("the statistics were measured on another adapter; measure this one")
