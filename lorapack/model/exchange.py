"""Another adapter on a base that is in memory: what `lorapack.model.point` leaves alone, the carried tensors."""

import json
from collections.abc import Hashable

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError
from lorapack.model.load import NAME, Loaded, quiet

# settings that say nothing of how the layers are made: `point` sets ranks and scales, modules are compared by name
FREE = {
    "alpha_pattern",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "use_rslora",
}


def layout(adapter: Adapter) -> Hashable | None:
    """What two adapters of one base must have in common to be exchanged; None for one that cannot be.

    Those are the modules with their shapes, the names and shapes of the carried tensors, and every setting
    that is not `FREE`. Pairs of other layers than linear ones have a rank that `point` does not set.
    """
    if len(adapter.linear) < len(adapter.modules):
        return None
    settings = {key: value for key, value in adapter.config.items() if key not in FREE}
    return (
        json.dumps(settings, sort_keys=True),
        tuple((module, adapter.factors(module).shape) for module in adapter.modules),
        tuple(sorted((name, tuple(tensor.shape)) for name, tensor in adapter.carried.items())),
    )


def exchange(loaded: Loaded, adapter: Adapter) -> None:
    """Give a loaded base the carried tensors of another adapter of the same `layout`; `point` does the rest.

    Raises:
        InputError: the base has no place for one of them.
    """
    from peft.utils import set_peft_model_state_dict

    if not adapter.carried:
        return
    with quiet():
        result = set_peft_model_state_dict(loaded.model, dict(adapter.carried), NAME)
    if result.unexpected_keys:
        raise InputError(f"the base model has no place for the adapter's tensor {result.unexpected_keys[0]}")
