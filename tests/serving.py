"""Adapters that engines read in different ways, and what each of their modules adds to the base."""

import torch

from lorapack import Adapter, Factors, Pointer

LAYERS = 4  # of `support.llama`
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ALL = [f"model.layers.{n}.{kind}" for n in range(LAYERS) for kind in SHAPES]


def shape(module: str) -> tuple[int, int]:
    return SHAPES[module.split(".", 3)[3]]


def pair(module: str, rank: int, generator: torch.Generator, dtype=torch.float32) -> Factors:
    d_out, d_in = shape(module)
    a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return Factors(a.to(dtype), b.to(dtype))


def adapter(modules, ranks=(4,), scales=(2.0,), dtype=torch.float32, carried=None, **config) -> Adapter:
    """Random pairs, the ranks and scales taken in turn."""
    generator = torch.Generator().manual_seed(0)
    pool = {m: pair(m, ranks[n % len(ranks)], generator, dtype) for n, m in enumerate(modules)}
    pointers = {m: Pointer(m, scales[n % len(scales)]) for n, m in enumerate(modules)}
    return Adapter({"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}, pool, pointers, carried or {})


def shared() -> Adapter:
    """Two groups over all layers with scales of their own, one of them with cores; some modules dropped."""
    generator = torch.Generator().manual_seed(1)
    gone = {"model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.q_proj", "model.layers.0.mlp.gate_proj"}
    plain = adapter([m for m in ALL if m not in gone], ranks=(3, 1, 5), scales=(2.0, 0.5))
    pool, modules = dict(plain.pool), dict(plain.modules)
    for kind, rank, cores in (("self_attn.o_proj", 6, False), ("mlp.down_proj", 2, True)):
        members = [m for m in modules if m.endswith(kind)]
        pool[f"shared.{kind}"] = pair(members[0], rank, generator)
        for n, member in enumerate(members):
            core = torch.randn(rank, generator=generator) if cores else None
            del pool[member]
            modules[member] = Pointer(f"shared.{kind}", (-1) ** n * (0.3 + n), core)
    return plain.with_pool(pool, modules)


def embeddings() -> Adapter:
    """Also on the input embedding and the head, and the frozen copy that PEFT stores beside the first."""
    generator = torch.Generator().manual_seed(2)
    plain = adapter(ALL, scales=(2.0, 1.5))
    table = Factors(torch.randn(4, 512, generator=generator), torch.randn(32, 4, generator=generator), "embedding")
    head = Factors(torch.randn(4, 32, generator=generator), torch.randn(512, 4, generator=generator))
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": torch.randn(512, 32, generator=generator)}
    places = {"model.embed_tokens": table, "lm_head": head}
    pointers = {name: Pointer(name, 3.0) for name in places}
    return Adapter(plain.config, {**plain.pool, **places}, {**plain.modules, **pointers}, copy)


ADAPTERS = {
    "one rank and scale": adapter(ALL),
    "ranks and scales differ": adapter(ALL, ranks=(1, 7, 4), scales=(2.0, -0.7, 1 / 3)),
    "ranks above sixteen": adapter(ALL, ranks=(17, 20)),
    "rsLoRA": adapter(ALL, ranks=(2, 3, 9), scales=(16 / 3, 4.0), use_rslora=True),
    "bfloat16": adapter(ALL, ranks=(3, 4), scales=(1.0, 0.3, 2.0), dtype=torch.bfloat16),
    "only q and v": adapter([m for m in ALL if m[-6:] in ("q_proj", "v_proj")]),
    "only k": adapter([m for m in ALL if m.endswith("k_proj")], base_model_name_or_path="nowhere"),
    "half of the layers": adapter(ALL[: len(ALL) // 2], ranks=(2, 4)),
    "every third module": adapter(ALL[::3], ranks=(2, 4), scales=(0.0, 1.0)),
    "shared": shared(),
    "embeddings": embeddings(),
}
NO_EMBEDDINGS = [name for name in ADAPTERS if name != "embeddings"]


def update(adapter: Adapter, module: str) -> torch.Tensor:
    """scale * diag(v) B K A of a module in float64, the matrix written out."""
    pointer = adapter.modules[module]
    factors = adapter.pool[pointer.factors]
    core = torch.eye(factors.rank).double() if pointer.core is None else pointer.core.double()
    core = torch.diag(core) if core.ndim == 1 else core
    product = pointer.scale * factors.B.double() @ core @ factors.A.double()
    return product if pointer.output is None else pointer.output.double()[:, None] * product


def assert_updates(found: dict[str, torch.Tensor], adapter: Adapter, tolerance: float = 1e-6) -> None:
    """The engine adds to every module what the adapter means, and nothing to any other."""
    assert adapter.modules.keys() <= found.keys(), adapter.modules.keys() - found.keys()
    for module, matrix in found.items():
        if module in adapter.modules:
            wanted = update(adapter, module)
            assert (matrix.double() - wanted).norm() <= tolerance * wanted.norm(), module
        else:
            assert not matrix.any(), module
