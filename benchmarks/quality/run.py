"""Every arm at every budget on one task with one training seed: one row of the evidence.

    python benchmarks/quality/run.py TASK SEED --data DIR --models DIR --adapters DIR
        [--budgets 50 25 ...] [--recovery 0 100] [--arms adaptive rank ...] [--again ARM ...]
        [--store int4] [--batch 32] [--objective kl] [--rate 3e-3|"by size"] [--training-rows] [--bf16]

Loads base and rows once, measures once; then plan, pack, recovery and the figures on the test rows. What
RESULTS/TASK-SEED.json holds already is not run again, so it can be stopped and started at any time. The
scores of the single rows go to ADAPTERS/scores (not for the repository); from them it makes, with pair.py,
RESULTS/TASK.json: means over the seeds and paired differences.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, BATCH, BUDGETS, BY_SIZE, FULL, HALF, Recipe, bare
from pair import Table, pair, read_table, write_table
from record import code, read_json, rounded, triple, write_json
from setting import Setting, adapter_path, base_path, in_one_line, places, run_facts, scales, setting

from lorapack.choose import best_plan
from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.codes import STORES
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import Scores, score
from lorapack.job import chosen_method, measure, packed, plan_budget
from lorapack.model.load import load
from lorapack.model.point import place
from lorapack.pack.store import sides, store_adapter
from lorapack.read import read_adapter
from lorapack.recover import Settings, recover
from lorapack.recover.refit import refit
from lorapack.sweep import parse_method

Entry = dict[str, Any]
# by arm and budget: the packed adapter, the statistics that it was made from, the seconds; the same for all recoveries
Plans = dict[tuple[str, float], tuple[Adapter, Statistics | None, float]]


def options() -> argparse.ArgumentParser:
    found = places(__doc__)
    found.add_argument("--arms", nargs="+", default=list(ARMS), help="name:option=value,...; none: the controls alone")
    found.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="percent")
    found.add_argument("--recovery", nargs="+", type=int, default=[0], help="steps; 0 is without")
    found.add_argument("--store", choices=STORES, help="of the result; budgets are then percent of the bytes")
    found.add_argument("--batch", type=int, default=BATCH, help="rows a step of the recovery")
    found.add_argument("--objective", choices=("kl", "both"), default="both", help="of the recovery")
    found.add_argument("--rate", type=rate, help="of the recovery, instead of the task's own: a number, or 'by size'")
    found.add_argument("--training-rows", action="store_true", help="recover on the adapter's own training rows too")
    found.add_argument("--bf16", action="store_true", help="recover in bfloat16; all figures are of float32")
    found.add_argument("--again", nargs="+", default=[], help="arms to run again, because their method has changed")
    return found


def rate(text: str) -> float | str:
    return text if text == BY_SIZE else float(text)


def main() -> None:
    given = options().parse_args()
    recipe = Recipe(given.store, given.batch, given.objective, given.rate, given.training_rows, given.bf16)
    here = setting(given, most_recovery=recipe.batch * max(given.recovery), training_rows=recipe.training_rows)
    path = given.results / f"{given.task}-{given.seed}.json"
    result = opened(path, here.facts, given.again)
    scored = given.adapters / "scores" / f"{given.task}-{given.seed}.npz"
    table = read_table(scored)
    run = run_facts(code())
    if run not in result["runs"]:
        result["runs"].append(run)
    number = result["runs"].index(run)
    original = here.job.adapter

    def keep(entry: Entry, scores: Scores | None = None) -> None:
        result["figures"] = [e for e in result["figures"] if key(e) != key(entry)]
        if scores is not None:
            table[key(entry)] = scores
            entry |= figures(here, table, scores)
            write_table(scored, table)
        result["figures"].append(rounded(entry) | {"run": number})
        write_json(path, result)
        kept = entry.get("retained")
        shown = f"{kept[0]:.1%} [{kept[1]:.1%}, {kept[2]:.1%}]" if kept else entry.get("reason", "-")
        print(f"{given.task} {given.seed}  {key(entry)}  {entry.get('share', 0):.2%}  {shown}", flush=True)

    done = {key(e) for e in result["figures"] if e["status"] == "done"}
    for name in table.keys() - done - {"base"}:
        del table[name]
    if "base" not in table or key(control(FULL, 0)) not in done:
        table |= {"base": score_all(here, {"base": None})["base"]}
        keep(control(FULL, 0) | sizes(original, original), score_all(here, {FULL: original})[FULL])
    wanted = [
        Entry(arm=recipe.named(arm), budget=budget, recovery=steps)
        for steps in given.recovery
        for budget in given.budgets
        for arm in given.arms
    ]
    wanted = [entry for entry in wanted if key(entry) not in done]
    usable, needs = [], set()
    for entry in wanted:
        try:
            method, chosen = chosen_method(*parse_method(bare(entry["arm"])))
            needs.add(method.needs(chosen))
            usable.append(entry)
        except InputError as error:
            keep(entry | {"status": "no method", "reason": in_one_line(error)})
    started = time.time()
    statistics = measure(here.job, needs)
    if statistics is not None:
        result["measure_seconds"] = round(time.time() - started, 1)
    plans: Plans = {}
    for chunk in chunks(usable):
        made: dict[str, Adapter] = {}
        for entry in chunk:
            try:
                made[key(entry)] = make(here, statistics, entry, recipe, plans)
            except InputError as error:
                keep(entry | {"status": "no plan", "reason": in_one_line(error)})
        found = score_all(here, made)
        for entry in chunk:
            if key(entry) in made:
                keep(entry, found[key(entry)])
    for steps in given.recovery if not recipe.store else ():
        entry = control(replace(recipe, objective="both").named(FULL), steps)
        if steps and key(entry) not in done:  # the task's loss: the distance to itself is nothing to learn from
            smaller = recovered(here, original, entry, recipe, objective="task")
            keep(entry | sizes(original, smaller), score_all(here, {FULL: smaller})[FULL])
    half = adapter_path(given.task, given.seed, given.adapters, half=True)
    entry = Entry(arm=HALF, budget=50.0, recovery=0)
    if key(entry) not in done:
        if (half / "adapter_config.json").exists():
            adapter = read_adapter(half)
            keep(entry | {"status": "done"} | sizes(original, adapter), score_other(here, given, adapter))
        else:
            keep(entry | {"status": "not trained", "reason": "train.py --half has not been run"})
    pair(given.task, given.results, given.adapters / "scores")


def opened(path: Path, facts: Mapping[str, Any], again: list[str]) -> dict[str, Any]:
    """The results so far, but for the arms that are to be run again."""
    if not path.exists():
        return {**facts, "runs": [], "figures": []}
    result = read_json(path)
    for name in ("adapter", "longest", "tested"):
        if result[name] != facts[name]:
            sys.exit(f"{path} was made with another {name}; move it away")
    if result["rows"]["evaluation"] != facts["rows"]["evaluation"]:
        sys.exit(f"{path} was made with other test rows; move it away")
    result["figures"] = [e for e in result["figures"] if e["arm"] not in again]
    return result | {"rows": facts["rows"]}


def key(entry: Entry) -> str:
    return f"{entry['arm']} | {entry['budget']:g}% | {entry['recovery']} steps"


def control(arm: str, steps: int) -> Entry:
    return Entry(arm=arm, budget=100.0, recovery=steps, status="done")


def chunks(entries: list[Entry]) -> list[list[Entry]]:
    """What is scored together: a budget at a time, for the teacher has to be run once each time."""
    found: dict[Any, list[Entry]] = {}
    for entry in entries:
        found.setdefault(key(entry) if entry["recovery"] else entry["budget"], []).append(entry)
    return list(found.values())


def make(here: Setting, statistics: Statistics | None, entry: Entry, recipe: Recipe, plans: Plans) -> Adapter:
    """Plan, pack, recover, store; what it came to is noted in the entry.

    Raises:
        InputError: the method has no plan at this budget.
    """
    original, at = here.job.adapter, (bare(entry["arm"]), entry["budget"])
    if at not in plans:
        method, chosen = chosen_method(*parse_method(at[0]))
        started = time.time()
        limit = plan_budget(f"{entry['budget']}%", original, recipe.store)
        plan, seen = best_plan(replace(here.job, store=recipe.store), statistics, method, limit, chosen)
        plans[at] = packed(here.job, plan, seen), seen, time.time() - started
    smaller, statistics, seconds = plans[at]
    entry |= {"status": "done", "pack_seconds": seconds}
    if entry["recovery"] and smaller.linear:
        smaller = recovered(here, smaller, entry, recipe)
    smaller = store_adapter(smaller, recipe.store, sides(original, statistics) if recipe.store else None)
    entry |= sizes(original, smaller)
    return smaller


def recovered(here: Setting, packed: Adapter, entry: Entry, recipe: Recipe, **more: Any) -> Adapter:
    settings = Settings(
        entry["recovery"],
        learning_rate=None if recipe.rate == BY_SIZE else recipe.rate or here.task.recovery_rate,
        batch_size=recipe.batch,
        **{"objective": recipe.objective, **more},
    )
    started = time.time()
    loaded, original, data = here.job.loaded, here.job.adapter, here.job.prepared
    if packed is not original:  # as `compress` does it
        packed, found = refit(loaded, original, packed, data.to_learn_from, data.selection, settings.objective)
        entry |= {"refit": found.kept}
    # nothing is kept of what was cast: the factors change with every step
    with torch.autocast(loaded.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=False):
        smaller, record = recover(
            loaded,
            original,
            packed,
            data.to_learn_from,
            data.selection,
            settings,
            seed=here.seed,
        )
    entry |= {"steps": record.steps, "best": record.best, "rows_to_learn_from": len(data.to_learn_from)}
    entry |= {"recover_seconds": time.time() - started} | ({"recovered_in": "bfloat16"} if recipe.bf16 else {})
    return smaller


def sizes(original: Adapter, smaller: Adapter) -> Entry:
    found = size(smaller)
    return {
        "parameters": found.parameters,
        "scales": scales(smaller),
        "share": (found.parameters + scales(smaller)) / size(original).parameters,
        "bytes": found.bytes / size(original).bytes,
        "digest": digest(smaller)[:16],
    }


def score_all(here: Setting, adapters: Mapping[str, Adapter | None]) -> dict[str, Scores]:
    """Scores of adapters on this base, on the test rows in the order of their file."""
    if not adapters:
        return {}
    device = here.job.loaded.device
    variants = {"original": place(here.job.adapter, device)} | {n: place(a, device) for n, a in adapters.items()}
    batches = here.job.batches(here.test, logits=True)
    return score(here.job.loaded, variants, "original", batches, len(here.test))


def score_other(here: Setting, given: argparse.Namespace, adapter: Adapter) -> Scores:
    """Scores of an adapter that brings its own head; its distance to the original is not known."""
    base = str(base_path(given.task, given.models))
    loaded = load(adapter, base, device=given.device, max_length=here.task.longest)
    found = score_all(replace(here, job=replace(here.job, adapter=adapter, loaded=loaded)), {"it": adapter})["it"]
    return replace(found, divergence=found.divergence * float("nan"), agreement=found.agreement * float("nan"))


def figures(here: Setting, table: Table, scores: Scores) -> Entry:
    """Loss, accuracy, distance to the original; intervals over the test rows."""
    full = table.get(key(control(FULL, 0)), scores)
    found = quality(
        {"base": table["base"], "original": full, "compressed": scores}, here.job.loaded.reader.classes, seed=0
    )
    return {
        "retained": triple(found.retained),
        "divergence": triple(found.divergence),
        "metrics": {name: triple(of["compressed"]) for name, of in found.metrics.items()},
        "base": {name: of["base"].value for name, of in found.metrics.items()},
    }


if __name__ == "__main__":
    main()
