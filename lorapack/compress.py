"""The main job: measure, plan, pack, recover, evaluate."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import lorapack
from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.plan import Plan, check, parameters
from lorapack.core.report import VERSION, Report, type_rows
from lorapack.core.statistics import Statistics, check_fits
from lorapack.data.batches import batches
from lorapack.data.prepare import Prepared, prepare
from lorapack.data.split import SAMPLE
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import score
from lorapack.measure.moments import Average, measure_inputs, measure_moments
from lorapack.model.load import Device, DType, load
from lorapack.model.point import place, point
from lorapack.pack.pack import ShareInit, group_bases, pack_adapter
from lorapack.plan import METHODS
from lorapack.recover import recover
from lorapack.recover.recover import Objective
from lorapack.steps import Steps
from lorapack.watch import Watch, unwatched

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, eq=False)
class Compressed:
    """The smaller adapter and the record of how it was made."""

    adapter: Adapter
    report: Report


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


def plan_adapter(
    adapter: Adapter,
    statistics: Statistics,
    method: str = "lora-drop",
    *,
    threshold: float = 0.9,
    budget: str | None = None,
) -> Plan:
    """Plan with a method by its name.

    Args:
        adapter: to plan for.
        statistics: measured on it.
        method: a key of `lorapack.METHODS`.
        threshold: of lora-drop.
        budget: see `plan_budget`; instead of the threshold.

    Raises:
        InputError: an unknown method, statistics of another adapter, or what the method refuses.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    measured_on = statistics.provenance.get("adapter")
    if measured_on not in (None, digest(adapter)):
        raise InputError("the statistics were measured on another adapter; measure this one")
    limit = plan_budget(budget, adapter) if budget is not None else None
    return METHODS[method](adapter, statistics, threshold=threshold, budget=limit)


def compress_adapter(
    adapter: Adapter,
    data: str,
    base: str | None = None,
    *,
    name: str = "",
    eval_data: str | None = None,
    columns: Mapping[str, str] | None = None,
    sample: str = SAMPLE,
    seed: int = 0,
    method: str = "lora-drop",
    threshold: float = 0.9,
    budget: str | None = None,
    plan: Plan | None = None,
    statistics: Statistics | None = None,
    average: Average = "token",
    share_init: ShareInit = "closed",
    recover_steps: int = 100,
    objective: Objective = "kl",
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> Compressed:
    """Make an adapter smaller and measure what it cost.

    Args:
        adapter: to compress; unchanged.
        data: rows to calibrate, recover and (without `eval_data`) evaluate on, in disjoint parts.
        base: another place for the base model than the adapter names.
        name: what to call the adapter in the report.
        eval_data: rows of their own to evaluate on.
        columns: role to column, where the usual names do not fit.
        sample: how much of the data to calibrate on, ``"20%"`` or a number of rows.
        seed: of everything that is random.
        method, threshold, budget: see `plan_adapter`.
        plan: a plan to carry out instead.
        statistics: measured before; otherwise they are measured here.
        average: what weighs the same in the statistics, each token or each row (``sample``).
        share_init: where shared factors come from, see `lorapack.pack_adapter`.
        recover_steps: at most so many steps of recovery; 0 for none.
        objective, learning_rate, batch_size: of the recovery.
        max_length: tokens a row; batch_tokens: tokens a batch outside the recovery.
        device, dtype, trust_remote_code: see `lorapack.model.load.load`.
        watch: sees the batches of each step go by.

    Raises:
        InputError: anything given that does not fit, in one line.
    """
    if recover_steps < 0 or batch_size < 1 or batch_tokens < 1 or not learning_rate > 0:
        raise InputError("--recover-steps must be 0 or more, --batch-size, --batch-tokens and --learning-rate above 0")
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if not adapter.linear:
        raise InputError("the adapter has no linear module, so there is nothing to compress")
    if plan is not None:
        check(plan, adapter)
    if statistics is not None:
        check_fits(statistics, adapter)
    if budget is not None:
        plan_budget(budget, adapter)
    steps = Steps()
    with steps.step("load"):
        loaded = load(
            adapter, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
        )
        prepared = prepare(
            loaded,
            data,
            eval_data=eval_data,
            columns=columns,
            sample=sample,
            seed=seed,
            most_recovery=recover_steps * batch_size,
        )
    if statistics is not None:
        _check_unseen(statistics, prepared)
    calibration = batches(prepared.calibration, batch_tokens, loaded.pad)
    original = place(adapter, loaded.device)
    point(loaded, original)
    with steps.step("measure"):
        if statistics is None and plan is None:
            provenance = {"adapter": digest(adapter), "base_model": loaded.base_model, "data": prepared.facts}
            statistics = measure_moments(
                loaded, adapter.linear, watch("measure", calibration), average=average, provenance=provenance
            )
    if plan is None:
        assert statistics is not None
        plan = plan_adapter(adapter, statistics, method, threshold=threshold, budget=budget)
    with steps.step("pack"):
        inputs = None
        if plan.groups and share_init == "closed":
            bases = group_bases(adapter, plan)
            of_module = {m: bases[group] for group in plan.groups for m in plan.members(group)}
            inputs = measure_inputs(loaded, of_module, watch("measure shared", calibration), average)
        packed = pack_adapter(adapter, plan, statistics, inputs, share_init, seed)
    recovery = None
    with steps.step("recover"):
        if recover_steps and packed.linear:
            packed, recovery = recover(
                loaded,
                adapter,
                packed,
                prepared.recovery,
                prepared.selection,
                steps=recover_steps,
                objective=objective,
                learning_rate=learning_rate,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                seed=seed,
                watch=lambda items, total: watch("recover", items, total),
            )
    with steps.step("evaluate"):
        variants = {
            "base": place(None, loaded.device),
            "original": original,
            "compressed": place(packed, loaded.device),
        }
        rows = prepared.evaluation
        each = batches(rows, loaded.tokens_with_logits(batch_tokens), loaded.pad)
        found = score(loaded, variants, "original", watch("evaluate", each), len(rows))
        figures = quality(found, loaded.task, loaded.is_regression, seed)
    report = Report(
        version=VERSION,
        lorapack=lorapack.__version__,
        base_model=adapter.base_model or loaded.base_model,
        task=loaded.task,
        adapter={"name": name, "original": digest(adapter), "compressed": digest(packed)},
        before=size(adapter),
        after=size(packed),
        types=type_rows(adapter, packed),
        plan=plan,
        data=prepared.facts,
        recovery=asdict(recovery) if recovery else None,
        quality=figures,
        settings={
            "method": plan.method,
            "parameters_planned": parameters(plan, adapter),
            "share_init": share_init,
            "seed": seed,
            "dtype": str(next(loaded.base.parameters()).dtype).removeprefix("torch."),
            "device": loaded.device.type,
            "batch_tokens": batch_tokens,
        },
        versions=_versions(),
        run={"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "steps": steps.done},
    )
    return Compressed(packed, report)


def _check_unseen(statistics: Statistics, prepared: Prepared) -> None:
    """No evaluation row may have been measured on."""
    parts = statistics.provenance.get("data", {}).get("parts", {})
    seen = set(parts.get("calibration", {}).get("fingerprints", ()))
    both = seen & set(prepared.facts["parts"]["evaluation"]["fingerprints"])
    if both:
        raise InputError(
            f"{len(both)} evaluation rows were measured on for the statistics: use the --data, --seed and --sample "
            "they were measured with, or --eval-data"
        )


def _versions() -> dict[str, Any]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
