"""The LoRA-drop paper's own analyses on our models, each kept in RESULTS/analysis/TASK-SEED.json.

python benchmarks/quality/analyse.py TASK SEED WHAT [WHAT ...] --data DIR --models DIR --adapters DIR

threshold   size and quality over the paper's T
importance  each module's share of its type's output norm; on this task's rows, and for the same
            adapter on the rows of other tasks of the same kind
sample      how the importance and the kept set change with the share of the rows measured on
scores      how well each score ranks the modules by what the loss does when the module is left out
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from record import code, read_json, rounded, write_json
from run import score_all, sizes
from setting import Setting, in_one_line, places, run_facts, setting
from tasks import TASKS, write_parts

from lorapack.core.names import module_type
from lorapack.core.statistics import Statistics, importances, output_norms
from lorapack.data.prepare import prepare_evaluation
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import score
from lorapack.job import chosen_method, measure, packed
from lorapack.model.point import Placed, place
from lorapack.pack.truncate import shares as shares_of_atoms
from lorapack.sweep import parse_method

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
KEPT_AT = 0.9  # the paper's T
MOST = 400  # rows of a foreign task


def main() -> None:
    options = places(__doc__)
    options.add_argument("what", nargs="+", choices=ANALYSES)
    options.add_argument("--again", action="store_true")
    given = options.parse_args()
    path = given.results / "analysis" / f"{given.task}-{given.seed}.json"
    here = setting(given)
    result = read_json(path) if path.exists() else {"task": given.task, "seed": given.seed}
    if result.get("adapter") != here.facts["adapter"]:
        result = {"task": given.task, "seed": given.seed, "adapter": here.facts["adapter"]}
    for what in given.what:
        if what in result and not given.again:
            continue
        started = time.time()
        found = ANALYSES[what](here, given)
        seconds = round(time.time() - started, 1)
        result[what] = rounded({"seconds": seconds, "run": run_facts(code()), **found})
        write_json(path, result)
        print(given.task, given.seed, what, f"{seconds:.0f} s", flush=True)


def threshold(here: Setting, _: Any) -> dict[str, Any]:
    statistics = measure(here.job, {"forward"})
    original = here.job.adapter
    points, adapters = [], {}
    for arm in ("lora-drop", "lora-drop:pruned=drop"):
        for t in THRESHOLDS:
            try:
                method, chosen = chosen_method(*parse_method(arm))
            except InputError as error:
                points.append({"arm": arm, "threshold": t, "reason": in_one_line(error)})
                continue
            plan = method.run(original, statistics, None, chosen | {"threshold": t})
            adapters[f"{arm} {t}"] = packed(here.job, plan, statistics)
            points.append({"arm": arm, "threshold": t})
    scores = score_all(here, {"base": None, "original": original, **adapters})
    for point in points:
        name = f"{point['arm']} {point['threshold']}"
        if name in adapters:
            variants = {"base": scores["base"], "original": scores["original"], "compressed": scores[name]}
            found = quality(variants, here.job.loaded.reader.classes, 0)
            kept = found.retained
            point |= {k: v for k, v in sizes(original, adapters[name]).items() if k in ("parameters", "share")}
            point |= {"retained": [kept.value, kept.low, kept.high] if kept else None}
            point |= {"metrics": {m: of["compressed"].value for m, of in found.metrics.items()}}
    return {"points": points}


def importance(here: Setting, given: Any) -> dict[str, Any]:
    """Own rows, and the rows of every other task of the same kind, whatever its base."""
    own = shares(here, measure(here.job, {"forward"}))
    found: dict[str, Any] = {"own": own, "swapped": {}}
    models = {task.cut: name for name, task in TASKS.items() if task.labelled == here.task.labelled}
    for name in models.values():
        if TASKS[name].cut is here.task.cut:
            continue
        file = write_parts(name, given.data, given.adapters / "rows")["data"]
        rows, _ = prepare_evaluation(here.job.loaded.reader, str(file))
        other = replace(here.job, prepared=replace(here.job.prepared, calibration=rows[:MOST]))
        theirs = shares(here, measure(other, {"forward"}))
        found["swapped"][name] = {"importance": theirs, **compared(own, theirs)}
    return found


def sample(here: Setting, _: Any) -> dict[str, Any]:
    """Ever larger samples of the task's data, each within the next, against all of it."""
    rows, _ = prepare_evaluation(here.job.loaded.reader, str(here.files["data"]))
    order = np.random.default_rng(here.seed).permutation(len(rows))
    taken = {s: [rows[i] for i in order[: max(1, round(s * len(rows)))]] for s in SHARES}
    each = {}
    for s, chosen in taken.items():
        job = replace(here.job, prepared=replace(here.job.prepared, calibration=chosen))
        each[s] = shares(here, measure(job, {"forward"}))
    points = [{"sample": s, "rows": len(taken[s]), **compared(each[1.0], each[s])} for s in SHARES]
    return {"points": points}


