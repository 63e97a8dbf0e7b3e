"""What plans lose when several adapters are measured in one pass of the base, instead of each with itself on.

    python benchmarks/on_base.py [--adapter DIR ...] [--base DIR] [--data FILE] [--eval-data FILE]
        [--rows N] [-o benchmarks/results/on_base.json]

Each adapter is measured on the same calibration rows alone, on the activations that it makes itself (`own`), and
together with the others on those of the base (`base`). For eight adapters that costs as much as to measure each alone
on an eighth of the rows, so that is done as well (`eighth`). All statistics go through the same methods at the same
budgets, and the results, without recovery, are evaluated on the same held-out rows; the differences of the gain
retained are paired row by row. The `weight` metric, which looks at no data at all, is the yardstick.

By default the adapter is the fixture's, with the fixture's text; `fixtures/train_adapter.py` makes more of them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import machine, versions

from lorapack.choose import best_plan
from lorapack.core.plan import Plan
from lorapack.core.report import Interval
from lorapack.core.statistics import Statistics
from lorapack.data.encode import Encoded
from lorapack.data.prepare import prepare
from lorapack.evaluate.metrics import interval, loss, resamples, retained
from lorapack.job import Job, chosen_method, measure, packed, plan_budget, scores
from lorapack.measure.measure import measure_rows_on_base
from lorapack.model.load import load
from lorapack.read import read_adapter
from lorapack.sweep import parse_method

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = FIXTURES / "tinyshakespeare"
METHODS = ("adaptive", "rank", "rank:metric=output")
YARDSTICK = "rank:metric=weight"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--adapter", nargs="+", default=[str(FIXTURES / "adapter")])
    options.add_argument("--base", default=str(FIXTURES / "stories260k"))
    options.add_argument("--data", default=str(TEXT / "calibration.jsonl"))
    options.add_argument("--eval-data", default=str(TEXT / "heldout.jsonl"))
    options.add_argument("--sample", default="20%", help="of the data, to calibrate on")
    options.add_argument("--rows", type=int, help="at most so many evaluation rows")
    options.add_argument("--methods", nargs="+", default=METHODS, help="name:option=value,...")
    options.add_argument("--budgets", nargs="+", default=["50%", "25%", "12.5%"])
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    adapters = {Path(place).name: read_adapter(place) for place in given.adapter}
    loaded = load(next(iter(adapters.values())), given.base)
    prepared = prepare(
        loaded.reader, given.data, eval_data=given.eval_data, sample=given.sample, seed=0, most_recovery=0
    )
    on_base = measure_rows_on_base(loaded, adapters, prepared, "backward")
    rows = prepared.evaluation[: given.rows]
    found = []
    for name, adapter in adapters.items():
        job = Job(adapter, loaded, prepared)
        statistics = {"own": measured(job, 1), "base": on_base[name], "eighth": measured(job, 8)}
        for method in given.methods:
            for budget in given.budgets:
                found.append({"adapter": name, **compared(job, rows, statistics, method, budget)})
                print(json.dumps(found[-1]), flush=True)
    result = {
        "what": f"{', '.join(adapters)} on {Path(given.base).name}, measured on {len(prepared.calibration)} rows, "
        f"evaluated on {len(rows)} others, no recovery; percent",
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "found": found,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(job: Job, fewer: int) -> Statistics:
    """The moments on the adapter's own activations, of so many times fewer rows."""
    rows = job.prepared.calibration
    found = measure(
        replace(job, prepared=replace(job.prepared, calibration=rows[: max(1, len(rows) // fewer)])), {"backward"}
    )
    assert found is not None
    return found


def compared(
    job: Job, rows: Sequence[Encoded], statistics: Mapping[str, Statistics], method: str, budget: str
) -> dict[str, Any]:
    """What a method makes of each of the statistics (and `YARDSTICK` of none) at one budget."""
    planned = {kind: best(job, each, method, budget) for kind, each in statistics.items()}
    planned["weight"] = best(job, None, YARDSTICK, budget)
    plans = {kind: plan for kind, (plan, _) in planned.items()}
    made = {kind: packed(job, plan, measured) for kind, (plan, measured) in planned.items()}
    seen = scores(job, rows, {"original": job.adapter, "nothing": None, **made}, "evaluate")
    counts = resamples(len(rows), 0)
    losses = {variant: loss(counts, each) for variant, each in seen.items()}
    nothing, original, own = (losses[variant] for variant in ("nothing", "original", "own"))
    others = [kind for kind in statistics if kind != "own"]
    return {
        "method": method,
        "budget": budget,
        "retained": {kind: bounds(retained(nothing, original, losses[kind])) for kind in plans},
        "minus_own": {kind: bounds(interval((own - losses[kind]) / (nothing - original))) for kind in others},
        "plan": {kind: likeness(plans["own"], plans[kind]) for kind in others},
    }


def best(job: Job, statistics: Statistics | None, method: str, budget: str) -> tuple[Plan, Statistics | None]:
    chosen, values = chosen_method(*parse_method(method))
    return best_plan(job, statistics, chosen, plan_budget(budget, job.adapter), values)


def likeness(one: Plan, other: Plan) -> dict[str, float | None]:
    """Of the ranks of two plans: the rank correlation over the modules, and the share of the ranks in common.

    No correlation where one of them gives all modules the same.
    """
    a, b = (np.array([choice.rank or 0 for choice in plan.choices]) for plan in (one, other))
    places = [np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]) for values in (a, b)]
    flat = min(places[0].std(), places[1].std()) == 0
    return {
        "rank_correlation": None if flat else round(float(np.corrcoef(*places)[0, 1]), 3),
        "ranks_in_common": round(float(np.minimum(a, b).sum() / np.maximum(a.sum(), b.sum())), 3),
    }


def bounds(found: Interval | None) -> list[float] | None:
    """Value, low, high, in percent; None where the adapter gains nothing."""
    return None if found is None else [round(100 * v, 2) for v in (found.value, found.low, found.high) if v is not None]


if __name__ == "__main__":
    main()
