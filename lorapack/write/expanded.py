"""An adapter as the plain PEFT directory of one engine (`lorapack expand`), proved by the engine's own rule."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.engines import rules
from lorapack.engines.arrange import private
from lorapack.engines.engine import AskBase, Scales
from lorapack.errors import OutputError
from lorapack.read.adapter import read_adapter
from lorapack.read.files import CONFIG, read_json
from lorapack.write.adapter import DIFFERS, put_files
from lorapack.write.form import peft_form

# All that an engine has to know. Older PEFT, which some engines use to read it, stops at a field it does not know.
FIELDS = (
    *("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type"),
)
ROUNDING = 2.0**-22  # of a scale that was moved into B, and of one that is kept in float32


def arranged(adapter: Adapter, engine: str, base: AskBase) -> Adapter:
    """The adapter as an engine has to be given it, with one plain pair a module.

    Args:
        adapter: any.
        engine: a name of `lorapack.engines.NAMES`.
        base: gives the base model's facts, where the adapter does not say enough.

    Raises:
        InputError: what the engine cannot compute, and the way out.
    """
    return rules(engine).arrange(private(adapter), base)


def expanded_form(adapter: Adapter, engine: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and named tensors of an `arranged` adapter.

    For PEFT the source's configuration is kept; engines get the fields that matter to them, without rsLoRA:
    a module's scale is then alpha / rank for all of them.
    """
    if engine == "peft":
        return peft_form(adapter)
    config = {**adapter.config, "use_rslora": False}
    config, tensors = peft_form(Adapter(config, adapter.pool, adapter.modules, adapter.carried))
    return {name: value for name, value in config.items() if name in FIELDS}, tensors


def put_expanded(adapter: Adapter, written: Adapter, engine: str, directory: Path) -> None:
    """Write an `arranged` adapter into a directory that is there, and prove it (`prove`)."""
    put_files(directory, *expanded_form(written, engine))
    prove(adapter, engine, directory)


def prove(adapter: Adapter, engine: str, directory: Path) -> None:
    """Read a directory back as the engine reads it: every module's ``scale * B @ A`` is the adapter's.

    The factors are compared in float64, which is stricter than their products: A bit for bit, B times the scale
    to the rounding of B, what was padded or added must be zero.

    Raises:
        OutputError: something differs.
    """
    found, wanted = read_adapter(directory), private(adapter)
    scales = rules(engine).scales(read_json(directory / CONFIG))
    same = wanted.modules.keys() <= found.modules.keys() and found.carried.keys() == wanted.carried.keys()
    same = same and all(torch.equal(t, found.carried[name]) for name, t in wanted.carried.items())
    if not same or not all(_same(module, found, wanted, scales) for module in found.modules):
        raise OutputError(DIFFERS.format(directory))


def _same(module: str, found: Adapter, wanted: Adapter, scales: Scales) -> bool:
    a, b = found.pool[module].A, found.pool[module].B
    if module not in wanted.modules:
        return not b.any()
    factors = wanted.pool[module]
    rank = factors.rank
    return (
        torch.equal(a[:rank], factors.A)
        and not a[rank:].any()
        and not b[:, rank:].any()
        and torch.allclose(
            b[:, :rank].double() * scales(module, a.shape[0]),
            factors.B.double() * wanted.scale(module),
            rtol=ROUNDING,
            atol=1e-40,
        )
    )
