"""kohya's format: one safetensors file, ``lora_unet_….lora_down.weight``, ``….lora_up.weight``, ``….alpha``.

Source: sd-scripts ``networks/lora.py`` (``LoRAModule``: scale = alpha / rank, a missing or zero alpha is the rank;
``LoRANetwork.create_modules``: prefix and module name joined by dots, all dots made underscores).
"""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorapack.convert import flux
from lorapack.convert.components import Parts, denoiser
from lorapack.convert.names import dotted, underscored
from lorapack.convert.pairs import Pair, adapter_of, alpha_of, refuse_carried
from lorapack.convert.sgm import diffusers_name
from lorapack.core.adapter import Adapter
from lorapack.errors import InputError

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
NAMES = "lorapack_modules"  # in a file's metadata: component to its modules' dotted names

_PREFIXES = {
    "lora_unet": "unet",  # or a transformer, under the same prefix
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_REFUSED = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_mid": "Tucker-decomposed LoCon",
    "diff": "differences of whole weights",
}


def from_kohya(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Mapping[str, Iterable[str]], where: str
) -> dict[str, Adapter]:
    """The adapters in a kohya file.

    Args:
        tensors: of the file.
        metadata: of the file; the module names in it are used where they underscore to the names in the file.
        names: component to the names of the base model's modules, of those components whose base is known.
        where: the file, for messages.

    Raises:
        InputError: another method than LoRA, halves without the other, names of which the dots are not certain.
    """
    listed = _listed(metadata)
    found: dict[str, Adapter] = {}
    for component, pairs in _by_component(_pairs(tensors, where), where).items():
        if component == "unet" and any(map(flux.is_flux, pairs)):
            found["transformer"] = adapter_of(flux.diffusers_pairs(pairs, where), where)
            continue
        base = component if component != "unet" or component in names else "transformer"
        certain = _flat_names(component, names.get(base, ()))
        modules = {}
        for flat, pair in pairs.items():
            plain = diffusers_name(flat) if component == "unet" else flat
            if base in names and plain not in certain:
                raise InputError(f"{where}: {flat} is no module of the base's {base}")
            modules[certain.get(plain) or listed.get(component, {}).get(plain) or dotted(plain, where)] = pair
        name = denoiser(modules) if component == "unet" else component
        if name in found:
            raise InputError(f"{where} has two adapters for the {name}, under lora_unet_ and lora_transformer_")
        found[name] = adapter_of(modules, where)
    return found


def to_kohya(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a kohya file.

    Raises:
        InputError: two modules that kohya's names cannot tell apart, an embedding, or tensors that are no LoRA pairs.
    """
    tensors: dict[str, Tensor] = {}
    for component, adapter in parts.items():
        refuse_carried(adapter, "kohya's format")
        prefix = _prefix(component, parts)
        for flat, module in _flat_names(component, adapter.modules).items():
            factors = adapter.factors(module)
            if factors.kind == "embedding":
                raise InputError(f"{module} is an embedding, which kohya's format has no place for")
            alpha = torch.tensor(alpha_of(adapter, module), dtype=torch.float64)
            if alpha.item() == 0:
                raise InputError(f"{module} has the scale 0, which tools that read kohya's format take for 1; drop it")
            stem = f"{prefix}_{flat}"
            tensors[f"{stem}.{DOWN}"] = factors.A.clone()
            tensors[f"{stem}.{UP}"] = factors.B.clone()
            tensors[f"{stem}.{ALPHA}"] = alpha.float() if alpha.float().double() == alpha else alpha
    listed = {component: list(adapter.modules) for component, adapter in parts.items()}
    return tensors, {"format": "pt", NAMES: json.dumps(listed)}


def _pairs(tensors: Mapping[str, Tensor], where: str) -> dict[str, Pair]:
    """Both halves and the alpha of every pair, by the first part of their names."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.partition(".")
        if part not in (DOWN, UP, ALPHA):
            method = next((method for start, method in _REFUSED.items() if part.startswith(start)), None)
            raise InputError(
                f"{where}: {name} belongs to {method}, which is not converted"
                if method
                else f"{where}: {name} is no tensor of kohya's format (expected ….{DOWN}, ….{UP}, ….{ALPHA})"
            )
        halves.setdefault(stem, {})[part] = tensor
    found = {}
    for stem, parts in halves.items():
        for half in (DOWN, UP):
            if half not in parts:
                raise InputError(f"{where}: {stem} has no {half}; the file is not complete")
        alpha = parts[ALPHA].double() if ALPHA in parts else torch.zeros(1)
        if alpha.numel() != 1:
            raise InputError(f"{where}: {stem}.{ALPHA} has the shape {tuple(alpha.shape)}, expected one number")
        found[stem] = Pair(parts[DOWN], parts[UP], alpha.item() or None)
    return found


def _by_component(pairs: Mapping[str, Pair], where: str) -> dict[str, dict[str, Pair]]:
    found: dict[str, dict[str, Pair]] = {}
    for stem, pair in pairs.items():
        prefix = "_".join(stem.split("_")[:2])
        if prefix not in _PREFIXES:
            raise InputError(f"{where}: {stem} begins with none of {', '.join(f'{p}_' for p in _PREFIXES)}")
        found.setdefault(_PREFIXES[prefix], {})[stem.removeprefix(f"{prefix}_")] = pair
    return found


def _listed(metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """For each component, kohya's names to the dotted ones that the file itself lists, if it does."""
    try:
        found = json.loads(metadata.get(NAMES, "{}"))
        return {component: _flat_names(component, names) for component, names in found.items()}
    except (ValueError, AttributeError, TypeError, RecursionError, InputError):
        return {}


def _flat_names(component: str, modules: Iterable[str]) -> dict[str, str]:
    """kohya's names of the modules to the dotted ones.

    CLIP's modules lie in ``text_model`` in every published file, though transformers 5 has dropped that step.

    Raises:
        InputError: two modules have the same name there.
    """
    found: dict[str, str] = {}
    for module in modules:
        flattened = component.startswith("text") and module.startswith("encoder.layers.")
        other = found.setdefault(underscored(f"text_model.{module}" if flattened else module), module)
        if other != module:
            raise InputError(f"{other} and {module} of the {component} have the same name in kohya's format")
    return found


def _prefix(component: str, parts: Parts) -> str:
    """A pipeline with a single text encoder has ``lora_te_``, others number them."""
    if component == "text_encoder":
        return "lora_te1" if {"text_encoder_2", "text_encoder_3", "transformer"} & set(parts) else "lora_te"
    return next(prefix for prefix, name in _PREFIXES.items() if name == component)
