"""How long a merge takes and how much memory it needs, beside PEFT's merge and a plain copy of the file.

    python benchmarks/merge.py [--layers 16] [--runs 3] [-o benchmarks/results/merge.json]

The base is a random Llama-shaped checkpoint in bfloat16, the adapter a random LoRA of rank 16 on all its linear
layers. Every run is a process of its own, so the time is what a user waits for and the memory is the greatest
resident size; the runs of the three alternate. A merge flushes its result to the disk, the others do not.
"""

import argparse
import json
import os
import platform
import shutil
import statistics as stats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
        modules = len(json.loads(Path(f"{adapter}/adapter_config.json").read_text())["target_modules"]) * given.layers
    rows = {
        name: {
            "seconds": {"median": stats.median(t), "min": min(t), "max": max(t)},
            "peak_mb": round(max(m for _, m in each), 1),
        }
        for name, each in runs.items()
        for t in [[seconds for seconds, _ in each]]
    }
    load = "".join(f"{value:.1f} " for value in os.getloadavg()).strip()
    result = {
        "what": f"bfloat16 Llama shape, {length / 1e6:.0f} MB, LoRA r=16 on {modules} linear layers",
        "runs": given.runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, other work running beside it (load {load})",
        **rows,
        "peft_seconds_over_ours": round(rows["peft"]["seconds"]["median"] / rows["lorapack"]["seconds"]["median"], 2),
        "peft_peak_over_ours": round(rows["peft"]["peak_mb"] / rows["lorapack"]["peak_mb"], 2),
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