def scores(here: Setting, _: Any) -> dict[str, Any]:
    statistics = measure(here.job, {"backward"})
    adapter, device = here.job.adapter, here.job.loaded.device
    whole = place(adapter, device)
    variants = {"original": whole}
    for module in adapter.linear:
        rest = {m: pointer for m, pointer in whole.pointers.items() if m != module}
        variants[module] = Placed(whole.pairs, rest)
    found = score(here.job.loaded, variants, "original", here.job.batches(here.test, logits=True), len(here.test))
    loss = {name: float(s.loss.sum() / s.predictions.sum()) for name, s in found.items()}
    truth = {m: loss[m] - loss["original"] for m in adapter.linear}
    distance = {m: float(found[m].divergence.sum() / found[m].predictions.sum()) for m in adapter.linear}
    norms = output_norms(adapter, statistics)
    table = {
        "output norm": norms,
        "share of the output norm within the type (LoRA-drop)": shares(here, statistics),
        "loss metric": {m: error(here, statistics, m, "loss") for m in adapter.linear},
        "fisher metric": {m: error(here, statistics, m, "fisher") for m in adapter.linear},
        "first order, absolute tr cross": {m: abs(float(cross(statistics, m))) for m in adapter.linear},
        "weight norm": {m: error(here, statistics, m, "weight") * adapter.scale(m) ** 2 for m in adapter.linear},
    }
    return {
        "rows": len(here.test),
        "change of the loss": truth,
        "change of the distribution": distance,
        "spearman": {
            name: {
                "loss": spearman([values[m] for m in truth], list(truth.values())),
                "KL": spearman([values[m] for m in distance], list(distance.values())),
            }
            for name, values in table.items()
        },
        "values": table,
    }


def cross(statistics: Statistics, module: str) -> float:
    found = statistics.modules[module].cross
    assert found is not None
    return float(found.trace())


def error(here: Setting, statistics: Statistics, module: str, metric: Any) -> float:
    """The squared error in a metric of leaving the module out."""
    return float(shares_of_atoms(here.job.adapter.factors(module), metric, statistics.modules[module]).sum())


def shares(here: Setting, statistics: Statistics) -> dict[str, float]:
    """LoRA-drop's importance."""
    return importances(output_norms(here.job.adapter, statistics))


def compared(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """How far two importances agree: rank correlation, and the kept sets' overlap (Jaccard)."""
    a, b = kept(one), kept(other)
    return {"spearman": spearman(list(one.values()), [other[m] for m in one]), "overlap": len(a & b) / len(a | b)}


def kept(importance: Mapping[str, float]) -> set[str]:
    from lorapack.plan.methods.lora_drop import keep_until

    types = {module_type(m) for m in importance}
    return {m for t in types for m in keep_until({m: v for m, v in importance.items() if module_type(m) == t}, KEPT_AT)}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = ranks(np.array(one)), ranks(np.array(other))
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / spread if spread > 0 else 0.0


def ranks(values: Any) -> Any:
    """Ties at their mean rank."""
    _, where, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[where]


ANALYSES = {"threshold": threshold, "importance": importance, "sample": sample, "scores": scores}

if __name__ == "__main__":
    main()
