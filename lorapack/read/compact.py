"""The compact format: PEFT's, with shared factors stored once (docs/format.md).

`adapter_config.json` is a LoRA configuration with ``peft_type`` ``LORAPACK`` and

    "lorapack": {"version": 1, "shared": {"shared.model.layers.mlp.up_proj": ["model.layers.0.mlp.up_proj", ...]}}

A group whose layers have more than a scale of their own has an entry in ``forms``:

    "forms": {"vera.64x64": {"core": "diagonal", "output": true, "seeded": {"seed": 0, "rank": 72, "shape": [64, 64]}}}

A group's factors are the tensors ``lorapack.<group>.A`` and ``lorapack.<group>.B``: names no engine
takes for a LoRA weight; a module's core and output vector ``lorapack.<module>.core`` and
``….output``; seeded factors are not stored. Ranks and scales of the modules stand in ``rank_pattern`` and
``alpha_pattern``, as for any other module. Pairs that are stored in few bits are made float32 before
(`lorapack.read.stored`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.checked import parse_value
from lorapack.core.names import PREFIX
from lorapack.core.seeded import MOST, SEEDS, seeded
from lorapack.core.sharing import CoreKind
from lorapack.errors import InputError

VERSION = 1
STEM = "lorapack."


@dataclass(frozen=True)
class Seeded:
    """Factors that are made from a seed: A (rank, d_in), B (d_out, rank), shape (d_out, d_in)."""

    seed: int
    rank: int
    shape: tuple[int, int]
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"

    def factors(self) -> tuple[Tensor, Tensor]:
        return seeded(self.seed, self.rank, self.shape, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Form:
    """What the modules of a group have of their own, and whether the factors are seeded."""

    core: CoreKind | None = None
    output: bool = False
    seeded: Seeded | None = None

    @property
    def parts(self) -> dict[str, str]:
        """The tensors that each module has: their name in the file to the one in PEFT's manner."""
        return ({"core": "lora_A.core"} if self.core else {}) | ({"output": "lora_B.output"} if self.output else {})


@dataclass(frozen=True)
class Manifest:
    """The ``lorapack`` entry of a compact `adapter_config.json`."""

    version: int
    shared: dict[str, list[str]] = field(default_factory=dict)
    stored: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)  # see lorapack.read.stored
    forms: dict[str, Form] = field(default_factory=dict)

    def form(self, group: str) -> Form:
        return self.forms.get(group, Form())


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
    _refuse_unknown(found, f"{where}: lorapack")
    checked = parse_value(Manifest, found, f"{where}: lorapack")
    _check_forms(checked, where)
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


def _refuse_unknown(found: Mapping[str, Any], where: str) -> None:
    """What a later version might say of a form, and this one would overlook, changes what the tensors mean."""
    forms = found.get("forms")
    for group, form in forms.items() if isinstance(forms, Mapping) else ():
        for kind, value, name in (
            (Form, form, group),
            (Seeded, form.get("seeded") if isinstance(form, Mapping) else None, f"{group}.seeded"),
        ):
            known = {f.name for f in fields(kind)}
            for key in value if isinstance(value, Mapping) else ():
                if key not in known:
                    raise InputError(f"{where}.forms.{name}.{key}: unknown; this lorapack reads {', '.join(known)}")


def _check_forms(checked: Manifest, where: str) -> None:
    for group, form in checked.forms.items():
        if group not in checked.shared:
            raise InputError(f"{where}: `forms` names the group {group!r}, which `shared` lacks")
        found = form.seeded
        if found is None:
            continue
        if not 0 <= found.seed < SEEDS:
            raise InputError(f"{where}: the seed of {group!r} is {found.seed}, possible are 0 to 2^63 - 1")
        if min(found.rank, *found.shape) < 1 or found.rank * sum(found.shape) > MOST:
            raise InputError(f"{where}: {group!r} has seeded factors of rank {found.rank} and shape {found.shape}")


def unfold(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Give a group's tensors PEFT's endings, so that they are paired like any other.

    Returns:
        The tensors, a group's under ``<group>.lora_A.weight`` and ``<group>.lora_B.weight``, a module's
        own under ``base_model.model.<module>.lora_A.core`` and ``….lora_B.output``, and the groups with
        the modules that point to them.

    Raises:
        InputError: a group or a target without tensors, tensors of no group, or a module that has its own too.
    """
    found = manifest(config, where)
    shared = found.shared
    # transformers' save_pretrained puts PEFT's prefix before every name, ours too
    tensors = {name.removeprefix(PREFIX) if name.startswith(PREFIX + STEM) else name: t for name, t in tensors.items()}
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(STEM)}
    named = set()
    for group, modules in shared.items():
        form = found.form(group)
        if form.seeded:
            plain |= dict(zip((f"{group}.lora_A.weight", f"{group}.lora_B.weight"), form.seeded.factors(), strict=True))
        for part in () if form.seeded else ("A", "B"):
            name = f"{STEM}{group}.{part}"
            if name not in tensors:
                raise InputError(f"{where}: {modules[0]} points to {group!r}, but the tensor {name!r} is missing")
            plain[f"{group}.lora_{part}.weight"] = tensors[name]
            named.add(name)
        for module in modules:
            for part, place in form.parts.items():
                name = f"{STEM}{module}.{part}"
                if name not in tensors:
                    raise InputError(f"{where}: the tensor {name!r} is missing, which {group!r} wants of its modules")
                plain[f"{PREFIX}{module}.{place}"] = tensors[name]
                named.add(name)
            if f"{PREFIX}{module}.lora_A.weight" in tensors or f"{PREFIX}{module}.lora_B.weight" in tensors:
                raise InputError(f"{where}: {module} points to {group!r} and has factors of its own")
    for name in tensors:
        if name.startswith(STEM) and name not in named:
            raise InputError(f"{where}: the tensor {name!r} belongs to no module")
    there = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in plain}
    there |= {module for modules in shared.values() for module in modules}
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if target not in there and not any(module.endswith(f".{target}") for module in there):
            raise InputError(f"{where}: {target} is one of the target_modules and has no factors here")
    return plain, dict(shared)
