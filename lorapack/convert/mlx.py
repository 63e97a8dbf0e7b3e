"""MLX's adapters: ``adapters.safetensors`` with ``….lora_a`` (d_in, rank) and ``….lora_b`` (rank, d_out).

Source: mlx-lm ``tuner/lora.py`` (``LoRALinear``: x @ lora_a @ lora_b times scale, which no rank divides),
``tuner/utils.py`` (``load_adapters``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorapack.convert.pairs import Pair, adapter_of
from lorapack.core.adapter import Adapter, Kind
from lorapack.core.checked import parse_value
from lorapack.errors import InputError

TENSORS = "adapters.safetensors"
EMBEDDINGS = ("embed_tokens", "wte")
_OTHER = {"dora": "DoRA", "full": "a full fine-tune, use `lorapack extract` on the fused model"}


@dataclass(frozen=True)
class LoraParameters:
    """The field ``lora_parameters``; the rank stands in the tensors."""

    scale: float


@dataclass(frozen=True)
class MlxSettings:
    """What of MLX's ``adapter_config.json`` gives the tensors their meaning."""

    lora_parameters: LoraParameters
    fine_tune_type: str = "lora"
    model: str | None = None


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is MLX's."""
    return "peft_type" not in config and "lora_parameters" in config


def from_mlx(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The adapter of an MLX directory.

    Args:
        config: its `adapter_config.json`.
        tensors: of its `adapters.safetensors`.
        where: the directory, for messages.

    Raises:
        InputError: DoRA or a full fine-tune, a layer of several experts, a half without the other.
    """
    settings = parse_value(MlxSettings, config, where)
    if settings.fine_tune_type in _OTHER:
        raise InputError(f"{where} is {_OTHER[settings.fine_tune_type]}")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise InputError(f"{where}: {name} is no tensor of plain LoRA (expected ….lora_a, ….lora_b)")
        if tensor.ndim != 2:
            raise InputError(
                f"{where}: {name} has {tensor.ndim} dimensions (a layer of experts), which is not converted"
            )
        halves.setdefault(module, {})[half] = tensor.T.contiguous()
    pairs = {}
    for module, parts in halves.items():
        for here, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
            if here not in parts:
                raise InputError(f"{where}: {module} has {other} but no {here}")
        alpha = settings.lora_parameters.scale * parts["lora_a"].shape[0]
        kind: Kind = "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"
        pairs[module] = Pair(parts["lora_a"], parts["lora_b"], alpha, kind)
    return adapter_of(pairs, where, base_model_name_or_path=settings.model, task_type="CAUSAL_LM")
