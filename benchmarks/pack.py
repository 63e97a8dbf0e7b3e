"""How long planning and packing take for a Llama-7B-shaped adapter, beside two ways that form the updates.

    python benchmarks/pack.py [--layers 32] [--rank 64] [--runs 3] [-o benchmarks/results/pack.json]

The adapter and its moments are random (only shapes matter here). The peers are what generic tools do for one
module: form B A and take its full SVD, and PEFT's `convert_to_lora`, which cuts any adapter to a LoRA of a
given rank. They are measured for one attention and one MLP module, times the number of such modules.
The runs of ours and of the peers alternate; a ratio is of the medians, its spread that of the worst run against
the best and the best against the worst.
"""

import argparse
import statistics as stats
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from facts import machine, spread, tell, versions
from torch import nn

from lorapack.core.adapter import Adapter, Factors, Pointer, size
from lorapack.core.statistics import Moments, Statistics
from lorapack.pack import pack_adapter
from lorapack.plan import METHODS

METRICS = ("weight", "loss")
MODULES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def shape(name: str, width: int) -> tuple[int, int]:
    """(d_out, d_in) as in Llama 7B, where the width is 4096 and the MLP's 11008."""
    wide = width * 43 // 16
    return {"down_proj": (width, wide), "gate_proj": (wide, width), "up_proj": (wide, width)}.get(name, (width, width))


def adapter(layers: int, rank: int, width: int) -> tuple[Adapter, Statistics]:
    generator = torch.Generator().manual_seed(0)
    pool, moments = {}, {}
    for layer in range(layers):
        for name in (*MODULES["attention"], *MODULES["mlp"]):
            d_out, d_in = shape(name, width)
            module = f"model.layers.{layer}.{name}"
            a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            h, u = (torch.randn(256, rank, generator=generator, dtype=torch.float64) for _ in range(2))
            pool[module], moments[module] = Factors(a, b), Moments(h.T @ h, u.T @ u, u.T @ h)
    made = Adapter({"peft_type": "LORA"}, pool, {m: Pointer(m, 2.0) for m in pool}, {})
    return made, Statistics(moments, 256.0, 256, 1, "token", {})


def attached(factors: Factors) -> peft.PeftModel:
    """One linear layer with the pair as its LoRA, as PEFT holds it."""
    d_out, d_in = factors.shape
    config = peft.LoraConfig(r=factors.rank, lora_alpha=2 * factors.rank, target_modules=["layer"])
    model = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(d_in, d_out, bias=False)}), config)
    layer = model.base_model.model["layer"]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factors.A, factors.B
    return model


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def over(peer: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as long the peer took."""
    ratio = stats.median(peer) / stats.median(ours)
    return {"median": round(ratio, 1), "min": round(min(peer) / max(ours), 1), "max": round(max(peer) / min(ours), 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already")
    made, moments = adapter(given.layers, given.rank, given.width)
    budget = size(made).parameters // 4
    one = {"attention": made.pool["model.layers.0.q_proj"], "mlp": made.pool["model.layers.0.up_proj"]}
    models = {kind: attached(factors) for kind, factors in one.items()}

    def ours(metric: str) -> None:
        plan = METHODS["rank"].run(made, moments, budget, {"metric": metric})
        pack_adapter(made, plan, moments)

    def full_svd(kind: str) -> None:
        torch.linalg.svd(one[kind].B @ one[kind].A, full_matrices=False)

    def converted(kind: str) -> None:
        peft.convert_to_lora(models[kind], rank=given.rank // 4)

    peers = {"full_svd": full_svd, "peft_convert_to_lora": converted}
    own: dict[str, list[float]] = {metric: [] for metric in METRICS}
    modules: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in MODULES} for name in peers}
    for _ in range(given.runs):
        for metric in METRICS:
            own[metric].append(seconds(lambda m=metric: ours(m)))
        for name, peer in peers.items():
            for kind in MODULES:
                modules[name][kind].append(seconds(lambda p=peer, k=kind: p(k)))
    whole = {
        name: [
            given.layers * sum(len(MODULES[kind]) * found[kind][run] for kind in MODULES) for run in range(given.runs)
        ]
        for name, found in modules.items()
    }
    what = f"rank, budget 25%, Llama shape of width {given.width}, {given.layers} layers, rank {given.rank}, float32"
    result = {
        "what": what,
        "runs": given.runs,
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "lorapack_seconds": {metric: spread(found) for metric, found in own.items()},
        "peer_seconds_one_module": {n: {k: spread(t) for k, t in found.items()} for n, found in modules.items()},
        "peer_seconds_all_modules": {name: spread(found) for name, found in whole.items()},
        "peer_over_ours": {name: {m: over(whole[name], own[m]) for m in METRICS} for name in peers},
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
