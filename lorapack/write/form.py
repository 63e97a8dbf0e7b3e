"""An `Adapter` as PEFT's two halves, configuration and named tensors; no file is touched."""

import re
from typing import Any

from torch import Tensor

from lorapack.core.adapter import Adapter, Factors
from lorapack.core.names import PREFIX
from lorapack.read.compact import STEM, VERSION
from lorapack.read.config import COMPACT_TYPE
from lorapack.write.stored import stored_form


def compact_form(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The smallest form: each distinct pair of factors once, as it is stored.

    Where nothing is shared or stored in few bits this is plain PEFT, which every tool reads.
    """
    groups = adapter.groups
    named = {p.factors if p.factors in groups else m: p.factors for m, p in adapter.modules.items()}
    codes = {name: found for name, key in named.items() if (found := adapter.pool[key].codes)}
    stored, packed = stored_form(codes)
    config = _config(adapter)
    tensors = dict(adapter.carried) | packed
    if groups or stored:
        config["peft_type"] = COMPACT_TYPE
        config["lorapack"] = {"version": VERSION, "shared": {name: groups[name] for name in sorted(groups)}}
        forms = {name: form for name in sorted(groups) if (form := _form(adapter, name, groups[name][0]))}
        config["lorapack"] |= {"forms": forms} if forms else {}
    if stored:
        config["lorapack"]["stored"] = stored
    for name, factors in adapter.pool.items():
        if name in groups and factors.seed is None and not factors.codes:
            tensors |= {f"{STEM}{name}.A": factors.A, f"{STEM}{name}.B": factors.B}
    for module, pointer in adapter.modules.items():
        own = (("core", pointer.core), ("output", pointer.output))
        tensors |= {f"{STEM}{module}.{part}": tensor for part, tensor in own if tensor is not None}
    for module, pointer in adapter.modules.items():
        if pointer.factors not in groups and module not in codes:
            tensors |= _named(module, adapter.factors(module))
    return config, tensors


def peft_form(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain PEFT LoRA: shared factors are repeated for every module that points to them."""
    tensors = dict(adapter.carried)
    for module in adapter.modules:
        tensors |= {name: tensor.clone() for name, tensor in _named(module, adapter.factors(module)).items()}
    return _config(adapter), tensors


def _form(adapter: Adapter, group: str, module: str) -> dict[str, Any]:
    """What the manifest says of a group beside its modules; nothing where it is a plain pair."""
    factors, (core, output) = adapter.pool[group], adapter.modules[module].form
    form: dict[str, Any] = {"core": core} if core else {}
    form |= {"output": True} if output else {}
    if factors.seed is not None:
        form["seeded"] = {"seed": factors.seed, "rank": factors.rank, "shape": list(factors.shape)}
        form["seeded"] |= {"dtype": str(factors.A.dtype).removeprefix("torch.")}
    return form


def _named(module: str, factors: Factors) -> dict[str, Tensor]:
    if factors.kind == "embedding":
        return {f"{PREFIX}{module}.lora_embedding_A": factors.A, f"{PREFIX}{module}.lora_embedding_B": factors.B}
    return {f"{PREFIX}{module}.lora_A.weight": factors.A, f"{PREFIX}{module}.lora_B.weight": factors.B}


def _config(adapter: Adapter) -> dict[str, Any]:
    """The source's configuration with ranks, alphas and targets that say what is there now.

    Every module is named in full, so that PEFT makes a layer for these modules and no other, and
    a module has a pattern only where it differs from the global ``r`` and ``lora_alpha``.
    """
    config = {key: value for key, value in adapter.config.items() if key != "lorapack"}
    rslora = bool(config.get("use_rslora"))
    ranks = {module: adapter.factors(module).rank for module in adapter.modules}
    alphas = {module: _alpha(adapter.scale(module), rank, rslora) for module, rank in ranks.items()}
    rank = max(ranks.values())
    usual = list(alphas.values())
    alpha = max(dict.fromkeys(usual), key=usual.count)
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": list(adapter.modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return config


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    alpha = scale * (rank**0.5 if rslora else rank)
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-12 * abs(alpha) else alpha


def _pattern(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """Keys that PEFT matches with exactly one of these modules, in whatever order they are saved.

    PEFT lets a key match the end of a name; ``^`` keeps it from that where a longer name is there.
    """
    endings = {ending for module in values for ending in _endings(module)}
    return {
        ("^" if module in endings else "") + re.escape(module): value
        for module, value in values.items()
        if value != usual
    }


def _endings(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[n:]) for n in range(1, len(parts))]
