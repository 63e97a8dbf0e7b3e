"""How long a merge takes and how much memory it needs, beside PEFT's merge and a plain copy of the file.

    python benchmarks/merge.py [--layers 16] [--runs 3] [--large] [-o benchmarks/results/merge.json]

The base is a random Llama-shaped checkpoint in bfloat16, the adapter a random LoRA of rank 16 on all its linear
layers. Every run is a process of its own, so the time is what a user waits for and the memory is the greatest
resident size; the runs of the three alternate. A merge flushes its result to the disk, the others do not.

With --large, lorapack also merges into a base of the same shape with four times as many layers, and into one of the
shape of Llama-2-7B in shards (13.5 GB). Their files are headers and holes; what is written is real and needs the disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from facts import machine, spread, tell, versions

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
MAKE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
base, adapter, layers = sys.argv[1:]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=2816,
    num_hidden_layers=int(layers), num_attention_heads=16, num_key_value_heads=16)).bfloat16()
model.save_pretrained(base)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
get_peft_model(model.float(), config).save_pretrained(adapter)
"""


@dataclass(frozen=True)
class Shape:
    """Of a Llama: what decides how large its tensors are."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every linear layer."""
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (self.hidden, self.hidden))
        mlp = {"gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden)}
        mlp["down_proj"] = (self.hidden, self.inner)
        return {
            f"model.layers.{n}.{part}.{name}": shape
            for n in range(self.layers)
            for part, names in (("self_attn", attention), ("mlp", mlp))
            for name, shape in names.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (self.vocabulary, self.hidden))
        norms = {
            f"model.layers.{n}.{name}.weight": (self.hidden,)
            for n in range(self.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        return (
            ends | norms | {"model.norm.weight": (self.hidden,)} | {f"{n}.weight": s for n, s in self.linear().items()}
        )


def make_holes(shape: Shape, base: Path, adapter: Path, shard: int = 2**32) -> None:
    """A sharded bfloat16 base whose weights are holes in the files, and a random adapter."""
    import numpy as np  # here: a child's greatest resident size begins with its parent's
    from safetensors.numpy import save_file

    from lorapack.merge.layout import Entry, header

    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}))
    shards: list[dict[str, Entry]] = [{}]
    for name, dimensions in shape.tensors().items():
        if sum(2 * math.prod(entry.shape) for entry in shards[-1].values()) > shard:
            shards.append({})
        shards[-1][name] = Entry("BF16", dimensions, 0, 0)
    places = {}
    for number, entries in enumerate(shards, 1):
        file = base / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        start, laid = header(entries, {"format": "pt"})
        file.write_bytes(start)
        os.truncate(file, max(entry.stop for entry in laid.values()))
        places |= dict.fromkeys(entries, file.name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    random = np.random.default_rng(0)
    factors = {
        f"base_model.model.{module}.lora_{part}.weight": random.standard_normal(size, dtype=np.float32) / 16
        for module, (d_out, d_in) in shape.linear().items()
        for part, size in (("A", (16, d_in)), ("B", (d_out, 16)))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def large(shape: Shape, place: Path) -> dict[str, object]:
    """One merge into a base of holes; everything is removed again."""
    base, adapter, out = (place / name for name in ("base", "adapter", "out"))
    try:
        maker = multiprocessing.get_context("spawn").Process(target=make_holes, args=(shape, base, adapter))
        maker.start()
        maker.join()
        length = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        if shutil.disk_usage(place).free < 1.1 * length:
            raise SystemExit(f"not enough disk for a result of {length / 1e9:.1f} GB")
        command = [sys.executable, "-m", "lorapack", "merge", adapter, "--base", base, "-o", out]
        seconds, peak = measured(list(map(str, command)))
        largest = max(2 * math.prod(size) for size in shape.tensors().values())
        return {
            "gb": round(length / 1e9, 2),
            "shards": len(list(base.glob("*.safetensors"))),
            "largest_tensor_mb": round(largest / 1e6, 1),
            "seconds": round(seconds, 2),
            "peak_mb": round(peak, 1),
        }
    finally:
        for directory in (base, adapter, out):
            shutil.rmtree(directory, ignore_errors=True)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and greatest resident megabytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:4]} failed: {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--large", action="store_true")
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base, adapter, out = (f"{place}/{name}" for name in ("base", "adapter", "out"))
        subprocess.run([sys.executable, "-c", MAKE, base, adapter, str(given.layers)], check=True)
        commands = {
            "lorapack": [sys.executable, "-m", "lorapack", "merge", adapter, "--base", base, "-o", out],
            "peft": [sys.executable, "-c", PEFT, base, adapter, out],
            "cp": ["cp", "--reflink=never", f"{base}/model.safetensors", out],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.runs):
            for name, command in commands.items():
                runs[name].append(measured(command))
                shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
        length = Path(f"{base}/model.safetensors").stat().st_size
        bigger = {}
        if given.large:
            for name, shape in (
                ("four_times_as_large", Shape(4 * given.layers, 1024, 2816, 8000)),
                ("llama_2_7b_shape", Shape(32, 4096, 11008, 32000)),
            ):
                bigger[name] = large(shape, Path(place) / name)
        modules = len(json.loads(Path(f"{adapter}/adapter_config.json").read_text())["target_modules"]) * given.layers
    rows = {
        name: {
            "seconds": spread([seconds for seconds, _ in each]),
            "peak_mb": round(max(m for _, m in each), 1),
        }
        for name, each in runs.items()
    }
    result = {
        "what": f"bfloat16 Llama shape, {length / 1e6:.0f} MB, LoRA r=16 on {modules} linear layers",
        "runs": given.runs,
        "machine": machine(),
        "versions": versions(),
        **rows,
        "peft_seconds_over_ours": round(rows["peft"]["seconds"]["median"] / rows["lorapack"]["seconds"]["median"], 2),
        "peft_peak_over_ours": round(rows["peft"]["peak_mb"] / rows["lorapack"]["peak_mb"], 2),
        **bigger,
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
