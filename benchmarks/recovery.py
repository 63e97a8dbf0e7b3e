"""Speed and memory of a recovery step: lorapack's loop beside PEFT and transformers' Trainer with a KL loss.

    python benchmarks/recovery.py --model DIR --data FILE.jsonl [-o benchmarks/results/recovery.json]

Same model, rows, rows a step, steps and precision (float32, but for one of them); the same adapter of rank 16 on all
linear layers, cut to rank 4, is trained towards the whole one. Every run is a process of its own, so its peak memory is
its own. The Trainer's loss is written the usual way: logits of both adapters for the whole batch, shifted, KL, mean
over the labelled tokens.

- `lorapack, bfloat16`: with the base in bfloat16, as `compress --dtype bfloat16` loads it.
- `trainer`: its own order of rows.
- `trainer, our batches`: fed the very batches that lorapack makes, of rows of similar length.

Tokens a second count the rows' own tokens, not padding, and leave out the first step, in which allocator and caches
warm up. Beside the wall clock, seconds of the processor are counted, which a busy machine disturbs less. lorapack's
time includes a look at one selection row after each of these few steps, and the comparison of the states between the
layers, which the other does not make. With `--rows` fewer than steps times rows a
step there is more than one epoch, and lorapack remembers the teacher's hidden states.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from facts import machine, spread, tell, versions

RANK, CUT, LEARNING_RATE = 16, 4, 1e-3
OURS, IN_BFLOAT16, _, OUR_BATCHES = KINDS = (
    "lorapack",
    "lorapack, bfloat16",
    "trainer",
    "trainer, our batches",
)


def prepared(given):
    """The adapter, its cut, the loaded base and the rows."""
    from lorapack.core.plan import Choice, Plan
    from lorapack.data.columns import detect, examples
    from lorapack.data.encode import encode
    from lorapack.data.rows import read_rows
    from lorapack.model.load import load
    from lorapack.pack import pack_adapter
    from lorapack.read import read_adapter

    adapter = read_adapter(given.adapter)
    packed = pack_adapter(adapter, Plan("by hand", {}, tuple(Choice(m, "keep", CUT) for m in adapter.linear)))
    loaded = load(adapter, given.model, device="cpu", dtype="bfloat16" if given.kind == IN_BFLOAT16 else "float32")
    rows = read_rows(given.data)[: given.rows]
    encoded = encode(examples(rows, detect(rows, False, {})), loaded.reader.tokenizer, loaded.reader.longest)
    return adapter, packed, loaded, encoded


def make_adapter(model: str, out: str) -> None:
    """A random adapter of a size that changes the predictions."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    made = get_peft_model(base, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.05
    made.save_pretrained(out)


