"""What the engines' rules are made of: zeros for what is missing, one rank, scales moved into B."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.core.names import PREFIX
from lorapack.errors import InputError

PROJECTIONS = (("w1", "w2", "w3"), ("gate_proj", "up_proj", "down_proj"))  # of an expert
WAY_OUT = "serve the model that `lorapack merge` makes of it"


def private(adapter: Adapter) -> Adapter:
    """The same updates with one plain pair a module: nothing shared, folded, coded or seeded."""
    pool = {m: replace(adapter.factors(m), codes=None, seed=None) for m in adapter.modules}
    return adapter.with_pool(pool, {m: Pointer(m, adapter.scale(m)) for m in adapter.modules})


def padded(adapter: Adapter, rank: int) -> Adapter:
    """Every pair at this rank, by rows of zeros in A and columns of zeros in B."""

    def pad(factors: Factors) -> Factors:
        a, b = factors.A, factors.B
        more = rank - factors.rank
        return replace(
            factors,
            A=torch.cat([a, a.new_zeros(more, a.shape[1])]),
            B=torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1),
        )

    return adapter.with_pool({name: pad(f) for name, f in adapter.pool.items()}, adapter.modules)


def rescaled(adapter: Adapter, scales: Mapping[str, float]) -> Adapter:
    """The same updates with these scales, none of them 0: the rest of each module's own goes into its B."""
    pool = {m: times(adapter.pool[m], adapter.scale(m) / scales[m]) for m in adapter.modules}
    return adapter.with_pool(pool, {m: Pointer(m, scales[m]) for m in adapter.modules})


def uniform(adapter: Adapter, rank: int) -> Adapter:
    """The same updates with one rank, and one scale: the most frequent one."""
    scale = usual(adapter.scale(m) for m in adapter.modules)
    return padded(rescaled(adapter, dict.fromkeys(adapter.modules, scale)), rank)


def times(factors: Factors, number: float) -> Factors:
    """The pair with B times a number: in B's own type where that loses nothing, otherwise in float32 or wider."""
    exact = factors.B.double() * number
    b = exact.to(factors.B.dtype)
    if not torch.allclose(b.double(), exact, rtol=1e-12, atol=0):  # a ratio of equal scales may be off by a bit
        b = exact.to(torch.promote_types(factors.B.dtype, torch.float32))
    return replace(factors, B=b)


def usual(values: Iterable[float]) -> float:
    """The most frequent number that is not 0; 1 where there is none."""
    counted = Counter(value for value in values if value)
    return counted.most_common(1)[0][0] if counted else 1.0


def with_zeros(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter with further modules whose update is zero, each of rank 1 and a shape (d_out, d_in)."""
    like = next(iter(adapter.pool.values())).A
    pool = {m: Factors(like.new_zeros(1, d_in), like.new_zeros(d_out, 1)) for m, (d_out, d_in) in shapes.items()}
    return adapter.with_pool({**adapter.pool, **pool}, {**adapter.modules, **{m: Pointer(m, 0.0) for m in shapes}})


def refuse_carried(adapter: Adapter, engine: str, allowed: str = "", *, copies: bool = False) -> None:
    """Refuse saved modules and biases, which most engines would overlook.

    Args:
        adapter: with one pair a module.
        engine: its name, for the message.
        allowed: a pattern of the tensors it does take, after PEFT's prefix.
        copies: it passes over the frozen weight that PEFT stores beside an embedding's factors.

    Raises:
        InputError: names the tensor.
    """
    for name in adapter.carried:
        tensor = name.removeprefix(PREFIX)
        if copies and tensor.removesuffix(".base_layer.weight") in adapter.modules:
            continue
        if not allowed or not re.fullmatch(allowed, tensor):
            kind = "a bias" if tensor.endswith(".bias") else "a whole tensor"
            raise InputError(f"{engine} does not take {tensor}, {kind} beside the LoRA factors; {WAY_OUT}")


def refuse_kinds(adapter: Adapter, engine: str, *kinds: str) -> None:
    """Refuse convolutions or embeddings.

    Raises:
        InputError: names the module.
    """
    for module, factors in adapter.pool.items():
        if factors.kind in kinds:
            layer = {"conv": "a convolution", "embedding": "an embedding"}[factors.kind]
            raise InputError(f"{engine} has no LoRA for {module}, {layer}; {WAY_OUT}")


def refuse_names(adapter: Adapter, engine: str, known: Callable[[str], object]) -> None:
    """Refuse modules that the engine would not find, and leave out without a word.

    Raises:
        InputError: names the first.
    """
    for module in adapter.modules:
        if not known(module):
            raise InputError(f"{engine} has no LoRA for a layer named {module}; {WAY_OUT}")


def refuse_ragged_experts(adapter: Adapter, engine: str) -> None:
    """Refuse mixtures of experts of which some lack a projection, or have another rank.

    Engines stack all experts of a layer into one tensor a projection, and want all three projections.

    Raises:
        InputError: names the module that is missing or has the other rank.
    """
    ranks: dict[str, dict[int, dict[str, int]]] = {}
    for module, factors in adapter.pool.items():
        if found := re.fullmatch(rf"(.*\.experts)\.(\d+)\.({'|'.join(sum(PROJECTIONS, ()))})", module):
            ranks.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = factors.rank
    for stem, experts in ranks.items():
        first = next(iter(experts.values()))
        names = next(names for names in PROJECTIONS if not first.keys().isdisjoint(names))
        for expert in range(max(experts) + 1):
            for name in names:
                rank, usual_rank = experts.get(expert, {}).get(name), first.get(name)
                if rank is None or rank != usual_rank:
                    has = f"has rank {rank}, others {usual_rank}" if rank and usual_rank else "has no LoRA"
                    raise InputError(f"{engine} stacks all experts, and {stem}.{expert}.{name} {has}; {WAY_OUT}")
