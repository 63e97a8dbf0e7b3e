"""Size against quality: several methods at several budgets, on one job."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorapack.choose import best_plan
from lorapack.core.adapter import Adapter, size
from lorapack.core.codes import Store
from lorapack.core.report import Quality
from lorapack.data.prepare import prepare
from lorapack.data.split import SAMPLE
from lorapack.errors import InputError
from lorapack.job import Job, chosen_method, figures, measure, packed, plan_budget
from lorapack.measure.sums import Average
from lorapack.model.load import Device, DType, load
from lorapack.pack.pack import ShareInit
from lorapack.pack.store import sides, store_adapter
from lorapack.plan import METHODS
from lorapack.recover import Settings, recover, rows_a_step
from lorapack.watch import Watch, unwatched

BUDGETS = ("50%", "25%", "12.5%", "6%")


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        method: as it was asked for, with its options.
        budget: as it was asked for.
        parameters, share: what the plan came to, and as a share of the original.
        quality: on the evaluation rows; None where the method has no plan that small.
        reason: why there is none.
    """

    method: str
    budget: str
    parameters: int
    share: float
    quality: Quality | None
    reason: str = ""


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """``rank:metric=weight,allocation=uniform`` as name and options.

    Raises:
        InputError: no such method or option, or not of this form.
    """
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--method {text!r}: write name:option=value,option=value")
        options[key.strip().replace("-", "_")] = value.strip()
    return name, chosen_method(name, options)[1]


def sweep_adapter(
    adapter: Adapter,
    data: str,
    base: str | None = None,
    *,
    methods: Sequence[str],
    budgets: Sequence[str] = BUDGETS,
    eval_data: str | None = None,
    columns: Mapping[str, str] | None = None,
    sample: str = SAMPLE,
    seed: int = 0,
    average: Average = "token",
    share_init: ShareInit = "closed",
    store: Store | None = None,
    recover_steps: int = 0,
    batch_size: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> list[Point]:
    """Try methods at budgets; the base is loaded and the adapter measured once.

    Args:
        adapter, data, base: see `lorapack.compress_adapter`.
        methods: names with options, see `parse_method`.
        budgets: see `lorapack.job.plan_budget`.
        recover_steps: of recovery after each; 0 for none.
        eval_data, columns, sample, seed, average, share_init, store, batch_size, max_length, batch_tokens,
            device, dtype, trust_remote_code, watch: see `lorapack.compress_adapter`.

    Raises:
        InputError: anything given that does not fit, in one line.
    """
    chosen = [(text, *parse_method(text)) for text in methods]
    limits = [(budget, plan_budget(budget, adapter, store)) for budget in budgets]
    loaded = load(adapter, base, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code)
    prepared = prepare(
        loaded.reader,
        data,
        eval_data=eval_data,
        columns=columns,
        sample=sample,
        seed=seed,
        most_recovery=recover_steps * rows_a_step(batch_size, loaded.task),
    )
    job = Job(adapter, loaded, prepared, average, share_init, seed, batch_tokens, watch, store)
    statistics = measure(job, {METHODS[name].needs(options) for _, name, options in chosen})
    whole = size(adapter).parameters
    points = []
    for text, name, options in chosen:
        for budget, limit in limits:
            try:
                plan, measured = best_plan(job, statistics, METHODS[name], limit, options)
            except InputError as error:
                points.append(Point(text, budget, 0, 0.0, None, str(error)))
                continue
            smaller = packed(job, plan, measured)
            if recover_steps:
                smaller = store_adapter(smaller, "fp32" if store else None)
                rows = (prepared.to_learn_from, prepared.selection)
                how = Settings(steps=recover_steps, batch_size=batch_size)
                smaller, _ = recover(loaded, adapter, smaller, *rows, how, batch_tokens=batch_tokens, seed=seed)
            smaller = store_adapter(smaller, store, sides(adapter, measured))
            count = size(smaller).parameters
            quality = figures(job, prepared.evaluation, smaller, f"{text} {budget}")
            points.append(Point(text, budget, count, count / whole, quality))
    return points


def to_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
