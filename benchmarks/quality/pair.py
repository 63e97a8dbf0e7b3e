"""Means over the training seeds and paired differences, from the scores of the single rows.

    python benchmarks/quality/pair.py TASK [--adapters DIR] [--results DIR]

run.py does this at its end. The test rows are the same for all seeds, so one drawing of rows serves all
seeds and both arms of a difference: the intervals are those of the mean over the seeds that there are, for
other test rows. Written to RESULTS/TASK.json. An entry made from more seeds than lie here now is left
as it is.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arms import CLAIMS, FULL, default_like
from record import read_json, rounded, triple, write_json

from lorapack.evaluate import metrics
from lorapack.evaluate.scores import Numbers, Scores

HERE = Path(__file__).parent
Table = dict[str, Scores]
FIELDS = tuple(field.name for field in dataclasses.fields(Scores))


def read_table(path: Path) -> Table:
    """The scores of one seed: by arm, of every test row."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        names = [str(name) for name in file["names"]]
        fields = {field: file[field] for field in FIELDS}
    return {name: Scores(**{f: fields[f][i] for f in FIELDS}) for i, name in enumerate(names)}


def write_table(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new.npz")
    fields = {f: np.stack([getattr(scores, f) for scores in table.values()]) for f in FIELDS}
    np.savez_compressed(beside, names=np.array(list(table)), **fields)
    beside.replace(path)


def pair(task: str, results: Path, scored: Path) -> None:
    tables: dict[int, Table] = {}
    seeds: dict[int, Any] = {}
    for path in sorted(results.glob(f"{task}-*.json")):
        if found := re.fullmatch(re.escape(task) + r"-(\d+)", path.stem):
            seeds[int(found[1])] = read_json(path)
            tables[int(found[1])] = read_table(scored / f"{path.stem}.npz")
    one = next((table["base"] for table in tables.values() if table), None)
    if one is None:
        return
    counts = metrics.resamples(len(one.loss), 0)
    path = results / f"{task}.json"
    before = read_json(path) if path.exists() else {"figures": [], "claims": []}
    done = {s: {_key(e): e for e in r["figures"] if e["status"] == "done"} for s, r in seeds.items()}
    names = list(dict.fromkeys(name for figures in done.values() for name in figures))
    figures = [_entry(name, done, tables, counts) for name in names]
    result = {
        "task": task,
        "resamples": metrics.RESAMPLES,
        "figures": _merged(before["figures"], [e for e in figures if e], done),
        "claims": _merged(before["claims"], list(_claims(names, done, tables, counts)), done),
    }
    write_json(path, rounded(result))


Done = dict[int, dict[str, dict[str, Any]]]  # by seed: what is done, by its key


def _merged(before: list[Any], now: list[Any], done: Done) -> list[Any]:
    """What is there now, but an entry of before where it was made from more seeds and still holds."""
    old = {(e["arm"], e["budget"], e["recovery"], e.get("second")): e for e in before}
    found = {(e["arm"], e["budget"], e["recovery"], e.get("second")): e for e in now}
    for place, entry in old.items():
        holds = all(
            done.get(int(seed), {}).get(name, {}).get("digest") == digest
            for seed, made in entry["from"].items()
            for name, digest in made.items()
        )
        if holds and len(entry["from"]) > len(found.get(place, {"from": ()})["from"]):
            found[place] = entry
    return list(found.values())


def _origin(seeds: Iterable[int], names: Iterable[str], done: Done) -> dict[str, dict[str, str]]:
    """By seed, the digests of the adapters that an entry is about."""
    names = list(names)
    return {str(s): {n: done[s][n]["digest"] for n in names if n in done[s]} for s in seeds}


def _claims(names: Iterable[str], done: Done, tables: dict[int, Table], counts: Numbers) -> Iterator[dict[str, Any]]:
    """The pairs of the paper, at every budget where both have a plan."""
    full = f"{FULL} | 100% | 0 steps"
    for first, second in CLAIMS:
        for one in (n for n in names if n.startswith(f"{first} | ")):
            other = one.replace(first, second, 1)
            both = [s for s in tables if {one, other} <= tables[s].keys() & done[s].keys()]
            values = [_values("retained", tables[s], full, one, other, counts) for s in both]
            if both and all(v is not None for v in values):
                mean = np.mean([v for v in values if v is not None], axis=0)
                _, budget, steps = one.rsplit(" | ", 2)
                place = {"budget": float(budget.rstrip("%")), "recovery": int(steps.split()[0])}
                better = triple(metrics.interval(mean))
                yield {
                    "arm": first,
                    "second": second,
                    **place,
                    "from": _origin(both, (one, other), done),
                    "better_by": better,
                }


def _key(entry: dict[str, Any]) -> str:
    return f"{entry['arm']} | {entry['budget']:g}% | {entry['recovery']} steps"


def _entry(name: str, done: Done, tables: dict[int, Table], counts: Numbers) -> dict[str, Any] | None:
    """One arm at one budget: means over its seeds, and the difference to the default where both are there."""
    have = [s for s in done if name in done[s] and name in tables[s]]
    if not have:
        return None
    found = [done[s][name] for s in have]
    first = found[0]
    full = f"{FULL} | 100% | 0 steps"
    default = f"{default_like(first['arm'])} | {first['budget']:g}% | {first['recovery']} steps"
    both = [s for s in have if default in done[s] and default in tables[s]]
    labelled = "accuracy" in first["metrics"]

    def mean(kind: str, seeds: list[int], one: str, other: str | None = None) -> list[float | None] | None:
        values = [_values(kind, tables[s], full, one, other, counts) for s in seeds]
        if not values or any(v is None for v in values):
            return None
        return triple(metrics.interval(np.mean([v for v in values if v is not None], axis=0)))

    return {
        **{k: first[k] for k in ("arm", "budget", "recovery")},
        "from": _origin(have, (name, default), done),
        "share": float(np.mean([e["share"] for e in found])),
        "retained": mean("retained", have, name),
        "of_seeds": [e["retained"][0] if e["retained"] else None for e in found],
        # not known of an adapter with a head of its own
        "divergence": float(np.mean([e["divergence"][0] if e["divergence"] else np.nan for e in found])),
        "metrics": {m: float(np.mean([e["metrics"][m][0] for e in found])) for m in first["metrics"]},
        "accuracy_to_full": mean("accuracy", have, name, full) if labelled else None,
        "paired_seeds": both,
        "default_better_by": mean("retained", both, default, name) if name != default else None,
        "default_better_by_nats": mean("loss", both, name, default) if name != default else None,
        "default_more_accurate_by": mean("accuracy", both, default, name) if labelled and name != default else None,
        "default_nearer_by": mean("divergence", both, name, default) if name != default else None,
    }


def _values(kind: str, table: Table, full: str, one: str, other: str | None, counts: Numbers) -> Numbers | None:
    """Over the resamples: a figure of one arm, or its difference to another's. None: no gain to speak of."""
    plain = {"accuracy": metrics.accuracy, "divergence": metrics.divergence}
    if kind in plain:
        assert other is not None
        found: Numbers = plain[kind](counts, table[one]) - plain[kind](counts, table[other])
        return found
    losses = metrics.loss(counts, table[one])
    reference = metrics.loss(counts, table[other if other else "base"])
    if kind == "loss":
        difference: Numbers = losses - reference
        return difference
    gain = metrics.loss(counts, table["base"]) - metrics.loss(counts, table[full])
    if not (metrics.interval(gain).low or 0) > 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        kept: Numbers = np.where(gain > 0, (reference - losses) / gain, np.nan)
    return kept


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("task")
    options.add_argument("--adapters", type=Path, default=Path("adapters"))
    options.add_argument("--results", type=Path, default=HERE / "results")
    given = options.parse_args()
    pair(given.task, given.results, given.adapters / "scores")


if __name__ == "__main__":
    main()
