"""The compact format: PEFT's, with shared factors stored once (docs/format.md).

`adapter_config.json` is a LoRA configuration with ``peft_type`` ``LORAPACK`` and

    "lorapack": {"version": 1, "shared": {"shared.model.layers.mlp.up_proj": ["model.layers.0.mlp.up_proj", ...]}}

A group's factors are the tensors ``lorapack.<group>.A`` and ``lorapack.<group>.B``: names no engine
takes for a LoRA weight. Ranks and scales of the modules stand in ``rank_pattern`` and
``alpha_pattern``, as for any other module. Pairs that are stored in few bits are made float32 before
(`lorapack.read.stored`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorapack.core.checked import parse_value
from lorapack.core.names import PREFIX
from lorapack.errors import InputError

VERSION = 1
STEM = "lorapack."


@dataclass(frozen=True)
class Manifest:
    """The ``lorapack`` entry of a compact `adapter_config.json`."""

    version: int
    shared: dict[str, list[str]] = field(default_factory=dict)
    stored: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)  # see lorapack.read.stored


def manifest(config: Mapping[str, Any], where: str) -> Manifest:
    """Check a compact configuration's manifest.

    Raises:
        InputError: it is missing, of an unknown version, or contradicts itself.
    """
    found = config.get("lorapack")
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: peft_type is LORAPACK but there is no `lorapack` entry")
    if found.get("version") != VERSION:
        raise InputError(f"{where}: compact format version {found.get('version')!r}; this lorapack reads {VERSION}")
    checked = parse_value(Manifest, found, f"{where}: lorapack")
    times = Counter(module for modules in checked.shared.values() for module in modules)
    for group, modules in checked.shared.items():
        if not modules:
            raise InputError(f"{where}: no module points to the group {group!r}")
        if not group or not all(c.isalnum() or c in "._-" for c in group):
            raise InputError(f"{where}: the group name {group!r} has characters other than letters, digits, . _ -")
        for module in modules:
            if times[module] > 1:
                raise InputError(f"{where}: {module} points to more than one shared adapter")
    return checked


def unfold(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Give a group's tensors PEFT's endings, so that they are paired like any other.

    Returns:
        The tensors, a group's under ``<group>.lora_A.weight`` and ``<group>.lora_B.weight``, and
        the groups with the modules that point to them.

    Raises:
        InputError: a group or a target without tensors, tensors of no group, or a module that has its own too.
    """
    shared = manifest(config, where).shared
    # transformers' save_pretrained puts PEFT's prefix before every name, ours too
    tensors = {name.removeprefix(PREFIX) if name.startswith(PREFIX + STEM) else name: t for name, t in tensors.items()}
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(STEM)}
    for group, modules in shared.items():
        for part in ("A", "B"):
            name = f"{STEM}{group}.{part}"
            if name not in tensors:
                raise InputError(f"{where}: {modules[0]} points to {group!r}, but the tensor {name!r} is missing")
            plain[f"{group}.lora_{part}.weight"] = tensors[name]
        for module in modules:
            if f"{PREFIX}{module}.lora_A.weight" in tensors or f"{PREFIX}{module}.lora_B.weight" in tensors:
                raise InputError(f"{where}: {module} points to {group!r} and has factors of its own")
    for name in tensors:
        group, _, part = name.removeprefix(STEM).rpartition(".")
        if name.startswith(STEM) and (group not in shared or part not in ("A", "B")):
            raise InputError(f"{where}: the tensor {name!r} belongs to no module")
    there = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in plain}
    there |= {module for modules in shared.values() for module in modules}
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if target not in there and not any(module.endswith(f".{target}") for module in there):
            raise InputError(f"{where}: {target} is one of the target_modules and has no factors here")
    return plain, dict(shared)
