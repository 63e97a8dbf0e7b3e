"""`lorapack.recover_adapter`: train a compressed adapter further, or an adapter with rank masks."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace

import torch

from lorapack.compress import Compressed, check_state, make_report, recovered
from lorapack.core.adapter import Adapter
from lorapack.core.plan import Choice, Plan
from lorapack.data.prepare import prepare
from lorapack.data.split import SAMPLE
from lorapack.errors import InputError
from lorapack.job import Job, figures
from lorapack.model.load import Device, DType, load
from lorapack.recover import Settings, rows_a_step
from lorapack.recover.recover import Stop, unstopped
from lorapack.steps import Steps
from lorapack.watch import Watch, unwatched


def recover_adapter(
    adapter: Adapter,
    data: str,
    base: str | None = None,
    *,
    teacher: Adapter | None = None,
    settings: Settings = Settings(),  # noqa: B008
    refit: bool | None = None,
    used: Collection[str] = (),
    name: str = "",
    eval_data: str | None = None,
    columns: Mapping[str, str] | None = None,
    sample: str = SAMPLE,
    seed: int = 0,
    state: str | None = None,
    resume: bool = False,
    stop: Stop = unstopped,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> Compressed:
    """Recover an adapter and measure what came of it.

    Args:
        adapter: to train; unchanged.
        data: rows, cut into the parts that `compress_adapter` cuts them into.
        base: another place for the base model than the adapter names.
        teacher: the original, of which it keeps the predictions; the adapter itself by default.
        settings: how.
        refit: least squares first, where that is better; by default where there are no rank masks.
        used: fingerprints of rows that the adapter was made with (`Report.used_rows`); they may not be
            evaluated on.
        name: what to call the adapter in the report.
        eval_data, columns, sample, seed, max_length, batch_tokens, device, dtype, trust_remote_code,
            watch: see `lorapack.compress_adapter`.
        state, resume, stop: see `lorapack.recover.recover`.

    Raises:
        InputError: anything given that does not fit, in one line.
    """
    if teacher is None and settings.objective != "task" and not settings.rank_dropout:
        raise InputError(
            "--teacher is needed: without it the adapter would learn its own predictions; --objective task needs none"
        )
    if not settings.steps and refit is not True:
        raise InputError("--steps 0 without --refit: there is nothing to do")
    check_state(state, resume)
    original = teacher or adapter
    _check_pair(adapter, original)
    steps = Steps()
    with steps.step("load"):
        loaded = load(
            original, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
        )
        prepared = prepare(
            loaded.reader,
            data,
            eval_data=eval_data,
            columns=columns,
            sample=sample,
            seed=seed,
            most_recovery=settings.steps * rows_a_step(settings.batch_size, loaded.task),
        )
    both = set(used) & set(prepared.facts["parts"]["evaluation"]["fingerprints"])
    if both:
        raise InputError(
            f"{len(both)} evaluation rows were used to make the adapter: use the --data, --seed and --sample "
            "it was made with, or --eval-data"
        )
    prepared.facts["parts"]["earlier"] = {"rows": len(used), "tokens": 0, "fingerprints": sorted(used)}
    job = Job(original, loaded, prepared, seed=seed, batch_tokens=batch_tokens, watch=watch)
    with steps.step("recover"):
        made, fitted, recovery = recovered(job, adapter, settings, refit, state, resume, stop)
    with steps.step("evaluate"):
        quality = figures(job, prepared.evaluation, made)
    facts = {
        "seed": seed,
        "refit": asdict(fitted) if fitted else None,
        "dtype": str(next(loaded.base.parameters()).dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "batch_tokens": batch_tokens,
    }
    report = make_report(original, made, _plan(original, adapter), name, loaded.base_model, facts, steps)
    return Compressed(
        made,
        replace(
            report,
            task=loaded.task,
            data=prepared.facts,
            recovery=asdict(recovery) if recovery else None,
            quality=quality,
        ),
    )


def _check_pair(adapter: Adapter, original: Adapter) -> None:
    if not adapter.linear:
        raise InputError("the adapter has no linear module, so there is nothing to recover")
    for module in adapter.modules:
        if module not in original.modules:
            raise InputError(f"{module} is in the adapter and not in the teacher: they do not belong together")
        if adapter.factors(module).shape != original.factors(module).shape:
            raise InputError(f"{module} has another shape in the teacher: they do not belong together")
    same = adapter.carried.keys() == original.carried.keys()
    if not same or not all(torch.equal(t, original.carried[n]) for n, t in adapter.carried.items()):
        raise InputError("the adapter's saved modules are not the teacher's: they do not belong together")


def _plan(original: Adapter, adapter: Adapter) -> Plan:
    """What the adapter is, as a plan for the original."""
    groups = adapter.groups

    def choice(module: str) -> Choice:
        if module not in adapter.modules:
            return Choice(module, "drop")
        name = adapter.modules[module].factors
        if name in groups:
            return Choice(module, "share", group=name)
        return Choice(module, "keep", rank=adapter.factors(module).rank)

    ranks = {name: adapter.pool[name].rank for name in groups}
    return Plan("recover", {}, tuple(choice(m) for m in original.linear), ranks)
