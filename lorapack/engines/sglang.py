"""SGLang.

One scale for all modules, ``lora_alpha / r``; patterns and rsLoRA are not looked at. Every tensor must have exactly
the rank ``r``, or an assertion fails while it is loaded. q, k and v of a layer are put together: where one of them
is there, q and v have to be, and k if any layer has it. Likewise gate beside up. A layer with none of them is zero.
Modules outside numbered layers are left out without a word, but for the two embeddings. ``target_modules`` must
be a list.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.core.names import module_type
from lorapack.engines.arrange import (
    refuse_carried,
    refuse_kinds,
    refuse_names,
    uniform,
    with_zeros,
)
from lorapack.engines.engine import LARGEST, AskBase, Engine, Scales
from lorapack.errors import InputError

ATTENTION = {"q_proj", "k_proj", "v_proj"}
LAYERS = ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
OUTSIDE = {"embed_tokens", "lm_head"}


def arrange(adapter: Adapter, base: AskBase) -> Adapter:
    refuse_kinds(adapter, "SGLang", "conv")
    refuse_names(adapter, "SGLang", _known)
    refuse_carried(adapter, "SGLang", copies=True)
    whole = with_zeros(adapter, _missing(adapter, base))
    return uniform(whole, max(factors.rank for factors in whole.pool.values()))


def scales(config: Mapping[str, Any]) -> Scales:
    return lambda module, rank: float(config["lora_alpha"]) / int(config["r"])


def _known(module: str) -> bool:
    *path, name = module.split(".")
    numbered = any(one == "layers" and two.isdigit() for one, two in pairwise(path))
    return name in LAYERS and not any(part.endswith("experts") for part in path) if numbered else name in OUTSIDE


def _missing(adapter: Adapter, base: AskBase) -> dict[str, tuple[int, int]]:
    """What SGLang wants beside what is there, with shapes (d_out, d_in)."""
    parts: dict[str, set[str]] = {}
    for module in adapter.modules:
        stem, dot, part = module.rpartition(".")
        parts.setdefault(stem + dot, set()).add(part)
    keys = any("k_proj" in there for there in parts.values())
    missing = {}
    for stem, there in parts.items():
        wanted = {"q_proj", "v_proj", *(["k_proj"] if keys else [])} if there & ATTENTION else set()
        wanted |= {"gate_proj"} if "up_proj" in there else set()
        for part in sorted(wanted - there):
            missing[stem + part] = _shape(stem, part, adapter, base)
    return missing


def _shape(stem: str, part: str, adapter: Adapter, base: AskBase) -> tuple[int, int]:
    """As the same layer has it elsewhere, or its twin beside it, or as the base model's configuration says."""
    twin = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj"}.get(part, part)
    alike = [m for m in adapter.modules if module_type(m) == module_type(stem + part)]
    for module in (stem + twin, *alike):
        if module in adapter.pool:
            return adapter.pool[module].shape
    facts = base()
    heads = facts.num_attention_heads if part == "q_proj" else facts.num_key_value_heads or facts.num_attention_heads
    width = facts.head_dim or facts.hidden_size // max(1, facts.num_attention_heads)
    if not 0 < heads * width <= LARGEST:
        raise InputError(
            f"SGLang wants {stem}{part}, whose shape the base's config.json does not say (heads, head_dim)"
        )
    beside = next(adapter.pool[stem + name] for name in sorted(ATTENTION) if stem + name in adapter.pool)
    return heads * width, beside.shape[1]


def serve(adapter: Adapter, out: str) -> str:
    return f"python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME={out}"


ENGINE = Engine(
    title="SGLang",
    version="0.5.23",
    sources=(
        "sglang/srt/lora/lora_config.py",
        "sglang/srt/lora/lora.py",
        "sglang/srt/lora/mem_pool.py",
        "sglang/srt/lora/lora_manager.py",
        "sglang/srt/lora/utils.py",
    ),
    arrange=arrange,
    scales=scales,
    serve=serve,
)
