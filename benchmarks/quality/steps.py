"""How many steps a recovery needs to come so near to the original: lorapack's way beside the paper's.

    python benchmarks/quality/steps.py TASK SEED --data DIR --models DIR --adapters DIR [--rates 1e-3 3e-3]

Both adapters have the same number of parameters:

    refit + kl      what `compress` does: its plan, least squares, steps towards the original's predictions
    copied + task   LoRA-drop as published: layers share a copied adapter, steps on the rows' own labels

The same rows, rows a step, optimiser and schedule; the paper's way with every rate given, of which the one that comes
nearest counts, ours with the task's own. KL(original || student) a token is measured on test rows as they train, which
decides nothing. What is asked: after how many steps ours is where the other ends, and where it is after so many.
RESULT holds the curves of all tasks run so far.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from arms import BATCH
from record import ROOT, code, read_json, rounded, write_json
from setting import Setting, places, run_facts, setting

from lorapack.choose import best_plan
from lorapack.core.adapter import Adapter, size
from lorapack.data.batches import Batch
from lorapack.job import chosen_method, measure, packed
from lorapack.model.load import NAME
from lorapack.model.point import place
from lorapack.pack import pack_adapter
from lorapack.recover import Settings, recover
from lorapack.recover.objective import Teacher, measured
from lorapack.recover.refit import refit

RESULT = ROOT / "benchmarks" / "results" / "recovery_steps.json"
Curve = list[tuple[int, float]]


def main() -> None:
    options = places(__doc__)
    options.add_argument("--budget", type=float, default=50.0, help="percent; LoRA-drop cannot go much lower")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--every", type=int, default=10, help="steps from one look at the test rows to the next")
    options.add_argument(
        "--rates", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates of the paper's way"
    )
    options.add_argument("-o", "--out", type=Path, default=RESULT)
    given = options.parse_args()
    here = setting(given, most_recovery=BATCH * given.steps)
    original, data = here.job.adapter, here.job.prepared
    held = here.job.batches(here.test, logits=True)
    teacher = Teacher(here.job.loaded, place(original, here.job.loaded.device))

    def far(adapter: Adapter) -> float:
        return measured(here.job.loaded, place(adapter, here.job.loaded.device), teacher, held, "kl")

    paper = pack(here, "lora-drop", int(size(original).parameters * given.budget / 100), "copy")
    ours = pack(here, "adaptive", size(paper).parameters, "closed")
    curves = {"refit + kl": train(here, given, far, ours, here.task.recovery_rate, refits=True)}
    tried = {f"copied + task at {rate:g}": train(here, given, far, paper, rate, refits=False) for rate in given.rates}
    best = min(tried, key=lambda name: min(kl for _, kl in tried[name]))
    aim = min(kl for _, kl in tried[best])
    needed = {name: reached(curve, aim) for name, curve in (curves | tried).items()}
    found = {
        "parameters": {
            "original": size(original).parameters,
            "paper": size(paper).parameters,
            "ours": size(ours).parameters,
        },
        "rows": {"training": len(data.to_learn_from), "held out": len(here.test)},
        "rate": here.task.recovery_rate,
        "aim": aim,
        "steps to the aim": {"refit + kl": needed["refit + kl"], best: needed[best]},
        "curves": curves | tried,
        "run": run_facts(code()),
    }
    print(found["steps to the aim"], "to a KL of", round(aim, 4))
    results = read_json(given.out) if given.out.exists() else {}
    write_json(given.out, results | {f"{given.task}-{given.seed}": rounded(found)})


def pack(here: Setting, name: str, limit: int, share_init: Any) -> Adapter:
    method, options = chosen_method(name, {})
    statistics = measure(here.job, {method.needs(options)})
    plan, statistics = best_plan(here.job, statistics, method, limit, options)
    if share_init == "closed":
        return packed(here.job, plan, statistics)
    return pack_adapter(here.job.adapter, plan, statistics, None, share_init, here.seed)


def train(
    here: Setting, given: Any, far: Callable[[Adapter], float], start: Adapter, rate: float, refits: bool
) -> Curve:
    """(step, KL on the held-out rows); 0 is before the first step, after the refit."""
    loaded, original, data = here.job.loaded, here.job.adapter, here.job.prepared
    if refits:
        start, _ = refit(loaded, original, start, data.to_learn_from, data.selection)
    curve = [(0, far(start))]

    def now() -> Adapter:
        """The adapter in training, read off the model's layers."""
        pool = dict(start.pool)
        for module, pointer in start.modules.items():
            layer = loaded.layers[module]
            pair = (part[NAME].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
            pool[pointer.factors] = type(pool[pointer.factors])(*pair)
        return start.with_pool(pool, start.modules)

    def watch(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches):
            if step and step % given.every == 0:
                curve.append((step, far(now())))
                print(f"{here.name} {curve[-1]}", flush=True)
            yield batch

    settings = Settings(given.steps, "kl" if refits else "task", rate, BATCH)
    made, record = recover(
        loaded, original, start, data.to_learn_from, data.selection, settings, seed=here.seed, watch=watch
    )
    return [*curve, (record.steps, far(made))]


def reached(curve: Curve, aim: float) -> int | None:
    """The first look at which the KL is no more than that."""
    return next((step for step, kl in curve if kl <= aim), None)


if __name__ == "__main__":
    main()
