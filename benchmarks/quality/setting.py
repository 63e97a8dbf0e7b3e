"""One adapter on its base with its task's rows: what the commands of this folder have in common."""

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import machine, versions
from tasks import FIXTURES, TASKS, Task, write_parts

from lorapack.core.adapter import Adapter, digest, size
from lorapack.data.encode import Encoded, encode
from lorapack.data.prepare import Prepared, prepare, usable_rows
from lorapack.errors import InputError
from lorapack.job import Job
from lorapack.model.load import load
from lorapack.read import read_adapter

HERE = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Setting:
    """What stays the same for all arms of a task and a seed.

    Attributes:
        test: the test rows, in the order of their file whatever the seed, so that seeds can be paired.
        facts: JSON for the record.
    """

    name: str
    seed: int
    task: Task
    job: Job
    test: list[Encoded]
    files: dict[str, Path]
    facts: dict[str, Any]


def places(description: str | None) -> argparse.ArgumentParser:
    """The options that say where things lie."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("task", choices=TASKS)
    found.add_argument("seed", type=int)
    found.add_argument("--data", type=Path, default=Path("data"), help="the datasets")
    found.add_argument("--models", type=Path, default=Path("models"), help="the base models")
    found.add_argument("--adapters", type=Path, default=Path("adapters"), help="what train.py wrote")
    found.add_argument("--results", type=Path, default=HERE / "results")
    found.add_argument("--tested", type=int, help="at most so many test rows, instead of the task's own number")
    found.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return found


def adapter_path(name: str, seed: int, adapters: Path, half: bool = False) -> Path:
    if name == "stories260k" and seed == 0 and not half:
        return FIXTURES / "adapter"
    return adapters / f"{name}-{seed}{'-half' if half else ''}"


def base_path(name: str, models: Path) -> Path:
    return (FIXTURES if name == "stories260k" else models) / TASKS[name].model


def setting(
    given: argparse.Namespace, most_recovery: int = 0, sample: str | None = None, training_rows: bool = False
) -> Setting:
    """Load the base and the rows.

    Args:
        given: parsed `places`.
        most_recovery: rows to train on.
        sample: to calibrate on, instead of the task's own.
        training_rows: of the adapter, to recover on beside those of the data part.
    """
    task, seed = TASKS[given.task], given.seed
    adapter = read_adapter(adapter_path(given.task, seed, given.adapters))
    base = str(base_path(given.task, given.models))
    loaded = load(adapter, base, device=given.device, max_length=task.longest)
    files = write_parts(given.task, given.data, given.adapters / "rows")

    def cut(by: int) -> Prepared:
        return prepare(
            loaded.reader,
            str(files["data"]),
            eval_data=str(files["test"]),
            sample=sample or str(task.sample),
            seed=by,
            most_recovery=most_recovery,
        )

    prepared = cut(seed)
    first = prepared if seed == 0 else cut(0)
    # of more than 1000 test rows every seed would draw its own, and seeds are paired row by row
    prepared = replace(prepared, evaluation=first.evaluation)
    parts = prepared.facts["parts"] | {"evaluation": first.facts["parts"]["evaluation"]}
    if training_rows:
        seen, _, _ = usable_rows(loaded.reader, str(files["train"]), None)
        learnt = encode(seen, loaded.reader.tokenizer, loaded.reader.longest, loaded.reader.label_ids)
        prepared = replace(prepared, recovery=[*prepared.recovery, *learnt])
    test = sorted(prepared.evaluation, key=lambda r: r.row)[: given.tested]
    facts = {
        "task": given.task,
        "seed": seed,
        "adapter": digest(adapter),
        "parameters": size(adapter).parameters,
        "modules": len(adapter.linear),
        "base": task.model,
        "rows": {
            part: {"rows": found["rows"], "tokens": found["tokens"], "sha256": sha(found["fingerprints"])}
            for part, found in parts.items()
        },
        "tested": len(test),
        "longest": task.longest,
    }
    job = Job(adapter, loaded, prepared, seed=seed)
    return Setting(given.task, seed, task, job, test, files, facts)


def scales(adapter: Adapter) -> int:
    """Numbers beside the factors that the result has to store: one a layer that points to shared factors."""
    return sum(len(modules) for modules in adapter.groups.values())


def sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def run_facts(code: str) -> dict[str, Any]:
    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "lorapack": code}


def in_one_line(error: InputError) -> str:
    return str(error).splitlines()[0][:200]
