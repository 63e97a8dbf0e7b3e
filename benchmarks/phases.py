"""Where the time of a large base goes: load, measure, plan, pack, write, each with its peak memory.

    python benchmarks/phases.py --shape 1b [--rows 4] [--length 1024] [--runs 1] [-o benchmarks/results/phases.json]

The base is a random bfloat16 Llama of the shape, the adapter a random LoRA of rank 16 on all linear layers, the rows
are random tokens: only shapes matter here. Every run is a process of its own; it measures what the metric needs,
plans and packs with `rank` at half the size, and writes as `compress` does (flushed, read back, compared).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from facts import device_name, machine, spread, tell, versions

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "stories260k"
SHAPES = {  # hidden, inner, layers, heads, key-value heads, vocabulary, tied
    "tiny": (64, 160, 2, 4, 2, 512, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "7b": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2 7B
}
RANK = 16


def make(shape: str, base: Path, adapter: Path, device: str) -> None:
    """The base, and an adapter for it of a size that changes the predictions; drawn on the device, for speed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, shared, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, base)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    lora.task_type, lora.base_model_name_or_path = "CAUSAL_LM", str(base)
    made = get_peft_model(model, lora)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.05
    made.save_pretrained(adapter, save_embedding_layers=False)


def one(given: argparse.Namespace) -> None:
    """All phases, in this process."""
    import torch

    from lorapack.data.batches import batches
    from lorapack.data.encode import Encoded
    from lorapack.job import plan_adapter
    from lorapack.measure.moments import measure_moments
    from lorapack.model.load import load
    from lorapack.pack import pack_adapter
    from lorapack.read import read_adapter
    from lorapack.steps import Steps
    from lorapack.write import write_adapter

    torch.set_num_threads(given.threads)
    steps = Steps()
    with steps.step("load"):
        adapter = read_adapter(given.place / "adapter")
        loaded = load(adapter, str(given.place / "base"), device=given.device, dtype="bfloat16")
    loss = given.metric == "loss"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, SHAPES[given.shape][5], (given.rows, given.length), generator=generator).tolist()
    rows = [Encoded(n, tuple(ids), tuple(ids)) for n, ids in enumerate(drawn)]
    tokens = loaded.tokens_with_logits(given.batch_tokens) if loss else given.batch_tokens
    cpu = time.process_time()
    with steps.step("measure"):
        statistics = measure_moments(loaded, adapter.linear, batches(rows, tokens, loaded.pad), loss=loss)
    cpu = time.process_time() - cpu
    del loaded
    with steps.step("plan"):
        plan = plan_adapter(adapter, statistics, "rank", budget="50%", metric=given.metric)
    with steps.step("pack"):
        smaller = pack_adapter(adapter, plan, statistics)
    with steps.step("write"):
        write_adapter(smaller, given.place / f"out-{os.getpid()}")
    steps.done["measure"]["cpu_seconds"] = round(cpu, 3)
    print(json.dumps({"steps": steps.done, "modules": len(adapter.linear), "device": device_name(given.device)}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, required=True)
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--length", type=int, default=1024, help="tokens a row")
    options.add_argument("--metric", choices=("output", "loss"), default="loss")
    options.add_argument("--batch-tokens", type=int, default=4096)
    options.add_argument("--runs", type=int, default=1)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    if given.place:
        if given.make:
            make(given.shape, given.place / "base", given.place / "adapter", given.device)
        else:
            one(given)
        return
    with tempfile.TemporaryDirectory() as place:
        again = [sys.executable, *sys.argv, "--place", place]
        subprocess.run([*again, "--make"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = []
        for _ in range(given.runs):
            done = subprocess.run(again, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(runs[-1], file=sys.stderr, flush=True)
    split = {
        step: {what: spread([run["steps"][step][what] for run in runs]) for what in found}
        for step, found in runs[0]["steps"].items()
    }
    after = [sum(run["steps"][step]["seconds"] for step in ("plan", "pack", "write")) for run in runs]
    result = {
        "what": f"random bfloat16 Llama of {given.shape} shape, rank {RANK} on {runs[0]['modules']} linear layers, "
        f"{given.rows} rows of {given.length} tokens, metric {given.metric}",
        "machine": machine(given.threads),
        "device": runs[0]["device"],
        "versions": versions(),
        "runs": given.runs,
        "split": split,
        "plan_pack_write_seconds": spread(after),
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
