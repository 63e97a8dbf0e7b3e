"""llama.cpp, through its own `convert_lora_to_gguf.py`.

One alpha for all modules, divided by the rank of each tensor; patterns and rsLoRA are not looked at. Any rank, any
layer may be missing. The converter stops at saved modules and biases, and copies norms that are then left out
when the file is loaded. It transposes the layers of GPT-2 as if their factors were transposed too, which PEFT's
are not. Experts are stacked.
"""

import struct
from collections.abc import Mapping
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.engines.arrange import (
    WAY_OUT,
    refuse_carried,
    refuse_kinds,
    refuse_ragged_experts,
    rescaled,
    usual,
)
from lorapack.engines.engine import AskBase, Engine, Scales
from lorapack.errors import InputError


def arrange(adapter: Adapter, base: AskBase) -> Adapter:
    refuse_kinds(adapter, "llama.cpp", "conv")
    refuse_carried(adapter, "llama.cpp", copies=True)
    refuse_ragged_experts(adapter, "llama.cpp")
    if adapter.config.get("fan_in_fan_out"):
        first = next(iter(adapter.modules))
        raise InputError(f"llama.cpp's converter transposes {first} (fan_in_fan_out), but not its factors; {WAY_OUT}")
    ranks = {module: factors.rank for module, factors in adapter.pool.items()}
    alpha = usual(adapter.scale(m) * rank for m, rank in ranks.items())
    return rescaled(adapter, {m: alpha / rank for m, rank in ranks.items()})


def scales(config: Mapping[str, Any]) -> Scales:
    (alpha,) = struct.unpack("<f", struct.pack("<f", config["lora_alpha"]))  # GGUF stores it in float32
    return lambda module, rank: float(alpha) / rank


def serve(adapter: Adapter, out: str) -> str:
    return f"python convert_lora_to_gguf.py --base BASE {out}"


ENGINE = Engine(
    title="llama.cpp",
    version="0b03ada",
    sources=("convert_lora_to_gguf.py", "src/llama-adapter.cpp", "src/llama-adapter.h", "conversion/gpt2.py"),
    arrange=arrange,
    scales=scales,
    serve=serve,
)
