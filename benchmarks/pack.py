"""How long planning and packing take for a Llama-7B-shaped adapter, beside a full SVD of the updates.

    python benchmarks/pack.py [--layers 32] [--rank 64] [--runs 3] [-o benchmarks/results/pack.json]

The adapter and its moments are random (only shapes matter here). The peer is what generic tools do for
one layer: form B A and take its SVD; measured for one attention and one MLP layer in the same run,
times the number of layers.
"""

import argparse
import json
import platform
import statistics as stats
import time
from pathlib import Path

import torch

from lorapack.core.adapter import Adapter, Factors, Pointer, size
from lorapack.core.statistics import Moments, Statistics
from lorapack.pack import pack_adapter
from lorapack.plan import METHODS

WIDTH, MLP = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.up_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
}


def adapter(layers: int, rank: int) -> tuple[Adapter, Statistics]:
    generator = torch.Generator().manual_seed(0)
    pool, moments = {}, {}
    for layer in range(layers):
        for name, (d_out, d_in) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            h, u = (torch.randn(256, rank, generator=generator, dtype=torch.float64) for _ in range(2))
            pool[module], moments[module] = Factors(a, b), Moments(h.T @ h, u.T @ u, u.T @ h)
    made = Adapter({"peft_type": "LORA"}, pool, {m: Pointer(m, 2.0) for m in pool}, {})
    return made, Statistics(moments, 256.0, 256, 1, "token", {})


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def full_svd(factors: Factors) -> None:
    torch.linalg.svd(factors.B @ factors.A, full_matrices=False)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    made, moments = adapter(given.layers, given.rank)
    budget = size(made).parameters // 4

    def ours(metric: str) -> None:
        plan = METHODS["rank"].run(made, moments, budget, {"metric": metric})
        pack_adapter(made, plan, moments)

    rows = {metric: [seconds(lambda m=metric: ours(m)) for _ in range(given.runs)] for metric in ("weight", "loss")}
    one = {
        name: seconds(lambda n=name: full_svd(made.pool[f"model.layers.0.{n}"]))
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    peer = given.layers * (4 * one["self_attn.q_proj"] + 3 * one["mlp.up_proj"])
    result = {
        "what": f"rank, budget 25%, Llama-7B shape, {given.layers} layers, rank {given.rank}, float32",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "lorapack_seconds": {m: {"median": stats.median(t), "min": min(t), "max": max(t)} for m, t in rows.items()},
        "full_svd_seconds_one_layer": one,
        "full_svd_seconds_all_layers": peer,
        "ratio": {m: peer / stats.median(t) for m, t in rows.items()},
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
