"""An adapter on seeded factors as PEFT's own VeRA checkpoint (`lorapack expand --as-vera`)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.core.names import PREFIX
from lorapack.core.seeded import seeded
from lorapack.errors import InputError, OutputError
from lorapack.read.adapter import SAFETENSORS
from lorapack.write.adapter import DIFFERS, put_files

# of the source's configuration, what means the same in PEFT's VeRA
KEPT = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save", "revision", "task_type")


def vera_form(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's VeRA: one A and one B for all modules, of which a smaller module uses a slice, and two vectors each.

    ``W = diag(lambda_b) B[:d_out] diag(lambda_d) A[:, :d_in]``; a module's scale goes into lambda_d. The
    projections are stored (``save_projection``), because PEFT would draw others from the same seed.

    Raises:
        InputError: a module that has something else, or seeds or ranks that differ; names the module.
    """
    kinds: dict[tuple[int, int], str] = {}
    tensors = {name: tensor.clone() for name, tensor in adapter.carried.items()}
    for module, pointer in adapter.modules.items():
        factors = adapter.pool[pointer.factors]
        if factors.seed is None or pointer.form != ("diagonal", True):
            raise InputError(f"--as-vera: {module} is not two vectors on seeded factors, as the method vera makes them")
        kinds.setdefault((factors.seed, factors.rank), module)
        core, output = pointer.own
        wide = torch.promote_types(core.dtype, torch.float32)  # the scale is no bf16
        tensors[f"{PREFIX}{module}.vera_lambda_d"] = (core.double() * pointer.scale).to(wide)
        tensors[f"{PREFIX}{module}.vera_lambda_b"] = output.clone()
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise InputError(f"--as-vera: {first} and {second} have other seeds or ranks, and VeRA has one pair for all")
    if adapter.config.get("bias") not in (None, "none"):
        raise InputError("--as-vera: the adapter carries biases, for which PEFT's VeRA has other names")
    ((seed, rank),) = kinds
    shapes = [adapter.pool[pointer.factors].shape for pointer in adapter.modules.values()]
    largest = max(d_out for d_out, _ in shapes), max(d_in for _, d_in in shapes)
    dtype = next(iter(adapter.modules.values())).own[0].dtype
    tensors["base_model.vera_A"], tensors["base_model.vera_B"] = seeded(seed, rank, largest, dtype)
    config = {name: adapter.config[name] for name in KEPT if name in adapter.config}
    config |= {
        "peft_type": "VERA",
        "r": rank,
        "target_modules": list(adapter.modules),
        "projection_prng_key": seed,
        "save_projection": True,
        "vera_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return config, tensors


def put_vera(adapter: Adapter, directory: Path) -> None:
    """Write the checkpoint into a directory that is there, and read it back.

    Raises:
        InputError: it is no VeRA.
        OutputError: what was read back differs.
    """
    config, tensors = vera_form(adapter)
    put_files(directory, config, tensors)
    found = load_file(directory / SAFETENSORS)
    if found.keys() != tensors.keys() or not all(torch.equal(found[name], t) for name, t in tensors.items()):
        raise OutputError(DIFFERS.format(directory))
