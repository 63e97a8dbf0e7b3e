"""The main job: measure, plan, pack, recover, evaluate."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lorapack
from lorapack.choose import Search, best_plan, smallest_plan
from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.codes import STORES, Sparse, Store
from lorapack.core.plan import Plan, check, cuts_ranks, parameters
from lorapack.core.report import VERSION, Report, breakdown
from lorapack.core.statistics import NEEDED, Need, Statistics, check_fits
from lorapack.data.prepare import Prepared, prepare
from lorapack.data.split import SAMPLE
from lorapack.errors import InputError
from lorapack.job import (
    Job,
    byte_budget,
    check_measured,
    chosen_method,
    figures,
    measure,
    packed,
    plan_adapter,
    plan_budget,
)
from lorapack.measure.sums import Average
from lorapack.model.load import Device, DType, Loaded, load
from lorapack.pack.pack import ShareInit, pack_adapter
from lorapack.pack.store import sides, store_adapter
from lorapack.plan import DEFAULT
from lorapack.recover import Recovery, Settings, recover, rows_a_step
from lorapack.recover.mask import RankMask
from lorapack.recover.objective import Objective
from lorapack.recover.recover import Stop, unstopped
from lorapack.recover.refit import Refit
from lorapack.recover.refit import refit as refit_adapter
from lorapack.steps import Steps
from lorapack.watch import Watch, unwatched

RETAIN = 0.99
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, eq=False)
class Compressed:
    """The smaller adapter and the record of how it was made."""

    adapter: Adapter
    report: Report


def compress_adapter(
    adapter: Adapter,
    data: str | None,
    base: str | None = None,
    *,
    name: str = "",
    eval_data: str | None = None,
    columns: Mapping[str, str] | None = None,
    sample: str = SAMPLE,
    seed: int = 0,
    method: str = DEFAULT,
    budget: str | None = None,
    retain: float | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    statistics: Statistics | None = None,
    average: Average = "token",
    share_init: ShareInit = "closed",
    store: Store | None = None,
    recover_steps: int = 100,
    objective: Objective = "both",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    refit: bool | None = None,
    rank_dropout: float = 0.0,
    rank_mask: RankMask = "token",
    checkpointing: bool = False,
    state: str | None = None,
    resume: bool = False,
    stop: Stop = unstopped,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    loaded: Loaded | None = None,
    prepared: Prepared | None = None,
    watch: Watch = unwatched,
) -> Compressed:
    """Make an adapter smaller and measure what it cost.

    Args:
        adapter: to compress; unchanged.
        data: rows to calibrate, recover and (without `eval_data`) evaluate on, in disjoint parts.
            None, where the method or the statistics allow it, compresses without looking at the
            base model at all: no recovery, and no figures of quality.
        base: another place for the base model than the adapter names.
        name: what to call the adapter in the report.
        eval_data: rows of their own to evaluate on.
        columns: role to column, where the usual names do not fit.
        sample: how much of the data to calibrate on, ``"20%"`` or a number of rows.
        seed: of everything that is random.
        method, budget, options: see `lorapack.plan_adapter`.
        retain: instead of a budget, the share of the gain to keep: the smallest size whose lower
            bound is above it on the selection rows, before recovery. `RETAIN` where the default
            method gets neither.
        plan: a plan to carry out instead.
        statistics: measured before; otherwise they are measured here.
        average: what weighs the same in the statistics, each token or each row (``sample``).
        share_init: where shared factors come from, see `lorapack.pack_adapter`.
        store: how the factors are held in the result, after recovery: ``fp32``, ``bf16``, ``fp16``, ``int8`` or
            ``int4`` (docs/store.md). None for the checkpoint's own type.
        recover_steps: at most so many steps of recovery; 0 for none.
        objective, learning_rate, batch_size, rank_dropout, rank_mask, checkpointing: of the recovery,
            see `lorapack.recover.Settings`.
        refit: least squares before the first step, where that is better on the selection rows; by
            default where there are steps.
        state, resume, stop: a file for the recovery's state, see `lorapack.recover.recover`.
        max_length: tokens a row; batch_tokens: tokens a batch outside the recovery.
        device, dtype, trust_remote_code: see `lorapack.model.load.load`.
        loaded, prepared: this adapter's base and these data, where they are in memory already.
        watch: sees the batches of each step go by.

    Raises:
        InputError: anything given that does not fit, in one line.
    """
    chosen, options = chosen_method(method, options or {})
    if method == DEFAULT and data is not None and plan is None and budget is None and retain is None:
        retain = RETAIN
    how = Settings(recover_steps, objective, learning_rate, batch_size, rank_dropout, rank_mask, checkpointing)
    check_state(state, resume)
    _check_numbers(batch_tokens, budget, retain)
    if not adapter.linear:
        raise InputError("the adapter has no linear module, so there is nothing to compress")
    if plan is not None:
        check(plan, adapter)
    if statistics is not None:
        check_fits(statistics, adapter)
        check_measured(adapter, statistics)
    if store is not None and store not in STORES:
        raise InputError(f"--store {store!r} is none of {', '.join(STORES)}")
    if budget is not None:
        plan_budget(budget, adapter, store)
    most = byte_budget(budget, adapter, store) if budget is not None and plan is None else None
    steps = Steps()
    if data is None:
        if eval_data is not None or retain is not None:
            raise InputError("--eval-data and --retain need --data")
        with steps.step("plan"):
            plan = plan or plan_adapter(adapter, statistics, method, budget=budget, store=store, **options)
        with steps.step("pack"):
            smaller = pack_adapter(adapter, plan, statistics, None, share_init, seed)
            smaller = store_adapter(smaller, store, sides(adapter, statistics))
        _check_bytes(smaller, most)
        facts = {"share_init": share_init, "store": store, "seed": seed}
        return Compressed(smaller, make_report(adapter, smaller, plan, name, base or "", facts, steps))
    with steps.step("load"):
        loaded = loaded or load(
            adapter, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
        )
        prepared = prepared or prepare(
            loaded.reader,
            data,
            eval_data=eval_data,
            columns=columns,
            sample=sample,
            seed=seed,
            most_recovery=recover_steps * rows_a_step(batch_size, loaded.task),
        )
    if statistics is not None:
        _check_unseen(statistics, prepared)
    job = Job(adapter, loaded, prepared, average, share_init, seed, batch_tokens, watch, store)
    with steps.step("measure"):
        if statistics is None:
            statistics = measure(job, {_needed_by(plan, adapter) if plan else chosen.needs(options)})
    first = statistics
    search: Search | None = None
    with steps.step("plan"):
        if plan is None and retain is not None:
            plan, search = smallest_plan(job, statistics, chosen, options, retain)
        elif plan is None:
            limit = plan_budget(budget, adapter, store) if budget is not None else None
            plan, statistics = best_plan(job, statistics, chosen, limit, options)
    with steps.step("pack"):
        smaller = packed(job, plan, statistics)
    if most is not None and any(pointer.own for pointer in smaller.modules.values()):  # no recovery in vain
        _check_bytes(store_adapter(smaller, store), most)
    refitted, recovery = None, None
    with steps.step("recover"):
        if smaller.linear:
            smaller = store_adapter(smaller, "fp32" if store else None)  # rounded once, at the end
            smaller, refitted, recovery = recovered(job, smaller, how, refit, state, resume, stop)
    if store is not None:
        with steps.step("store"):
            smaller = store_adapter(smaller, store, sides(adapter, statistics))
    _check_bytes(smaller, most)
    with steps.step("evaluate"):
        quality = figures(job, prepared.evaluation, smaller)
    settings = {
        "share_init": share_init,
        "store": store,
        "seed": seed,
        "refit": asdict(refitted) if refitted else None,
        "retain": asdict(search) if search else None,
        "measured_again": statistics is not first,
        "dtype": str(next(loaded.base.parameters()).dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "batch_tokens": batch_tokens,
    }
    report = make_report(adapter, smaller, plan, name, loaded.base_model, settings, steps)
    report = replace(
        report,
        task=loaded.task,
        data=prepared.facts,
        recovery=asdict(recovery) if recovery else None,
        quality=quality,
    )
    return Compressed(smaller, report)


def recovered(
    job: Job, smaller: Adapter, how: Settings, refits: bool | None, state: str | None, resume: bool, stop: Stop
) -> tuple[Adapter, Refit | None, Recovery | None]:
    """The refit and the recovery of what a job has made.

    Raises:
        InputError: they would fill the zeros of factors of which single elements are kept.
    """
    if (how.steps or refits) and any(isinstance(f.codes, Sparse) for f in smaller.pool.values()):
        raise InputError("single elements are kept, and the recovery would fill the zeros: give --recover-steps 0")
    data, record, rows = job.prepared, None, job.batch_tokens
    if refits or (refits is None and how.steps and not how.rank_dropout):
        smaller, record = refit_adapter(
            job.loaded, job.adapter, smaller, data.to_learn_from, data.selection, how.objective, rows
        )
    if not how.steps:
        return smaller, record, None
    smaller, recovery = recover(
        job.loaded,
        job.adapter,
        smaller,
        data.to_learn_from,
        data.selection,
        how,
        batch_tokens=rows,
        seed=job.seed,
        state=Path(state) if state else None,
        resume=resume,
        stop=stop,
        watch=lambda items, total: job.watch("recover", items, total),
    )
    return smaller, record, recovery


def check_state(state: str | None, resume: bool) -> None:
    if resume and (state is None or not Path(state).is_file()):
        raise InputError("--resume needs --state, the file that an earlier run wrote")
    if state is not None and not resume and os.path.lexists(state):
        raise InputError(f"--state {state} exists: go on from it with --resume, or choose another file")


def make_report(
    adapter: Adapter,
    smaller: Adapter,
    plan: Plan,
    name: str,
    base: str,
    settings: Mapping[str, Any],
    steps: Steps,
) -> Report:
    """What can be said without data."""
    types, modules = breakdown(adapter, smaller)
    return Report(
        version=VERSION,
        lorapack=lorapack.__version__,
        base_model=adapter.base_model or base,
        task=adapter.task_type or "",
        adapter={"name": name, "original": digest(adapter), "compressed": digest(smaller)},
        before=size(adapter),
        after=size(smaller),
        types=types,
        modules=modules,
        plan=plan,
        settings={"method": plan.method, "parameters_planned": parameters(plan, adapter), **settings},
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        run={"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "steps": steps.done},
    )


def _check_numbers(batch_tokens: int, budget: str | None, retain: float | None) -> None:
    if batch_tokens < 1:
        raise InputError("--batch-tokens must be above 0")
    if retain is not None and not 0 < retain < 1:
        raise InputError(f"--retain {retain:.1%} is not between 0% and 100%")
    if retain is not None and budget is not None:
        raise InputError("--retain and --budget exclude each other")


def _check_bytes(smaller: Adapter, most: float | None) -> None:
    if most is not None and size(smaller).bytes > most:
        why = ": what layers have of their own beside shared factors takes more bytes than those"
        own = any(pointer.own for pointer in smaller.modules.values())
        raise InputError(
            f"the result has {size(smaller).bytes:,} LoRA bytes, the budget allows {most:,.0f}{why if own else ''}; "
            "give a --budget in parameters"
        )


def _needed_by(plan: Plan, adapter: Adapter) -> Need:
    """What a given plan needs measured: nothing, unless it cuts ranks."""
    return NEEDED[plan.metric or "output"] if cuts_ranks(plan, adapter) else "nothing"


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
