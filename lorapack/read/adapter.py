"""A checkpoint directory as an `Adapter`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Kind, Pointer
from lorapack.core.codes import Codes, Sparse
from lorapack.core.names import LORA, PREFIX
from lorapack.errors import InputError
from lorapack.read.compact import Form, manifest, unfold
from lorapack.read.config import COMPACT_TYPE, LoraSettings, check_config
from lorapack.read.files import BIN, CONFIG, REPORT, SAFETENSORS, read_bin, read_json, read_safetensors
from lorapack.read.foreign import CALLED, foreign_format
from lorapack.read.stored import unstored

__all__ = ["BIN", "CONFIG", "REPORT", "SAFETENSORS", "from_tensors", "read_adapter", "read_tensors"]


def read_adapter(directory: str | Path) -> Adapter:
    """Read a PEFT or compact adapter directory and check every tensor of it.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Raises:
        InputError: what is missing, damaged, contradictory or not supported, and where.
    """
    directory = Path(directory)
    if not directory.exists():
        raise InputError(f"{directory} does not exist")
    if directory.is_file():
        raise InputError(_single_file(directory))
    if not (directory / CONFIG).exists():
        raise InputError(f"{directory} has no {CONFIG}: it is not a PEFT adapter directory{_hint(directory)}")
    config = read_json(directory / CONFIG)
    settings = check_config(config, str(directory / CONFIG))
    tensors, where = read_tensors(directory)
    shared: dict[str, list[str]] = {}
    codes: dict[str, Codes | Sparse] = {}
    forms: dict[str, Form] = {}
    if config["peft_type"] == COMPACT_TYPE:
        entry = manifest(config, where)
        tensors, codes = unstored(entry.stored, entry.shared, tensors, where)
        tensors, shared = unfold(config, tensors, where)
        forms = entry.forms
    adapter = from_tensors(config, settings, tensors, shared, where, forms)
    pool = {name: replace(f, codes=codes.get(name)) for name, f in adapter.pool.items()}
    return adapter.with_pool(pool, adapter.modules)


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], str]:
    """The adapter's tensors by name, and the file they came from."""
    if (directory / SAFETENSORS).exists():
        return read_safetensors(directory / SAFETENSORS)[0], str(directory / SAFETENSORS)
    if (directory / BIN).exists():
        return read_bin(directory / BIN), str(directory / BIN)
    raise InputError(f"{directory} has neither {SAFETENSORS} nor {BIN}")


def from_tensors(
    config: Mapping[str, Any],
    settings: LoraSettings,
    tensors: Mapping[str, Tensor],
    shared: Mapping[str, list[str]],
    where: str,
    forms: Mapping[str, Form] | None = None,
) -> Adapter:
    """Pair up the A's and B's and give each module its scale.

    Args:
        config: `adapter_config.json`, kept as it is.
        settings: the same, checked.
        tensors: by PEFT's names; the tensors of a group stand under ``group.lora_A.weight``.
        shared: group to the modules that point to it.
        where: the file, for messages.
        forms: of the groups, where layers have more than a scale of their own.

    Raises:
        InputError: names the module.
    """
    own = {
        f"{PREFIX}{module}.{place}"
        for group, form in (forms or {}).items()
        for module in shared[group]
        for place in form.parts.values()
    }
    pairs: dict[str, dict[str, Tensor]] = {}
    carried: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds NaN or infinite numbers")
        match = LORA.match(name)
        if name in own:
            if not tensor.is_floating_point():
                raise InputError(f"{where}: {name} is stored as {tensor.dtype}; quantised adapters are not read")
        elif match:
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_magnitude_vector" in name:
            raise InputError(f"{where}: {name} belongs to DoRA, which cannot be compressed yet")
        elif ".lora_" in name:
            raise InputError(f"{where}: {name} is no tensor of plain LoRA (expected ….lora_A.weight, ….lora_B.weight)")
        else:
            carried[name] = tensor
    if not pairs:
        raise InputError(f"{where} holds no LoRA tensors")
    pool: dict[str, Factors] = {}
    modules: dict[str, Pointer] = {}
    for stem, parts in pairs.items():
        if stem in shared:
            form = (forms or {}).get(stem, Form())
            seed = form.seeded.seed if form.seeded else None
            pool[stem] = replace(pair(stem, parts, where), seed=seed)
            for module in shared[stem]:
                _check_rank(settings, module, pool[stem].rank, where)
                core, output = (tensors.get(f"{PREFIX}{module}.{place}") for place in ("lora_A.core", "lora_B.output"))
                modules[module] = Pointer(stem, settings.scale(module, pool[stem].rank), core, output)
                if core is not None and modules[module].form[0] != form.core:
                    raise InputError(
                        f"{where}: {module} has a core of {core.ndim} dimensions, which {CONFIG} calls {form.core}"
                    )
            continue
        if not stem.startswith(PREFIX):
            raise InputError(f"{where}: {stem} does not begin with {PREFIX!r}, so PEFT would not find its module")
        module = stem.removeprefix(PREFIX)
        pool[module] = pair(module, parts, where)
        _check_rank(settings, module, pool[module].rank, where)
        modules[module] = Pointer(module, settings.scale(module, pool[module].rank))
    return Adapter(config, pool, modules, carried)


def pair(name: str, parts: Mapping[str, Tensor], where: str) -> Factors:
    kind: Kind = "linear"
    if any("embedding" in part for part in parts):
        kind = "embedding"
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    for here, other in (names, names[::-1]):
        if here not in parts:
            raise InputError(f"{where}: {name} has {other} but no {here}")
    if len(parts) > 2:
        raise InputError(f"{where}: {name} has both linear and embedding factors")
    a, b = parts[names[0]], parts[names[1]]
    if not (a.is_floating_point() and b.is_floating_point()):
        raise InputError(f"{where}: {name} is stored as {a.dtype} and {b.dtype}; quantised adapters are not read")
    if a.ndim == b.ndim == 4 and kind == "linear":
        kind = "conv"
    elif not a.ndim == b.ndim == 2:
        raise InputError(f"{where}: {name} has factors of {a.ndim} and {b.ndim} dimensions, expected 2 and 2")
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{where}: {name} has lora_A of rank {a.shape[0]} and lora_B of rank {b.shape[1]}")
    if min(*a.shape, *b.shape) == 0:
        raise InputError(f"{where}: {name} has an empty factor, {tuple(a.shape)} and {tuple(b.shape)}")
    return Factors(a, b, kind)


def _check_rank(settings: LoraSettings, module: str, rank: int, where: str) -> None:
    if settings.rank(module) != rank:
        raise InputError(
            f"{where}: {module} has rank {rank}, {CONFIG} says {settings.rank(module)}: "
            "the two files do not belong together"
        )


def _single_file(path: Path) -> str:
    hint = f"{path} is a file; lorapack reads PEFT adapter directories"
    if path.suffix == ".safetensors":
        return f"{hint}{_called(set(read_safetensors(path)[0]))}"
    if path.suffix in (".bin", ".pt", ".pth"):
        return f"{hint}{_called(set(read_bin(path)))}"
    return hint


def _hint(directory: Path) -> str:
    files = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    return f" ({_single_file(files[0])})" if files else ""


def _called(names: set[str]) -> str:
    found = foreign_format(names)
    return f", this one is {CALLED[found]}; `lorapack convert` makes a PEFT adapter of it" if found else ""
