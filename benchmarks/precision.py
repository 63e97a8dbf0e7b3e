"""How far correct answers lie apart: ONNX graphs and torch, in float32 and float16, from the same model in float64.

    python benchmarks/precision.py --adapter DIR --base DIR [--tokens 448] [-o benchmarks/results/precision.json]

One row of text. The truth is torch in float64, the adapter beside the base and not merged. A graph is merged.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from facts import machine, tell, versions
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapack.export.export as onnx
from lorapack.export.verify import TEXT, Session, _feeds
from lorapack.merge.numbers import Array


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--adapter", required=True)
    options.add_argument("--base", required=True)
    options.add_argument("--tokens", type=int, default=448)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    ids = np.array([tokenizer(TEXT * (given.tokens // 64 + 1))["input_ids"][: given.tokens]])
    feeds = _feeds(ids, np.ones_like(ids))

    def model(dtype: torch.dtype, attention: str = "eager") -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(given.base, dtype=dtype, attn_implementation=attention)
        return PeftModel.from_pretrained(base, given.adapter).to(dtype).eval()

    def logits(found: torch.nn.Module) -> Array:
        with torch.no_grad():
            return found(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.double().numpy()

    def graph(dtype: str) -> Array:
        with tempfile.TemporaryDirectory() as place:
            onnx.export_adapter(given.adapter, f"{place}/out", given.base, dtype=dtype, verify=False)
            return Session(Path(f"{place}/out/model.onnx"))(feeds)["logits"].astype(np.float64)

    truth = logits(model(torch.float64))
    single, other = logits(model(torch.float32, "sdpa")), logits(model(torch.float32))
    ours, half = graph("fp32"), graph("fp16")
    rounded = model(torch.float64).merge_and_unload().half().double()
    pairs = {
        "the fp32 graph and the truth": (ours, truth),
        "torch float32 and the truth": (single, truth),
        "the fp32 graph and torch float32": (ours, single),
        "torch float32 with sdpa and with eager attention": (single, other),
        "the fp16 graph and the truth": (half, truth),
        "weights rounded to float16, everything else in float64, and the truth": (logits(rounded), truth),
        "the truth's logits rounded to float16, and the truth": (truth.astype(np.float16).astype(np.float64), truth),
        "torch float16 and the truth": (logits(model(torch.float16)), truth),
    }
    result = {
        "what": f"{Path(given.base).name} and {Path(given.adapter).name}, {given.tokens} tokens, {truth.size:,} logits",
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "largest_logit": float(abs(truth).max()),
        "differences": {
            name: {"greatest": float(abs(a - b).max()), "mean": float(abs(a - b).mean())}
            for name, (a, b) in pairs.items()
        },
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
