"""PEFT's `adapter_config.json`: what of it matters here, and what is refused by name."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorapack.core.checked import parse_value
from lorapack.errors import InputError
from lorapack.read.patterns import check_pattern, first_match

COMPACT_TYPE = "LORAPACK"

# Settings that change what the tensors mean, and that lorapack cannot compress yet.
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias inside the low-rank branch",
    "layer_replication": "layers that share base weights",
    "target_parameters": "LoRA on bare parameters (fused experts)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
    "enable_lora": "loralib's merged projections",
}
# Initialisations that replace the base weights, so the published base is not what was trained on.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraSettings:
    """The fields of `adapter_config.json` that give a tensor its rank and scale."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    @cached_property
    def _rank(self) -> Callable[[str], float | None]:
        return first_match(self.rank_pattern or {}, "rank_pattern")

    @cached_property
    def _alpha(self) -> Callable[[str], float | None]:
        return first_match(self.alpha_pattern or {}, "alpha_pattern")

    def rank(self, module: str) -> int:
        found = self._rank(module)
        return self.r if found is None else int(found)

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        found = self._alpha(module)
        alpha = self.lora_alpha if found is None else found
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)


def check_config(config: Mapping[str, Any], where: str, allowed: Collection[str] = ()) -> LoraSettings:
    """The settings of a LoRA configuration.

    Args:
        config: the parsed JSON.
        where: its path, for messages.
        allowed: settings of `REFUSED` that the caller knows how to use.

    Raises:
        InputError: not PEFT, another PEFT method, a setting of `REFUSED`, or an ill-typed field.
    """
    kind = config.get("peft_type")
    if kind is None:
        raise InputError(f"{where} has no peft_type: this is not a PEFT adapter")
    if kind not in ("LORA", COMPACT_TYPE):
        raise InputError(f"{where}: peft_type {kind!r} is not LoRA, and lorapack compresses LoRA only")
    for name, meaning in REFUSED.items():
        if config.get(name) and name not in allowed:
            raise InputError(f"{where}: {name} ({meaning}) cannot be compressed yet")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights {init!r} changed the base weights before training, so the published base is "
            "not what this adapter was trained on; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    settings = parse_value(LoraSettings, config, where)
    if "\0" in (settings.base_model_name_or_path or ""):
        raise InputError(f"{where}: base_model_name_or_path has a zero byte in it")
    if settings.r < 1:
        raise InputError(f"{where}: r is {settings.r}, it must be 1 or more")
    for name, alphas in (
        ("lora_alpha", [settings.lora_alpha]),
        ("alpha_pattern", (settings.alpha_pattern or {}).values()),
    ):
        if not all(math.isfinite(alpha) for alpha in alphas):
            raise InputError(f"{where}: {name} holds NaN or an infinite number")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, name) or {}:
            try:
                check_pattern(pattern)
            except ValueError as error:
                shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
                raise InputError(f"{where}: {name} has {shown!r}, which is no regular expression ({error})") from None
    return settings
