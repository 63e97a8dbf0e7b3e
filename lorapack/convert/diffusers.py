"""diffusers' format: one safetensors file, the model's name before each module's, the configurations in its metadata.

Source: diffusers ``loaders/lora_base.py`` (``_save_lora_weights``), ``utils/state_dict_utils.py`` for the older names.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorapack.convert import flux
from lorapack.convert.components import COMPONENTS, Parts
from lorapack.convert.names import underscored
from lorapack.convert.pairs import Pair, adapter_of, refuse_carried
from lorapack.core.adapter import Adapter
from lorapack.core.names import PREFIX
from lorapack.errors import InputError
from lorapack.read.config import LoraSettings, check_config
from lorapack.write.form import peft_form

METADATA = "lora_adapter_metadata"
ORIGINAL = "diffusion_model"  # ComfyUI's name for a model under the names of its original code

# the endings of both halves, newest first; those that follow a `_` belong to an attention layer's name
_HALVES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_ALPHA = ".alpha"
# of the configuration that diffusers hands to PEFT as it stands, what gives a module its rank and scale
_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "peft_type")


def from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> dict[str, Adapter]:
    """The adapters in a diffusers file, under the names it had since 2023.

    Raises:
        InputError: names the tensor that belongs to no pair of a component.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        if component not in (*COMPONENTS, ORIGINAL):
            raise InputError(f"{where}: {name} begins with none of {', '.join(COMPONENTS)}")
        module, half = _split(rest, component, f"{where}: {name}")
        found.setdefault(component, {}).setdefault(module, {})[half] = tensor
    settings = _settings(metadata, where)
    adapters = {}
    for component, halves in found.items():
        pairs = {m: _pair(m, parts, settings.get(component), where) for m, parts in halves.items()}
        if component == ORIGINAL:
            if not all(flux.is_flux(underscored(module)) for module in pairs):
                raise InputError(f"{where}: {next(iter(pairs))} is of another model than Flux under its original names")
            component = "transformer"
            pairs = flux.diffusers_pairs({underscored(module): pair for module, pair in pairs.items()}, where)
        adapters[component] = adapter_of(pairs, where)
    return adapters


def to_diffusers(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file as diffusers' `save_lora_weights` writes it.

    Scales stand in the metadata, not in the tensors: versions that do not read it take them for one.

    Raises:
        InputError: an embedding, or tensors that are no LoRA pairs.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for component, adapter in parts.items():
        refuse_carried(adapter, "diffusers' format")
        if any(adapter.factors(module).kind == "embedding" for module in adapter.modules):
            raise InputError(f"the {component} has a LoRA on an embedding, which diffusers' format has no place for")
        config, own = peft_form(adapter)
        tensors |= {f"{component}.{name.removeprefix(PREFIX)}": tensor for name, tensor in own.items()}
        configs |= {f"{component}.{name}": config[name] for name in _SETTINGS if name in config}
    return tensors, {"format": "pt", METADATA: json.dumps(configs, indent=2, sort_keys=True)}


def _split(name: str, component: str, where: str) -> tuple[str, str]:
    """The module's name, and which half (or ``alpha``) of its pair it is."""
    if name.endswith(_ALPHA):
        return name.removesuffix(_ALPHA), "alpha"
    for endings in _HALVES:
        for half, ending in zip(("down", "up"), endings, strict=True):
            if name.endswith(ending):
                return _module(name.removesuffix(ending), component, old=ending.startswith("_")), half
    raise InputError(f"{where} is no tensor of a LoRA pair (expected ….lora_A.weight, ….lora_B.weight)")


def _module(name: str, component: str, old: bool) -> str:
    """Today's name of a module; before 2024 the attention's processors had the pairs."""
    name = name.replace(".processor.", ".")
    if old:
        name = re.sub(r"\.to_out$", ".to_out.0", name)
        if component.startswith("text_encoder"):
            name = re.sub(r"\.to_(?:([qkv])|(out)\.0)$", lambda m: f".{m[1] or m[2]}_proj", name)
    return name


def _pair(module: str, parts: Mapping[str, Tensor], settings: LoraSettings | None, where: str) -> Pair:
    for half in ("down", "up"):
        if half not in parts:
            raise InputError(f"{where}: {module} has no {half} factor; the file is not complete")
    down, up = parts["down"], parts["up"]
    if "alpha" in parts:
        return Pair(down, up, float(parts["alpha"]))
    return Pair(down, up, settings.scale(module, down.shape[0]) * down.shape[0] if settings else None)


def _settings(metadata: Mapping[str, str], where: str) -> dict[str, LoraSettings]:
    """Each component's configuration, where the file has them.

    Raises:
        InputError: JSON that is none, or what `check_config` refuses.
    """
    if METADATA not in metadata:
        return {}
    try:
        entries = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise InputError(f"{where}: its metadata {METADATA} is not a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        component, _, setting = name.partition(".")
        configs.setdefault(component, {"peft_type": "LORA"})[setting] = value
    return {component: check_config(config, f"{where}: {METADATA}") for component, config in configs.items()}
