"""The tasks: which base, which rows for what, and how the adapter is trained.

The rows of a task are cut into three files, so that every command and every seed sees the same ones:

    train   the adapter learns from these
    data    lorapack calibrates, recovers and selects on these
    test    figures, nothing else
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
PARTS = ("train", "data", "test")
CUT_SEED = 2024  # of the cut into parts: the same for all training seeds
Row = dict[str, Any]
Rows = dict[str, list[Row]]


@dataclass(frozen=True)
class Task:
    """One row of the evidence.

    Attributes:
        model: the base, a folder in ``--models``.
        cut: the rows by part, from ``--data``.
        labelled: a classifier with a head of its own; otherwise a language model.
        targets: the modules that get an adapter, as PEFT takes them.
        rank, steps, batch_size, learning_rate: of the training; alpha is twice the rank.
        longest: tokens a row.
        sample: rows to calibrate on.
        tested: at most so many test rows (the first, in the order of the cut); lorapack draws 1000 of more.
        recovery_rate: learning rate of the recovery, the same for all arms.
    """

    model: str
    cut: Callable[[Path], Rows]
    labelled: bool
    targets: str | tuple[str, ...]
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    longest: int
    sample: int
    tested: int
    recovery_rate: float = 1e-3


def read(path: Path) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def shuffled(rows: Sequence[Row]) -> list[Row]:
    rows = list(rows)
    random.Random(CUT_SEED).shuffle(rows)
    return rows


def fixture(_: Path) -> Rows:
    text = FIXTURES / "tinyshakespeare"
    return {"train": [], "data": read(text / "calibration.jsonl"), "test": read(text / "heldout.jsonl")}


def dialogsum(data: Path) -> Rows:
    def row(found: Row) -> Row:
        summary = found.get("summary") or found["summary1"]
        return {
            "prompt": f"Summarize the dialogue.\n\n{found['dialogue']}\n\nSummary:",
            "completion": f" {summary}",
        }

    folder = data / "dialogsum"
    first, validation = read(folder / "train_first601.jsonl"), read(folder / "validation.jsonl")
    parts = {"train": [*first, *validation[:200]], "data": validation[200:], "test": read(folder / "test.jsonl")}
    return {name: [row(r) for r in rows] for name, rows in parts.items()}


def e2e(data: Path) -> Rows:
    """The official development set has to serve for training; one text for each meaning in the test."""

    def row(found: Row) -> Row:
        return {"prompt": f"{found['mr']}\n", "completion": found["ref"]}

    development, test = read(data / "e2e_nlg" / "validation.jsonl"), read(data / "e2e_nlg" / "test.jsonl")
    meanings = shuffled([{"mr": mr} for mr in sorted({r["mr"] for r in development})])
    held = {m["mr"] for m in meanings[: len(meanings) // 4]}
    one_each = {r["mr"]: r for r in reversed(test)}
    return {
        "train": [row(r) for r in development if r["mr"] not in held],
        "data": [row(r) for r in shuffled([r for r in development if r["mr"] in held])],
        "test": [row(r) for r in shuffled(list(one_each.values()))],
    }


def glue(name: str, held: int, test: str = "validation") -> Callable[[Path], Rows]:
    def cut(data: Path) -> Rows:
        rows = shuffled(read(data / name / "train.jsonl"))
        return {"train": rows[held:], "data": rows[:held], "test": shuffled(read(data / name / f"{test}.jsonl"))}

    return cut


MINILM = {"model": "minilm", "labelled": True, "targets": ("query", "value"), "rank": 8, "longest": 128}
MPNET = MINILM | {"model": "mpnet", "targets": ("attn.q", "attn.v")}
GLUE = {
    "rte": {
        "cut": glue("rte", 700),
        "steps": 280,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "tested": 277,
        "longest": 64,
    },
    "cola": {"cut": glue("cola", 1200), "steps": 450, "batch_size": 32, "learning_rate": 2e-3, "tested": 1043},
    "mrpc": {
        "cut": glue("mrpc", 1100, "test"),
        "steps": 320,
        "batch_size": 16,
        "learning_rate": 6e-4,
        "tested": 1725,
        "longest": 64,
    },
    "sst2": {"cut": glue("sst2", 1200), "steps": 400, "batch_size": 32, "learning_rate": 2e-3, "tested": 872},
}
LONGER = {"steps": 1500, "learning_rate": 5e-4, "longest": 128}  # on a GPU

TASKS: dict[str, Task] = {
    # trained by fixtures/train_adapter.py, which knows its own steps and rate
    "stories260k": Task(
        "stories260k", fixture, False, "all-linear", 16, 2400, 16, 3e-3, 512, 53, 262, recovery_rate=3e-3
    ),
    "smollm2-dialogsum": Task("smollm2-135m", dialogsum, False, "all-linear", 16, 60, 4, 8e-4, 256, 40, 250),
    "stories15m-e2e": Task(
        "stories15m", e2e, False, "all-linear", 16, 130, 16, 3e-3, 192, 150, 300, recovery_rate=3e-3
    ),
    **{name: Task(**MINILM | own, sample=200) for name, own in GLUE.items()},
    **{f"{name}-mpnet": Task(**MPNET | own | LONGER, sample=200) for name, own in GLUE.items()},
}


def write_parts(name: str, data: Path, folder: Path) -> dict[str, Path]:
    """The files of a task's parts, written where they are not there or the task's cut has changed."""
    files = {part: folder / f"{name}-{part}.jsonl" for part in PARTS}
    folder.mkdir(parents=True, exist_ok=True)
    rows = TASKS[name].cut(data)
    rows["test"] = rows["test"][: TASKS[name].tested]
    for part, path in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows[part])
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return files
