"""Text Generation Inference.

One scale for all modules, ``lora_alpha / r`` or over the root with rsLoRA; patterns are not looked at. The layers of
a type are stacked into one tensor: if one is missing, the type is dropped in all layers without a word, and
ranks that differ do not stack. The rank is padded to a multiple of 16, at least to 8 times the number of GPUs, and
*the padded rank takes the place of* ``r`` for the types that come after: their scale would be smaller. So the
rank written is one that is not padded again on up to 8 GPUs. Only seven names under ``model.layers`` are looked up.
"""

import re

from lorapack.core.adapter import Adapter
from lorapack.core.names import module_type
from lorapack.engines.arrange import (
    refuse_carried,
    refuse_kinds,
    refuse_names,
    uniform,
    with_zeros,
)
from lorapack.engines.engine import AskBase, Engine
from lorapack.engines.sglang import scales
from lorapack.errors import InputError

KNOWN = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
BLOCK, LEAST = 16, 64  # a rank is padded to a multiple of the first; the second serves 8 GPUs


def arrange(adapter: Adapter, base: AskBase) -> Adapter:
    refuse_kinds(adapter, "TGI", "conv", "embedding")
    refuse_names(adapter, "TGI", KNOWN.fullmatch)
    refuse_carried(adapter, "TGI")
    whole = with_zeros(adapter, _missing(adapter, base))
    rank = max(factors.rank for factors in whole.pool.values())
    return uniform(whole, max(LEAST, -(-rank // BLOCK) * BLOCK))


def _missing(adapter: Adapter, base: AskBase) -> dict[str, tuple[int, int]]:
    """The layers that lack a type which others have, with shapes (d_out, d_in)."""
    layers = base().num_hidden_layers
    if not layers:
        raise InputError("TGI wants every layer of a type, and the base's config.json has no num_hidden_layers")
    shapes: dict[str, tuple[int, int]] = {}
    for module, factors in adapter.pool.items():
        if int(module.split(".")[2]) >= layers:
            raise InputError(f"the adapter has {module}, the base {layers} layers: they do not belong together")
        if shapes.setdefault(module_type(module), factors.shape) != factors.shape:
            raise InputError(f"TGI stacks the layers of a type, and {module} has another shape than those before it")
    named = {re.sub(r"^model\.layers\.", f"model.layers.{n}.", t): s for t, s in shapes.items() for n in range(layers)}
    return {module: shape for module, shape in named.items() if module not in adapter.modules}


def serve(adapter: Adapter, out: str) -> str:
    return f"text-generation-launcher --model-id BASE --lora-adapters NAME={out}"


ENGINE = Engine(
    title="TGI",
    version="3.3.1-dev0",
    sources=(
        "server/text_generation_server/adapters/lora.py",
        "server/text_generation_server/utils/adapter.py",
        "server/text_generation_server/utils/sgmv.py",
    ),
    arrange=arrange,
    scales=scales,
    serve=serve,
)
