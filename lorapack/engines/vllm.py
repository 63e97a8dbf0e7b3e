"""vLLM.

Its ``PEFTHelper`` looks scales and ranks up as PEFT does, rsLoRA and patterns included, and multiplies each
module's scale into its B. The largest rank of all must not exceed ``--max-lora-rank``, which is one of eight
numbers. A layer without LoRA is zero, also beside others that are packed with it (q, k and v). Of saved modules it
knows one classification head; DoRA, biases and activated LoRA it refuses.
"""

from lorapack.core.adapter import Adapter
from lorapack.core.names import PREFIX
from lorapack.engines.arrange import WAY_OUT, refuse_carried, refuse_kinds, refuse_ragged_experts
from lorapack.engines.engine import AskBase, Engine
from lorapack.engines.peft import scales
from lorapack.errors import InputError

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
HEAD = r"(?:.*\.)?(?:score|classifier)\.(?:weight|bias)"


def arrange(adapter: Adapter, base: AskBase) -> Adapter:
    refuse_kinds(adapter, "vLLM", "conv")
    refuse_carried(adapter, "vLLM", HEAD, copies=True)
    _refuse_heads(adapter)
    refuse_ragged_experts(adapter, "vLLM")
    for module, factors in adapter.pool.items():
        if factors.rank > MAX_RANKS[-1]:
            raise InputError(
                f"vLLM takes ranks up to {MAX_RANKS[-1]}, {module} has {factors.rank}: "
                "`lorapack compress --method rank` cuts it"
            )
    return adapter


def _refuse_heads(adapter: Adapter) -> None:
    """vLLM takes one whole head, and only one that ``modules_to_save`` names."""
    saved = adapter.config.get("modules_to_save") or ()
    heads = {name.removeprefix(PREFIX).rpartition(".")[0] for name in adapter.carried} - {
        f"{module}.base_layer" for module in adapter.modules
    }
    for head in sorted(heads):
        if len(heads) > 1 or head.rpartition(".")[2] not in saved:
            raise InputError(f"vLLM takes one classification head, named in modules_to_save, not {head}; {WAY_OUT}")


def serve(adapter: Adapter, out: str) -> str:
    rank = max(factors.rank for factors in adapter.pool.values())
    largest = next(allowed for allowed in MAX_RANKS if allowed >= rank)
    return f"vllm serve BASE --enable-lora --max-lora-rank {largest} --lora-modules NAME={out}"


ENGINE = Engine(
    title="vLLM",
    version="0.33.0",
    sources=(
        "vllm/lora/peft_helper.py",
        "vllm/lora/lora_model.py",
        "vllm/lora/lora_weights.py",
        "vllm/lora/model_manager.py",
        "vllm/lora/utils.py",
        "vllm/config/lora.py",
    ),
    arrange=arrange,
    scales=scales,
    serve=serve,
)
