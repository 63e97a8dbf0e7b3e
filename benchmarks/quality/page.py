"""docs/evidence.md, made of nothing but the committed results.

python benchmarks/quality/page.py [--results DIR] [-o docs/evidence.md]
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, BUDGETS, BYTE_BUDGETS, DEFAULT, FULL, HALF, bare, default_like, stored
from record import read_json
from tasks import ROOT, TASKS

Entry = dict[str, Any]
Triple = list[float]
HIGH = 0.99  # where all arms keep more than that, nobody has to be ahead
# of the gain, after recovery, on language tasks
WANTED = {25.0: 0.995, 12.5: 0.99, 3.0: 0.97}  # by percent of the parameters
WANTED_IN_BYTES = {1.0: 0.98, 0.5: 0.95}  # by percent of the bytes
NEAR = -0.01  # accuracy to the full adapter, after recovery: the lower bound that is wanted on labelled tasks

HEAD = """# The evidence

Made by `benchmarks/quality/page.py` from the results in `benchmarks/quality/results`; a test compares the two. How to
make the results: [benchmarks/quality/README.md](../benchmarks/quality/README.md).

*Gain retained* is (base − compressed) / (base − full adapter) in loss on test rows that nothing else has seen
([data.md](data.md)); 100% is the full adapter, 0% the base with the adapter's low-rank updates off and its head on. A
recovery that learns from labels too can come above 100%; `kl objective` marks one that does not, and `cosine` one of
before the rate cooled down ([recovery.md](recovery.md)). Figures are means over the training seeds, or over those that
stand behind them. Intervals are 95% bootstrap over the test rows, the same drawings for both sides of a difference and
for all seeds: they say what other test rows would change, not what other training seeds would. Sizes count the factors
and one number for every layer that points to shared ones. `–` is no plan at that size, `·` not run or not there.
"""


class Task:
    """The results of one task."""

    def __init__(self, name: str, results: Path) -> None:
        self.name = name
        self.seeds = {int(p.stem.rsplit("-", 1)[1]): read_json(p) for p in sorted(results.glob(f"{name}-[0-9]*.json"))}
        found = read_json(results / f"{name}.json")
        self.figures: dict[tuple[str, float, int], Entry] = {
            (e["arm"], e["budget"], e["recovery"]): e for e in found["figures"]
        }
        self.claims: list[Entry] = found["claims"]
        folder = results / "analysis"
        self.analyses = {
            int(p.stem.rsplit("-", 1)[1]): read_json(p) for p in sorted(folder.glob(f"{name}-[0-9]*.json"))
        }
        self.steps = sorted({steps for arm, _, steps in self.figures if bare(arm) not in (FULL, HALF)})

    @property
    def arms(self) -> list[str]:
        tried = dict.fromkeys(e["arm"] for r in self.seeds.values() for e in r["figures"])
        named = [*ARMS, *(arm for arm in tried if arm not in ARMS)]
        return [arm for arm in named if arm in tried and bare(arm) not in (FULL, HALF)]

    def missing(self, arm: str, budget: float, steps: int) -> str:
        states = {
            e["status"]
            for r in self.seeds.values()
            for e in r["figures"]
            if (e["arm"], e["budget"], e["recovery"]) == (arm, budget, steps)
        }
        return "–" if "no plan" in states else "·"


def page(results: Path, retain: Path) -> str:
    tasks = [Task(name, results) for name in TASKS if (results / f"{name}.json").exists()]
    parts = [HEAD, summary(tasks), shortfalls(tasks)]
    parts += [section(task) for task in tasks]
    parts += [claims(tasks), thresholds(tasks), importances(tasks), samples(tasks), correlations(tasks)]
    if retain.exists():
        parts.append(promise(read_json(retain)))
    parts.append(origin(tasks))
    return "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    return "·" if value is None else f"{100 * value:.{digits}f}"


def points(found: Triple | None) -> str:
    """A difference in points with its interval."""
    if found is None:
        return "·"
    value, low, high = (100 * v for v in found)
    return f"{value:+.1f} [{low:.1f}, {high:.1f}]"


def nats(found: Triple | None, parts: int = 1) -> str:
    """A difference in loss or divergence with its interval, in so many parts of a nat."""
    if found is None:
        return "·"
    value, low, high = (parts * v for v in found)
    return f"{value:+.3f} [{low:.3f}, {high:.3f}]"


def grid(task: Task, steps: int, cell: Callable[[Entry], str], arms: Sequence[str]) -> str:
    possible = BYTE_BUDGETS if any(map(stored, arms)) else BUDGETS
    budgets = [b for b in possible if any((arm, b, steps) in task.figures for arm in arms)]
    usual = {
        b: seeds_of(task.figures[arm, b, steps] for arm in arms if (arm, b, steps) in task.figures) for b in budgets
    }
    rows = []
    for arm in arms:
        cells = [
            cell(entry) + unless(seeds_of([entry]), usual[b])
            if (entry := task.figures.get((arm, b, steps)))
            else task.missing(arm, b, steps)
            for b in budgets
        ]
        if set(cells) != {"·"}:
            rows.append([f"`{arm}`", *cells])
    head = [f"{b:g}%" + unless(usual[b], tuple(task.seeds)) for b in budgets]
    return table(["", *head], rows) if rows and budgets else ""


def seeds_of(entries: Iterable[Entry]) -> tuple[int, ...]:
    """The training seeds of the entry that has the most."""
    return max((tuple(map(int, e["from"])) for e in entries), key=len)


def unless(seeds: tuple[int, ...], usual: tuple[int, ...]) -> str:
    """What a figure is marked with that is of other seeds than those around it."""
    return "" if set(seeds) == set(usual) else f" {of_seeds(seeds)}"


def of_seeds(seeds: Sequence[int]) -> str:
    return f"(seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"


def in_bfloat16(task: Task) -> str:
    """Which arms were recovered in bfloat16, and of which seeds."""
    found: dict[str, list[int]] = {}
    for seed, result in task.seeds.items():
        for arm in dict.fromkeys(e["arm"] for e in result["figures"] if e.get("recovered_in")):
            found.setdefault(arm, []).append(seed)
    named = ", ".join(f"`{arm}` {of_seeds(seeds)}" for arm, seeds in found.items())
    return f"\nRecovered in bfloat16 (figures are of float32): {named}.\n" if named else ""


def verdict(entry: Entry, best: float) -> str | None:
    """Whether the default is ahead of an arm; None where it cannot be said."""
    if best > HIGH and (entry["retained"] or [0])[0] > HIGH:
        return "both above 99%"
    found = entry["default_better_by"] or entry["default_better_by_nats"]
    return side(found) if found else None


def side(found: Triple) -> str:
    return "ahead" if found[1] > 0 else "behind" if found[2] < 0 else "no difference"


def nearness(entry: Entry, _: float) -> str | None:
    """Whether the default is nearer than an arm to the full adapter; None where it cannot be said."""
    found = entry["default_nearer_by"]
    return side(found) if found else None


def judged(
    tasks: Sequence[Task], steps: Callable[[int], bool], by: Callable[[Entry, float], str | None] = verdict
) -> Iterable[tuple[Task, Entry, str]]:
    for task in tasks:
        for (arm, budget, taken), entry in task.figures.items():
            own = task.figures.get((default_like(arm), budget, taken))
            if own is None or bare(arm) in (DEFAULT, FULL, HALF) or not steps(taken):
                continue
            said = by(entry, (own["retained"] or [0])[0])
            if said:
                yield task, entry, said


def summary(tasks: Sequence[Task]) -> str:
    text = ""
    for title, steps in (("without recovery", lambda s: s == 0), ("with recovery", lambda s: s > 0)):
        counts = counted(list(judged(tasks, steps)), ("ahead", "no difference", "both above 99%", "behind"))
        if counts:
            text += f"\n### {title.capitalize()}\n\n" + counts
    start = f"## `{DEFAULT}` against the others\n\n"
    if not text:
        return start + f"No result of `{DEFAULT}` is here yet.\n"
    said = (
        "In how many cells (task × budget) its gain retained has the interval of the paired difference above 0; its "
        "loss where the adapter has no gain to take shares of.\n"
    )
    near = counted(list(judged(tasks, lambda s: s == 0, nearness)), ("ahead", "no difference", "behind"))
    if near:
        text += (
            "\n### Without recovery, by how near it is to the full adapter\n\n"
            "KL of the predictions in place of the gain. What is cut away may have been noise, and a loss then falls "
            "by chance: near 100% of the gain this is the sharper question.\n\n" + near
        )
    return start + said + text


def counted(found: Sequence[tuple[Task, Entry, str]], words: Sequence[str]) -> str:
    """In how many cells the default is what, against each arm."""
    arms = list(dict.fromkeys(entry["arm"] for _, entry, _ in found))
    rows = [
        [f"`{arm}`", *(str(sum(e["arm"] == arm and said == w for _, e, said in found)) for w in words)]
        for arm in sorted(arms, key=lambda a: ARMS.index(a) if a in ARMS else len(ARMS))
    ]
    return table(["against", *words], rows) if rows else ""


def shortfalls(tasks: Sequence[Task]) -> str:
    """Where what is claimed or wanted does not hold."""
    lines = []
    for task, entry, said in judged(tasks, lambda s: True):
        if said == "behind":
            by = entry["default_better_by"]
            lines.append(
                f"- {where(task, entry)}: `{entry['arm']}` is better than `{DEFAULT}`"
                + (f", by {points([-by[0], -by[2], -by[1]])} points of the gain." if by else " in loss.")
            )
    for task in tasks:
        for (arm, budget, steps), entry in task.figures.items():
            if bare(arm) != DEFAULT or not steps:
                continue
            best, *others = recipes(task, entry)
            if entry is not best:
                continue
            shown = kept_cell if not TASKS[task.name].labelled else lambda e: points(e["accuracy_to_full"])
            also = "".join(f"; `{e['arm']}` {shown(e)}" for e in others)
            wanted = None if TASKS[task.name].labelled else (WANTED_IN_BYTES if stored(arm) else WANTED).get(budget)
            kept = entry["retained"]
            if wanted and kept and kept[0] < wanted:
                lines.append(
                    f"- {where(task, entry)}: `{arm}` keeps {kept_cell(entry)}%, wanted {percent(wanted)}%{also}."
                )
            near = entry["accuracy_to_full"]
            if near and budget >= 12.5 and near[1] <= NEAR:
                lines.append(
                    f"- {where(task, entry)}: `{arm}` has an accuracy to the full adapter of {points(near)}, "
                    f"wanted above −1{also}."
                )
    title = (
        "\n## Where it does not hold\n\nOf the ways to recover that were tried the best stands first, and the others "
        "behind it. It was chosen by these very rows, so its figure is a little too good.\n\n"
    )
    if not any(arm == DEFAULT for task in tasks for arm, _, _ in task.figures):
        return ""
    return title + ("\n".join(lines) + "\n" if lines else "Nowhere in these results.\n")


def recipes(task: Task, entry: Entry) -> list[Entry]:
    """All ways in which the default was recovered at the size of `entry`, the best first.

    By what is asked of the task: the gain that is kept, or the lower bound of the accuracy to the full adapter.
    """
    found = [
        e
        for e in task.figures.values()
        if bare(e["arm"]) == DEFAULT
        and stored(e["arm"]) == stored(entry["arm"])
        and e["budget"] == entry["budget"]
        and e["recovery"]
    ]
    if TASKS[task.name].labelled:
        return sorted(found, key=lambda e: -e["accuracy_to_full"][1])
    return sorted(found, key=lambda e: -(e["retained"] or [0])[0])


def where(task: Task, entry: Entry) -> str:
    of_bytes = " of the bytes" if stored(entry["arm"]) else ""
    return f"{task.name} at {entry['budget']:g}%{of_bytes}" + (
        f" after {entry['recovery']} steps" if entry["recovery"] else ""
    )


def section(task: Task) -> str:
    one = next(iter(task.seeds.values()))
    recipe = TASKS[task.name]
    full = task.figures.get((FULL, 100.0, 0))
    text = f"\n## {task.name}\n\n"
    text += (
        f"{recipe.model}, LoRA of rank {recipe.rank} on {one['modules']} modules, {one['parameters']:,} parameters; "
        f"training seeds {', '.join(map(str, task.seeds))}; {one['rows']['calibration']['rows']} rows to measure on, "
        f"{tested(task)} test rows.\n\n"
    )
    if full:
        first = seeds_of([full])[0]
        base = next(e["base"] for e in task.seeds[first]["figures"] if e["arm"] == FULL)
        each = [f"{name} {base[name]:.4g} → {value:.4g}" for name, value in full["metrics"].items()]
        text += f"Base (of seed {first}) → full adapter {of_seeds(seeds_of([full]))}: {', '.join(each)}.\n"
        if not full["retained"]:
            text += (
                "\nThe interval of the adapter's gain in loss holds 0 on these rows, so no share of it can be said. "
                "What is left of an adapter that has learnt too much by heart may have a lower loss than the whole; "
                "how near it is to the whole is its KL. Both stand here, and the accuracy.\n"
            )
    for steps in task.steps:
        text += f"\n### {f'With at most {steps} steps of recovery' if steps else 'Without recovery'}\n"
        arms, coded = ([a for a in task.arms if stored(a) is of_bytes] for of_bytes in (False, True))
        others = [a for a in arms if bare(a) != DEFAULT]
        if any(e["retained"] for e in task.figures.values()):
            cell = kept_cell if steps else lambda e: percent((e["retained"] or [None])[0])
            kept = grid(task, steps, cell, arms)
            text += f"\nGain retained, %.\n\n{kept}" if kept else ""
            kept = grid(task, steps, cell, coded)
            text += f"\nGain retained, %, at so much of the original's *bytes*.\n\n{kept}" if kept else ""
        if any(e["default_better_by"] for e in task.figures.values()):
            lead = grid(task, steps, lambda e: points(e["default_better_by"]), others)
            text += f"\n`{DEFAULT}` better by, points of the gain.\n\n{lead}" if lead else ""
        elif any(e["default_better_by_nats"] for e in task.figures.values()):
            lead = grid(task, steps, lambda e: nats(e["default_better_by_nats"]), others)
            text += f"\n`{DEFAULT}` better by, in loss, nats.\n\n{lead}" if lead else ""
            near = grid(task, steps, lambda e: nats(e["default_nearer_by"], 1000), others)
            text += f"\n`{DEFAULT}` nearer to the full adapter by, KL in nats / 1000.\n\n{near}" if near else ""
        if any(e["accuracy_to_full"] for e in task.figures.values()):
            near = grid(task, steps, lambda e: points(e["accuracy_to_full"]), arms)
            text += f"\nAccuracy to the full adapter, points.\n\n{near}" if near else ""
    return text + controls(task) + in_bfloat16(task)


def tested(task: Task) -> str:
    """How many test rows: of the first seed, and of those that were tested on fewer."""
    counts = {seed: result["tested"] for seed, result in task.seeds.items()}
    usual = next(iter(counts.values()))
    fewer = [
        f"{rows} {of_seeds([s for s in counts if counts[s] == rows])}" for rows in sorted({*counts.values()} - {usual})
    ]
    return ", ".join([str(usual), *fewer])


def controls(task: Task) -> str:
    rows = []
    for (arm, budget, steps), entry in task.figures.items():
        if bare(arm) in (FULL, HALF) and (steps or arm == HALF):
            name = arm + (f" + {steps} steps on the task's loss" if steps else "")
            metrics = ", ".join(f"{k} {v:.4g}" for k, v in entry["metrics"].items() if k in ("loss", "accuracy"))
            rows.append([name, f"{budget:g}%", kept_cell(entry), metrics, ", ".join(entry["from"])])
    return "\n### Controls\n\n" + table(["", "size", "gain retained", "", "seeds"], rows) if rows else ""


def kept_cell(entry: Entry) -> str:
    found = entry["retained"]
    return "·" if found is None else f"{percent(found[0])} [{percent(found[1])}, {percent(found[2])}]"


def claims(tasks: Sequence[Task]) -> str:
    rows = [
        [task.name, f"{e['budget']:g}%", str(e["recovery"]), f"`{e['second']}`", points(e["better_by"])]
        for task in tasks
        for e in task.claims
    ]
    if not rows:
        return ""
    ahead = sum(e["better_by"][1] > 0 for task in tasks for e in task.claims)
    behind = sum(e["better_by"][2] < 0 for task in tasks for e in task.claims)
    text = (
        "\n## LoRA-drop's own claims\n\nThe paper: sharing one adapter among the pruned layers beats deleting "
        "them, and keeping the layers of large output beats keeping others. `lora-drop` at equal size better by, "
        f"points of the gain: above 0 in {ahead} of {len(rows)} cells, below 0 in {behind}.\n\n"
    )
    return text + table(["task", "size", "steps", "than", "better by"], rows)


def mean(values: Iterable[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None


def analysed(tasks: Sequence[Task], what: str) -> Iterable[tuple[Task, list[Any]]]:
    for task in tasks:
        found = [r[what] for r in task.analyses.values() if what in r]
        if found:
            yield task, found


def thresholds(tasks: Sequence[Task]) -> str:
    rows, head = [], None
    for task, found in analysed(tasks, "threshold"):
        for arm in dict.fromkeys(p["arm"] for p in found[0]["points"]):
            line = [[p for p in f["points"] if p["arm"] == arm] for f in found]
            if any("share" not in p for of in line for p in of):
                continue
            head = [f"T={p['threshold']:g}" for p in line[0]]
            cells = []
            for each in zip(*line, strict=True):
                kept = mean(p["retained"][0] if p["retained"] else None for p in each)
                cells.append(f"{percent(mean(p['share'] for p in each), 0)}: {percent(kept)}")
            rows.append([task.name, f"`{arm}`", *cells])
    if head is None:
        return ""
    text = "\n## The threshold T\n\nParameters left, %: gain retained, %; no recovery, means over the seeds.\n\n"
    return text + table(["task", "", *head], rows)


def importances(tasks: Sequence[Task]) -> str:
    rows, between, moved = [], [], 0
    found = dict(pair for pair in ((task.name, of) for task, of in analysed(tasks, "importance")))
    for name, each in found.items():
        for other in each[0]["swapped"]:
            pairs = [f["swapped"][other] for f in each if other in f["swapped"]]
            cells = [f"{mean(p[k] for p in pairs):.2f}" for k in ("spearman", "overlap")]
            moved += any(p["overlap"] < 1 for p in pairs)
            rows.append([name, other, *cells])
    for name, each in found.items():
        for other, others in found.items():
            same = each[0]["own"].keys() == others[0]["own"].keys()
            if name < other and same:
                between.append([name, other, f"{mean(_alike(a['own'], b['own']) for a in each for b in others):.2f}"])
    if not rows:
        return ""
    text = (
        "\n## Does the importance depend on the data?\n\nThe paper says so. The same adapter measured on its own "
        "task's rows and on another's: rank correlation of the importances, and overlap of the sets kept at T=0.9 "
        f"(1 is the same set). Here other rows change the kept set in {moved} of {len(rows)} cases.\n\n"
        + table(["adapter of", "rows of", "rank correlation", "overlap"], rows)
    )
    if between:
        text += "\nAdapters of different tasks on the same base, each on its own rows:\n\n"
        text += table(["adapter of", "and of", "rank correlation"], between)
    for name, each in found.items():
        text += f"\nImportance by layer, {name}, mean over the seeds (share of the type's output norm, %):\n\n"
        text += layers({m: mean(f["own"][m] for f in each) or 0.0 for m in each[0]["own"]})
    return text


def _alike(one: dict[str, float], other: dict[str, float]) -> float:
    from analyse import spearman

    return spearman(list(one.values()), [other[m] for m in one])


def layers(importance: dict[str, float]) -> str:
    """A row for each module type, a column for each layer."""
    kinds: dict[str, dict[int, float]] = {}
    for module, value in importance.items():
        number = next(int(part) for part in module.split(".") if part.isdigit())
        kinds.setdefault(module.rsplit(".", 1)[-1], {})[number] = value
    columns = sorted({n for of in kinds.values() for n in of})
    return table(["", *map(str, columns)], [[k, *(percent(of.get(n)) for n in columns)] for k, of in kinds.items()])


def samples(tasks: Sequence[Task]) -> str:
    rows, head = [], None
    for task, found in analysed(tasks, "sample"):
        each = list(zip(*(f["points"] for f in found), strict=True))
        head = [f"{p[0]['sample']:.0%}" for p in each]
        rows.append(
            [task.name, *(f"{mean(q['spearman'] for q in p):.2f}, {mean(q['overlap'] for q in p):.2f}" for p in each)]
        )
    if head is None:
        return ""
    text = (
        "\n## How many rows the importance needs\n\nRank correlation with, and overlap of the set kept at T=0.9 with, "
    )
    return text + "what all rows of the task's data give.\n\n" + table(["task", *head], rows)


def correlations(tasks: Sequence[Task]) -> str:
    rows, head = [], None
    for task, found in analysed(tasks, "scores"):
        head = list(found[0]["spearman"])
        rows += [
            [task.name, kind, *(f"{mean(f['spearman'][s][kind] for f in found):.2f}" for s in head)]
            for kind in ("loss", "KL")
        ]
    if head is None:
        return ""
    text = (
        "\n## Which score knows what a module is worth?\n\nRank correlation of each score with what leaving that one "
        "module out does to the loss, and to the distribution (KL), on test rows.\n\n"
    )
    return text + table(["task", "", *head], rows)


def promise(found: Any) -> str:
    rows = []
    for r in found["seeds"]:
        kept, low, high = (percent(v, 2) for v in r["retained"])
        rows.append([str(r["seed"]), percent(r["share"]), f"{kept} [{low}, {high}]", "yes" if r["kept"] else "no"])
    text = f"\n## Asking for quality\n\n{found['what']}: kept on the evaluation rows in "
    text += f"{found['kept']} of {found['of']}.\n\n"
    return text + table(["seed", "parameters left, %", "gain retained, %", "kept"], rows)


def origin(tasks: Sequence[Task]) -> str:
    runs = [run for task in tasks for r in task.seeds.values() for run in r["runs"]]
    lines = []
    for run in runs:
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        line = f"- {run['machine']}; {versions}; lorapack sources {run['lorapack']}"
        if line not in lines:
            lines.append(line)
    return "\n## Made on\n\n" + "\n".join(lines) + "\n" if lines else ""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    options.add_argument("--results", type=Path, default=here / "results")
    options.add_argument("--retain", type=Path, default=here.parent / "results" / "retain.json")
    options.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "evidence.md")
    given = options.parse_args()
    given.out.write_text(page(given.results, given.retain), encoding="utf-8")


if __name__ == "__main__":
    main()
