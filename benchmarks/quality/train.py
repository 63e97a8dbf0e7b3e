"""Train the adapter of a task, with plain PyTorch and PEFT.

    python benchmarks/quality/train.py TASK SEED --data DIR --models DIR --adapters DIR [--half]

Writes ADAPTERS/TASK-SEED (with --half TASK-SEED-half, of half the rank: the control), and training.json
in it: recipe, seconds, loss of the base and the adapter on rows that it did not learn from. What has to
lie in the folders is said in README.md. On the CPU one thread computes, so the sums are the same on any
machine of its kind.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import machine, versions
from tasks import FIXTURES, TASKS, Task, read, write_parts
from torch import Tensor
from torch.nn import functional

from lorapack.data.batches import Batch, batches, training_batches
from lorapack.data.columns import detect, examples
from lorapack.data.encode import IGNORED, Encoded, encode

CHECKED = 200  # rows for the loss at the end


def options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("task", choices=TASKS)
    found.add_argument("seed", type=int)
    found.add_argument("--data", type=Path, default=Path("data"), help="the datasets")
    found.add_argument("--models", type=Path, default=Path("models"), help="the base models")
    found.add_argument("--adapters", type=Path, default=Path("adapters"), help="where the adapters go")
    found.add_argument("--half", action="store_true", help="half the rank, the recipe unchanged")
    found.add_argument("--steps", type=int, help="instead of the task's own")
    found.add_argument("--bf16", action="store_true", help="multiply in bfloat16: three times as fast on CPUs that can")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def main() -> None:
    given = options().parse_args()
    task = TASKS[given.task]
    rank = task.rank // 2 if given.half else task.rank
    out = given.adapters / f"{given.task}-{given.seed}{'-half' if given.half else ''}"
    if (out / "adapter_config.json").exists():
        sys.exit(f"{out} is there already")
    if given.task == "stories260k":
        script = [sys.executable, str(FIXTURES / "train_adapter.py")]
        subprocess.run([*script, "--seed", str(given.seed), "--rank", str(rank), "--out", str(out)], check=True)
        return
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)
    files = write_parts(given.task, given.data, given.adapters / "rows")
    model, tokenizer = attached(task, rank, given.models)
    model.to(given.device)
    rows = {part: encoded(task, files[part], tokenizer) for part in ("train", "data")}
    steps, pad = given.steps or task.steps, tokenizer.pad_token_id or 0
    held = batches(rows["data"][:CHECKED], 2048, pad)
    start = time.time()
    seen = training_batches(rows["train"], task.batch_size, steps, pad, given.seed)
    curve = fit(model, task, seen, steps, given.bf16)
    seconds = time.time() - start
    reached = check(model, held)
    with model.disable_adapter():
        fresh = check(model, held)
    with off(model):
        base = check(model, held)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    recipe = {k: v for k, v in asdict(task).items() if k != "cut"} | {"rank": rank, "steps": steps, "bf16": given.bf16}
    record = {
        "task": given.task,
        "seed": given.seed,
        "recipe": recipe,
        "rows": {part: len(found) for part, found in rows.items()},
        "seconds": round(seconds, 1),
        "curve": curve,
        "unseen_loss": {"base": base, "adapter": reached, "untrained": fresh},
        "machine": machine(),
        "versions": versions(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("task", "seed", "seconds", "unseen_loss")}), flush=True)


def attached(task: Task, rank: int, models: Path) -> tuple[Any, Any]:
    """The base with a new adapter, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    source = models / task.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    kind = AutoModelForSequenceClassification if task.labelled else AutoModelForCausalLM
    more = {"num_labels": 2} if task.labelled else {}
    model = kind.from_pretrained(source, dtype=torch.float32, **more)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=task.targets if isinstance(task.targets, str) else list(task.targets),
        task_type="SEQ_CLS" if task.labelled else "CAUSAL_LM",  # the head of a classifier is trained and saved too
    )
    return get_peft_model(model, config), tokenizer


def encoded(task: Task, path: Path, tokenizer: Any) -> list[Encoded]:
    rows = read(path)
    return encode(examples(rows, detect(rows, task.labelled, {})), tokenizer, task.longest)


def fit(model: Any, task: Task, seen: Any, steps: int, bf16: bool) -> list[tuple[int, float]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=steps)
    model.train()
    curve, sums = [], []
    for step, batch in enumerate(seen, 1):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):  # a step: it keeps what it has cast
            loss = losses(model, batch.to(model.device)).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        sums.append(float(loss.detach()))
        if len(sums) == max(1, steps // 10):
            curve.append((step, round(sum(sums) / len(sums), 4)))
            print(f"step {step}  loss {curve[-1][1]}", flush=True)
            sums = []
    model.eval()
    return curve


def losses(model: Any, batch: Batch) -> Tensor:
    """The cross entropy of every prediction; the head of a language model sees only where there is one."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.labels.ndim == 1:
        types = {} if batch.token_types is None else {"token_type_ids": batch.token_types}
        return functional.cross_entropy(model(**inputs, **types).logits, batch.labels, reduction="none")
    wanted = batch.labels[:, 1:] != IGNORED
    columns = wanted.any(dim=0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    chosen = wanted[:, columns]
    return functional.cross_entropy(logits[chosen], batch.labels[:, 1:][:, columns][chosen], reduction="none")


def check(model: Any, held: list[Batch]) -> float:
    with torch.no_grad():
        found = torch.cat([losses(model, batch.to(model.device)) for batch in held])
    return round(float(found.mean()), 4)


class off:  # noqa: N801
    """The low-rank updates off, the trained head on: the base that "gain retained" is counted from."""

    def __init__(self, model: Any) -> None:
        self.layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]

    def __enter__(self) -> None:
        self.kept = [dict(layer.scaling) for layer in self.layers]
        for layer in self.layers:
            layer.scaling = dict.fromkeys(layer.scaling, 0.0)

    def __exit__(self, *_: object) -> None:
        for layer, scaling in zip(self.layers, self.kept, strict=True):
            layer.scaling = scaling


if __name__ == "__main__":
    main()
