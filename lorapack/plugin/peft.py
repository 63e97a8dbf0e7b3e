"""Teach PEFT the compact format: after `import lorapack`, PEFT loads, trains and saves it.

A compact checkpoint has the ``peft_type`` ``LORAPACK``, so that PEFT without lorapack stops instead of
loading the shared layers as zeros. With it, the layers of a group hold *one* ``nn.Linear`` pair:

    import lorapack
    model = PeftModel.from_pretrained(base, "compact")
    q = [layer.self_attn.q_proj.lora_A["default"].weight for layer in model.base_model.model.model.layers]
    assert q[1] is q[2]

How: PEFT keeps its methods in three dictionaries; `register` adds ours, a subclass of PEFT's LoRA
that ties the layers after injection and folds the group's tensors on saving. PEFT has no public way
to do this (`register_peft_method` takes members of its enum only), which is why the supported range
of PEFT is pinned and tested at both ends.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import mapping
from peft.tuners.lora import LoraConfig, LoraModel
from torch import Tensor, nn

from lorapack.core.names import PREFIX
from lorapack.plugin.layers import Frozen, WithCore, WithOutput
from lorapack.read.compact import STEM, VERSION, Form, Manifest, manifest, unfold
from lorapack.read.config import COMPACT_TYPE
from lorapack.read.stored import unstored


class _PeftType(str):
    """Our entry where PEFT expects a member of its enum: a string that has a ``value``."""

    @property
    def value(self) -> str:
        return str(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PeftType":
        return self


PEFT_TYPE = _PeftType(COMPACT_TYPE)


@dataclass
class LorapackConfig(LoraConfig):
    """PEFT's LoRA configuration and, in ``lorapack``, which modules point to which shared adapter."""

    lorapack: dict[str, Any] = field(default_factory=lambda: {"version": VERSION, "shared": {}})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def to_dict(self) -> dict[str, Any]:
        """For saving. PEFT saves the factors it holds, which are no codes any more."""
        found = super().to_dict()
        found["lorapack"] = {key: value for key, value in self.lorapack.items() if key != "stored"}
        return found

    @property
    def manifest(self) -> Manifest:
        return manifest({"lorapack": self.lorapack}, "adapter_config.json")


class LorapackModel(LoraModel):
    """PEFT's LoRA with the layers of a group tied to one pair of factors."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = self.peft_config[adapter_name].manifest
        for group, modules in found.shared.items():
            _tie([model.get_submodule(module) for module in modules], adapter_name, found.form(group))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LorapackConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        kept = config.manifest

        def take(ending: str) -> Tensor:
            return found.pop(next(n for n in (PREFIX + ending, ending) if n in found))

        for group, modules in kept.shared.items():
            form = kept.form(group)
            for part, own in (("A", form.core), ("B", form.output)):
                place = f"{adapter_name}.shared.weight" if own else f"{adapter_name}.weight"
                for module in () if form.seeded else modules:
                    found[f"{STEM}{group}.{part}"] = take(f"{module}.lora_{part}.{place}")
            for module in modules:
                for part, place in form.parts.items():
                    layer, _, name = place.partition(".")
                    found[f"{STEM}{module}.{part}"] = take(f"{module}.{layer}.{adapter_name}.{name}")
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.startswith(STEM):
            return key
        inside = re.match(rf"(.*\.lora_[AB])\.{re.escape(adapter_name)}(\.shared\.weight)$", key)
        if inside:
            return inside[1] + inside[2]
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LorapackConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        plain = unfolded(config, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)


def _tie(layers: list[Any], name: str, form: Form) -> None:
    """Give PEFT's LoRA layers of a group one pair of factors, and each what it has of its own."""
    first = [getattr(layers[0], part)[name] for part in ("lora_A", "lora_B")]
    blanks = [factor.weight for factor in first]
    if form.seeded:
        where = [blank.device if blank.device.type != "meta" else "cpu" for blank in blanks]
        first = [Frozen(t.to(device)) for t, device in zip(form.seeded.factors(), where, strict=True)]
    rank, d_out = blanks[0].shape[0], blanks[1].shape[0]

    def ones(like: nn.Parameter, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape, dtype=like.dtype, device=like.device), requires_grad=like.requires_grad)

    for layer in layers:
        a, b = first
        if form.core:
            a = WithCore(a, ones(blanks[0], *((rank, rank) if form.core == "full" else (rank,))))
        if form.output:
            b = WithOutput(b, ones(blanks[1], d_out))
        layer.lora_A[name], layer.lora_B[name] = a, b


def unfolded(config: LorapackConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A compact checkpoint's tensors by PEFT's names, a group's under the name of each of its modules.

    Seeded factors are left out: the layers have them already.
    """
    entry, where = {"lorapack": config.lorapack}, "adapter_model.safetensors"
    found = manifest(entry, where)
    floats, _ = unstored(found.stored, found.shared, tensors, where)
    plain, shared = unfold(entry, floats, where)
    forms = {group: found.form(group) for group in shared}
    for group, modules in shared.items():
        for part in ("A", "B"):
            tensor = plain.pop(f"{group}.lora_{part}.weight")
            place = "shared.weight" if (forms[group].core if part == "A" else forms[group].output) else "weight"
            if not forms[group].seeded:
                plain |= {f"{PREFIX}{module}.lora_{part}.{place}": tensor for module in modules}
    return plain


def register() -> None:
    """Enter the compact format into PEFT's dictionaries; calling it again changes nothing."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LorapackConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = LorapackModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = LorapackModel.prefix