class Clock:
    """Seconds and tokens from the second batch on."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.cpu, self.seen = 0, 0.0, 0.0, 0
        self.start = self.start_cpu = 0.0

    def begin(self) -> None:
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> None:
        self.seen += 1
        if self.seen > 1:
            self.seconds += time.perf_counter() - self.start
            self.cpu += time.process_time() - self.start_cpu
            self.tokens += tokens


def lorapack_run(given) -> Clock:
    from lorapack.recover import Settings, recover

    adapter, packed, loaded, rows = prepared(given)
    clock = Clock()

    def watch(batches, total):
        for batch in batches:
            clock.begin()
            yield batch
            # a check follows some steps; it is inside the loop's body and so inside this time
            clock.end(int(batch.attention_mask.sum()))

    settings = Settings(steps=given.steps, learning_rate=LEARNING_RATE, batch_size=given.batch_size)
    recover(loaded, adapter, packed, rows, rows[:1], settings, watch=watch)
    return clock


def trainer_run(given, ours: bool) -> Clock:
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from lorapack.data.batches import collate, training_batches
    from lorapack.data.encode import IGNORED
    from lorapack.write import write_adapter

    _, packed, loaded, rows = prepared(given)
    pad = loaded.pad
    del loaded
    work = tempfile.mkdtemp()
    write_adapter(packed, f"{work}/packed")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), given.adapter, adapter_name="teacher"
    )
    model.load_adapter(f"{work}/packed", adapter_name="student", is_trainable=True)
    model.set_adapter("student")
    clock = Clock()
    batches = list(training_batches(rows, given.batch_size, given.steps, pad, 0)) if ours else []
    data = batches if ours else [(n, row) for n, row in enumerate(rows)]

    def fields(items):
        batch = items[0] if ours else collate(items, pad)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    class Distil(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            model.set_adapter("teacher")
            with torch.no_grad():
                target = model(**inputs).logits
            model.set_adapter("student")
            logits = model(**inputs).logits
            mask = labels[:, 1:] != IGNORED
            divergence = functional.kl_div(
                functional.log_softmax(logits[:, :-1].float(), -1),
                functional.log_softmax(target[:, :-1].float(), -1),
                log_target=True,
                reduction="none",
            ).sum(-1)
            return (divergence * mask).sum() / mask.sum()

        def training_step(self, model, inputs, *rest):
            self.tokens = int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end(trainer.tokens)

    arguments = TrainingArguments(
        output_dir=work,
        per_device_train_batch_size=1 if ours else given.batch_size,
        max_steps=given.steps,
        learning_rate=LEARNING_RATE,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Distil(model=model, args=arguments, train_dataset=data, data_collator=fields, callbacks=[Watch()])
    trainer.train()
    return clock


def one(given) -> None:
    torch.set_num_threads(given.threads)
    clock = lorapack_run(given) if given.kind in (OURS, IN_BFLOAT16) else trainer_run(given, given.kind == OUR_BATCHES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens": clock.tokens, "seconds": clock.seconds, "cpu": clock.cpu, "peak_mb": peak}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a Llama-like base model")
    options.add_argument("--data", required=True, help="prompt/completion rows")
    options.add_argument("--rows", type=int, default=64, help="how many of them")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options.add_argument("--adapter", help="instead of a random one")
    options.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    if given.kind:
        one(given)
        return
    with tempfile.TemporaryDirectory() as work:
        if not given.adapter:
            make_adapter(given.model, work)
        found: dict[str, list[dict]] = {kind: [] for kind in given.kinds}
        for _ in range(given.runs):
            for kind in given.kinds:  # in turns, so that a busy machine is busy for all
                arguments = ["--adapter", given.adapter or work, "--kind", kind]
                done = subprocess.run([sys.executable, *sys.argv, *arguments], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(kind, found[kind][-1], file=sys.stderr, flush=True)
    rates = {kind: [run["tokens"] / run["seconds"] for run in runs] for kind, runs in found.items()}
    work = {kind: [run["tokens"] / run["cpu"] for run in runs] for kind, runs in found.items()}
    peaks = {kind: [run["peak_mb"] for run in runs] for kind, runs in found.items()}
    result = {
        "what": f"{Path(given.model).name}, {given.rows} prompt/completion rows, {given.batch_size} rows a step, "
        f"{given.steps} steps, float32 where it does not say bfloat16, "
        f"adapter of rank {RANK} on all linear layers cut to {CUT}",
        "machine": machine(given.threads),
        "versions": versions(),
        "tokens_per_second": {kind: spread(rate) for kind, rate in rates.items()},
        "peak_mb": {kind: spread(peak) for kind, peak in peaks.items()},
        "tokens_per_cpu_second": {kind: spread(rate) for kind, rate in work.items()},
        "times_as_fast_by_cpu_seconds": {
            kind: spread([a / b for a, b in zip(work[OURS], work[kind], strict=True)])
            for kind in rates
            if kind != OURS and OURS in rates
        },
        "times_as_fast": {
            kind: spread([a / b for a, b in zip(rates[OURS], rates[kind], strict=True)])
            for kind in rates
            if kind != OURS and OURS in rates
        },
        "share_of_memory": {
            kind: spread([a / b for a, b in zip(peaks[OURS], peaks[kind], strict=True)])
            for kind in peaks
            if kind != OURS and OURS in peaks
        },
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
