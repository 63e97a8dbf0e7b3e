"""Sharing between adapters of one base: a common basis with a small core each, against cutting each alone.

    python benchmarks/quality/shared_basis.py [NAME=DIR,DIR,…] [-o benchmarks/results/shared_basis.json]
    python fixtures/train_adapter.py --steps 150 --seed 0 --part 0 4 --out part-0    # makes an adapter for it

The set `noise`, four copies of the fixture with a little noise, is always there: the most that can be shared.

For every module the updates W_i = s_i B_i A_i of N adapters become U K_i V with orthonormal U (d_out, k) and
V (k, d_in) for all of them and a core K_i (k, k) each, so that the sum of ||W_i - U K_i V||² is least (Compress then
Serve, arXiv 2407.00066, "JD-Full": alternating over U and V). Beside it each adapter alone is cut to a uniform rank in
the same metric (truncated SVD). Both look at no data, and cost the same: a basis counts 1/N for each adapter, and k is
the largest for which basis and core cost no more than the ranks of the cut. The figure is the gain retained on
held-out rows, without recovery.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from record import machine, versions
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.data.batches import batches
from lorapack.data.prepare import prepare_evaluation
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import score
from lorapack.model.load import load
from lorapack.model.point import place
from lorapack.read import read_adapter

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROUNDS = 30  # of the alternation; the loss falls by less than 1e-4 of itself long before
SHARES = (0.5, 0.25, 0.125)


def common_basis(updates: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, float]:
    """U (d_out, k) and V (k, d_in) that keep the most of all updates, (d_out, d_in) each, and the share they keep."""
    v = torch.linalg.svd(torch.cat(list(updates)), full_matrices=False)[2][:k]
    for _ in range(ROUNDS):
        u = torch.linalg.svd(torch.cat([w @ v.T for w in updates], 1), full_matrices=False)[0][:, :k]
        v = torch.linalg.svd(torch.cat([u.T @ w for w in updates]), full_matrices=False)[2][:k]
    kept = sum(float((u.T @ w @ v.T).square().sum()) for w in updates)
    return u, v, kept / sum(float(w.square().sum()) for w in updates)


def largest_core(d_out: int, d_in: int, number: int, allowed: float) -> int:
    """The largest k with (d_out + d_in) k / number + k² within `allowed` parameters."""
    k = 0
    while k < min(d_out, d_in) and (d_out + d_in) * (k + 1) / number + (k + 1) ** 2 <= allowed:
        k += 1
    return k


def update(adapter: Adapter, module: str) -> Tensor:
    factors = adapter.factors(module)
    return adapter.scale(module) * factors.B.double() @ factors.A.double()


def of_pairs(like: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
    """An adapter of plain pairs (B, A) without scales."""
    pool = {module: Factors(a.float().contiguous(), b.float().contiguous()) for module, (b, a) in pairs.items()}
    return Adapter(like.config, pool, {module: Pointer(module, 1.0) for module in pairs}, {})


def both(adapters: Sequence[Adapter], share: float) -> tuple[list[Adapter], list[Adapter], dict[str, float]]:
    """The adapters on a common basis, the adapters cut alone, and what the two cost and keep of the weights."""
    shared: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in adapters]
    alone: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in adapters]
    cost = {"shared": 0.0, "alone": 0.0, "whole": 0.0}
    for module in adapters[0].linear:
        updates = [update(adapter, module) for adapter in adapters]
        (d_out, d_in), whole = updates[0].shape, adapters[0].factors(module).rank
        rank = max(1, int(share * whole))
        k = largest_core(d_out, d_in, len(adapters), rank * (d_out + d_in))
        u, v, _ = common_basis(updates, k)
        for n, w in enumerate(updates):
            shared[n][module] = (u @ (u.T @ w @ v.T), v)
            left, values, right = torch.linalg.svd(w, full_matrices=False)
            alone[n][module] = (left[:, :rank] * values[:rank], right[:rank])
        cost["shared"] += (d_out + d_in) * k / len(adapters) + k**2
        cost["alone"] += rank * (d_out + d_in)
        cost["whole"] += whole * (d_out + d_in)

    def made(pairs: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> list[Adapter]:
        return [of_pairs(adapter, found) for adapter, found in zip(adapters, pairs, strict=True)]

    return made(shared), made(alone), cost


def noisy(adapter: Adapter, seed: int) -> Adapter:
    """The adapter with noise on its factors, 2% of their standard deviation."""
    dice = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=dice)

    return adapter.with_pool({n: Factors(moved(f.A), moved(f.B)) for n, f in adapter.pool.items()}, adapter.modules)


def compare(adapters: Sequence[Adapter], rows: int) -> list[dict[str, object]]:
    loaded = load(adapters[0], str(FIXTURES / "stories260k"), device="cpu")
    held, _ = prepare_evaluation(loaded.reader, str(FIXTURES / "tinyshakespeare" / "heldout.jsonl"))
    held = held[:rows]
    seen = batches(held, 4096, loaded.pad)
    results: list[dict[str, object]] = []
    for share in SHARES:
        shared, alone, cost = both(adapters, share)
        found: dict[str, list[list[float | None]]] = {"shared": [], "alone": []}
        for n, adapter in enumerate(adapters):
            variants = {"original": adapter, "base": None, "shared": shared[n], "alone": alone[n]}
            placed = {name: place(value, loaded.device) for name, value in variants.items()}
            scores = score(loaded, placed, "original", seen, len(held))
            for name in ("shared", "alone"):
                kept = quality({k: scores[k] for k in ("original", "base")} | {"compressed": scores[name]}, None, 0)
                assert kept.retained is not None
                found[name].append([kept.retained.value, kept.retained.low, kept.retained.high])
        means = {name: sum(value or 0.0 for value, _, _ in each) / len(each) for name, each in found.items()}
        left = {name: cost[name] / cost["whole"] for name in ("shared", "alone")}
        results.append({"share": share, "left": left, "mean": means, "retained": found})
        print(json.dumps({"share": share, "left": left, "mean": means}), flush=True)
    return results


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("sets", nargs="*", metavar="NAME=DIR,DIR,…", help="adapters of fixtures/stories260k")
    options.add_argument("--rows", type=int, default=262, help="held-out rows")
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    named = dict(each.split("=", 1) for each in given.sets)
    sets = {name: [read_adapter(Path(place)) for place in places.split(",")] for name, places in named.items()}
    sets["noise"] = [noisy(read_adapter(FIXTURES / "adapter"), seed) for seed in range(4)]
    result = {
        "what": "gain retained, without recovery: a common basis with a core each, and each adapter cut alone",
        "machine": machine(),
        "versions": versions(),
        "sets": {name: compare(adapters, given.rows) for name, adapters in sets.items()},
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
