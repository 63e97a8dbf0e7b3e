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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import mapping
from peft.tuners.lora import LoraConfig, LoraModel
from torch import Tensor, nn

from lorapack.core.names import PREFIX
from lorapack.read.compact import STEM, VERSION, manifest, unfold
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
    def shared(self) -> dict[str, list[str]]:
        return manifest({"lorapack": self.lorapack}, "adapter_config.json").shared


class LorapackModel(LoraModel):
    """PEFT's LoRA with the layers of a group tied to one pair of factors."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for modules in self.peft_config[adapter_name].shared.values():
            layers = [model.get_submodule(module) for module in modules]
            for layer in layers[1:]:
                for part in ("lora_A", "lora_B"):
                    getattr(layer, part)[adapter_name] = getattr(layers[0], part)[adapter_name]

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
        for group, modules in config.shared.items():
            for part in ("A", "B"):
                for module in modules:
                    ending = f"{module}.lora_{part}.{adapter_name}.weight"
                    name = next(n for n in (PREFIX + ending, ending) if n in found)
                    found[f"{STEM}{group}.{part}"] = found.pop(name)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if key.startswith(STEM) else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LorapackConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        plain = unfolded(config, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)


def unfolded(config: LorapackConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A compact checkpoint's tensors by PEFT's names, a group's under the name of each of its modules."""
    entry, where = {"lorapack": config.lorapack}, "adapter_model.safetensors"
    found = manifest(entry, where)
    floats, _ = unstored(found.stored, found.shared, tensors, where)
    plain, shared = unfold(entry, floats, where)
    for group, modules in shared.items():
        for part in ("A", "B"):
            tensor = plain.pop(f"{group}.lora_{part}.weight")
            plain |= {f"{PREFIX}{module}.lora_{part}.weight": tensor for module in modules}
    return plain


def register() -> None:
    """Enter the compact format into PEFT's dictionaries; calling it again changes nothing."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LorapackConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = LorapackModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = LorapackModel.prefix
