"""What an export to ONNX costs, and how fast its graph decodes, beside torch, optimum and onnxruntime-genai.

    python benchmarks/export.py [--layers 16] [--runs 3] [--optimum PYTHON] [--genai PYTHON] [-o RESULT.json]

The base is a random Llama-shaped checkpoint in bfloat16, the adapter a random LoRA of rank 16 on all its linear layers;
all graphs are float32. Every run is a process of its own, so the time is what a user waits for and the memory is the
greatest resident size; the runs of the alternatives alternate. The peers are given by the interpreters of environments
of their own, one with an old transformers, one with a new one:

    python -m venv optimum && optimum/bin/pip install torch==2.13.0 'transformers<4.58' optimum-onnx onnxruntime
    python -m venv genai && genai/bin/pip install torch==2.13.0 transformers onnx-ir onnxruntime onnxruntime-genai

They are given the merged checkpoint, so the merge is not in their time. Decoding: one thread, one row, 32 tokens, then
steps of one; the sessions take turns within one process, onnxruntime-genai's loop has a process of its own after them.
"""

import argparse
import json
import os
import shutil
import statistics as stats
import subprocess
import sys
import tempfile
from pathlib import Path

from facts import machine, spread, tell, versions
from merge import MAKE, measured

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "stories260k"
PLAIN = """
import os, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()

class Cached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for n in range(0, len(past), 2):
            cache.update(past[n], past[n + 1], n // 2)
        logits = self.model(input_ids, attention_mask, position_ids, cache, use_cache=True).logits
        return logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))

c, free = model.config, torch.export.Dim.DYNAMIC
ids = torch.zeros(2, 3, dtype=torch.int64)
past = [torch.zeros(2, c.num_key_value_heads, 5, c.hidden_size // c.num_attention_heads)] * (2 * c.num_hidden_layers)
os.makedirs(out)
with torch.no_grad():
    torch.onnx.export(
        Cached(), (ids, torch.ones(2, 8, dtype=torch.int64), ids.clone(), [t.clone() for t in past]),
        f"{out}/model.onnx", dynamo=True, external_data=True,
        dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free}] * len(past)),
    )
"""
MERGED = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
GENAI = """
import json, statistics, sys, time
import numpy as np, onnxruntime_genai as og
model = og.Model(sys.argv[1])
each = []
for _ in range(int(sys.argv[2])):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=32 + 64, min_length=32 + 64, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.arange(3, 35, dtype=np.int32))
    generator.generate_next_token()
    times = []
    for _ in range(60):
        start = time.perf_counter()
        generator.generate_next_token()
        times.append(time.perf_counter() - start)
    each.append(1000 * statistics.median(times))
print(json.dumps(each))
"""
DECODE = """
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
sessions = {}
for path in sys.argv[2:]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions[path] = ort.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])

def run(session):
    taken = {value.name: value for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    past = {n: np.zeros([1, v.shape[1], 0, v.shape[3]], np.float32) for n, v in taken.items() if n.startswith("past_")}
    ids, seen, times = np.arange(3, 35)[None], 0, []
    for _ in range(61):
        seen += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64)}
        feeds["position_ids"] = np.arange(seen - ids.shape[1], seen)[None]
        start = time.perf_counter()
        found = dict(zip(names, session.run(None, {n: t for n, t in feeds.items() if n in taken} | past)))
        times.append(time.perf_counter() - start)
        past = {n.replace("present", "past_key_values"): t for n, t in found.items() if n != "logits"}
        ids = found["logits"][:, -1:].argmax(-1)
    return 1000 * statistics.median(times[1:])

each = {path: [] for path in sessions}
for _ in range(int(sys.argv[1])):
    for path, session in sessions.items():
        each[path].append(run(session))
print(json.dumps(list(each.values())))
"""


def ours(adapter: str, base: str, out: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "lorapack", "export", adapter, "--base", base, "-o", out, *more]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--optimum", metavar="PYTHON")
    options.add_argument("--genai", metavar="PYTHON")
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        base, adapter, merged = (f"{place}/{name}" for name in ("base", "adapter", "merged"))
        subprocess.run([sys.executable, "-c", MAKE, base, adapter, str(given.layers)], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, base)
        subprocess.run([sys.executable, "-c", MERGED, base, adapter, merged], check=True)
        for path in TOKENIZER.glob("tokenizer*"):
            shutil.copy(path, merged)
        out = {name: f"{place}/{name}" for name in ("first", "second", "checked", "plain", "optimum")}
        commands = {
            "first": ours(adapter, base, out["first"], "--no-verify"),
            "second": ours(adapter, base, out["second"], "--no-verify"),
            "checked": ours(adapter, base, out["checked"]),
            "plain": [sys.executable, "-c", PLAIN, base, adapter, out["plain"]],
        }
        if given.optimum:
            task = ["--model", merged, "--task", "text-generation-with-past", "--no-post-process"]
            commands["optimum"] = [
                given.optimum,
                "-m",
                "optimum.commands.optimum_cli",
                "export",
                "onnx",
                *task,
                out["optimum"],
            ]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.runs):
            shutil.rmtree(f"{place}/cache", ignore_errors=True)  # so that `first` traces, and `second` does not
            for name, command in commands.items():
                shutil.rmtree(out[name], ignore_errors=True)
                runs[name].append(measured(command))
        graphs = ["second", *(["optimum"] if given.optimum else [])]
        decode = [sys.executable, "-c", DECODE, str(given.runs), *(out[name] for name in graphs)]
        each = json.loads(subprocess.run(decode, check=True, capture_output=True, text=True).stdout)
        latency = dict(zip(graphs, each, strict=True))
        if given.genai:
            latency["onnxruntime-genai"] = genai(given.genai, merged, f"{place}/genai", given.runs)
        length = Path(f"{base}/model.safetensors").stat().st_size
    rows = {
        name: {"seconds": spread([s for s, _ in each]), "peak_mb": round(max(m for _, m in each), 1)}
        for name, each in runs.items()
    }
    result = {
        "what": f"bfloat16 Llama shape, {length / 1e6:.0f} MB, LoRA r=16 on all linear layers, exported in float32",
        "runs": given.runs,
        "machine": machine(),
        "versions": versions(),
        "export": rows,
        "first_peak_over_plain": round(rows["first"]["peak_mb"] / rows["plain"]["peak_mb"], 3),
        "checked_peak_over_plain": round(rows["checked"]["peak_mb"] / rows["plain"]["peak_mb"], 3),
        "plain_seconds_over_second": round(rows["plain"]["seconds"]["median"] / rows["second"]["seconds"]["median"], 2),
        "decode_ms_a_token": {name: spread(values) for name, values in latency.items()},
        "decode_over_peers": {
            name: round(stats.median(latency["second"]) / stats.median(values), 3)
            for name, values in latency.items()
            if name != "second"
        },
    }
    tell(result, given.out)


def genai(python: str, merged: str, out: str, runs: int) -> list[float]:
    """Milliseconds a token of onnxruntime-genai's own graph and loop, on one thread."""
    build = [
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        "local",
        "-i",
        merged,
        "-o",
        out,
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    subprocess.run([python, *build], check=True, stdout=subprocess.DEVNULL)
    config = Path(out) / "genai_config.json"
    value = json.loads(config.read_text())
    value["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = 1
    config.write_text(json.dumps(value))
    done = subprocess.run([python, "-c", GENAI, out, str(runs)], check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
