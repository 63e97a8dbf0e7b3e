"""`lorapack.convert_adapter`: an adapter from any format that is read here to any that is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapack.convert.cloneofsimo import from_cloneofsimo
from lorapack.convert.components import COMPONENTS, Parts, component
from lorapack.convert.diffusers import from_diffusers, to_diffusers
from lorapack.convert.gguf import Output, to_gguf, write_gguf
from lorapack.convert.kohya import from_kohya, to_kohya
from lorapack.convert.loralib import from_loralib
from lorapack.convert.mlx import TENSORS, from_mlx, is_mlx
from lorapack.convert.pairs import alpha_of
from lorapack.core.adapter import Adapter
from lorapack.errors import InputError, OutputError
from lorapack.hub import find_base_config, read_adapter
from lorapack.merge.layout import read_shard
from lorapack.read.files import CONFIG, read_bin, read_json, read_safetensors
from lorapack.read.foreign import foreign_format
from lorapack.write.adapter import put_adapter
from lorapack.write.directory import new_directory
from lorapack.write.file import new_file

Target = Literal["peft", "kohya", "diffusers", "gguf"]
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
ALONE = ""  # the component of an adapter that is of no pipeline


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        source: the format that was recognised.
        target: the one that was written.
        modules: how many, by component; an adapter that stands alone has the component `ALONE`.
        notes: what a reader of the result is known to get wrong, a line each.
    """

    source: str
    target: Target
    modules: Mapping[str, int]
    notes: Sequence[str] = ()


def convert_adapter(
    source: str | Path,
    out: str | Path,
    to: Target | None = None,
    base: str | None = None,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    dtype: Output = "float32",
    revision: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert an adapter; its format is recognised.

    Args:
        source: a PEFT, compact or MLX directory, one with the components of a pipeline in it, a single file of kohya,
            diffusers, loralib or cloneofsimo, or a Hub id.
        out: what to make: a directory for ``peft``, a file otherwise. It appears whole or not at all.
        to: the format; by default GGUF for a file of that ending, PEFT otherwise.
        base: path or Hub id of the base model, whose files name its modules and whose configuration GGUF needs.
        alpha: of a loralib state dict, which does not hold it.
        enable_lora: of the merged projections in it.
        dtype: of the numbers in GGUF.
        revision: of an adapter on the Hub.
        overwrite: replace an existing output.

    Returns:
        What was recognised and written.

    Raises:
        InputError: what is not certain, damaged, or has no place in the other format.
        OutputError: `out` exists or cannot be written.
    """
    target = to or ("gguf" if Path(out).suffix == ".gguf" else "peft")
    kind, parts = read_any(source, base, alpha, enable_lora, revision)
    if kind == target:
        hint = "; `lorapack expand` makes plain PEFT of a compact one" if kind == "peft" else ""
        raise InputError(f"{source} is in the format {kind} already, name another one with --to{hint}")
    if kind != "loralib" and (alpha is not None or enable_lora is not None):
        raise InputError(
            f"{source} is in the format {kind}, which has its alphas; --alpha, --enable-lora are for loralib"
        )
    if target != "gguf" and dtype != "float32":
        raise InputError(f"--dtype is for GGUF; {target} keeps the numbers as they are")
    if target == "peft":
        _write_peft(parts, out, base, overwrite, source)
    elif target == "gguf":
        _write_gguf(parts, out, base, dtype, overwrite, source)
    else:
        named = {component(a.modules) if name == ALONE else name: a for name, a in parts.items()}
        tensors, metadata = (to_kohya if target == "kohya" else to_diffusers)(named)
        with new_file(out, overwrite=overwrite, inputs=(source,)) as path:
            _save(tensors, metadata, path)
    counts = {name: len(adapter.modules) for name, adapter in parts.items()}
    return Converted(kind, target, counts, _notes(parts) if target == "kohya" else ())


def read_any(
    source: str | Path,
    base: str | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    revision: str | None = None,
) -> tuple[str, Parts]:
    """The adapters in a directory, file or repository of any format, and the format's name.

    Raises:
        InputError: what no format is, or is damaged.
    """
    place = Path(source)
    if place.is_dir():
        if (place / CONFIG).exists():
            config = read_json(place / CONFIG)
            if is_mlx(config):
                return "mlx", {ALONE: from_mlx(config, read_safetensors(place / TENSORS)[0], str(place))}
            del config  # it is read again, and two of them may be large
            return "peft", {ALONE: read_adapter(place)}
        parts = {name: read_adapter(place / name) for name in COMPONENTS if (place / name / CONFIG).exists()}
        if parts:
            return "peft", parts
        files = [path for path in sorted(place.iterdir()) if path.suffix in ENDINGS]
        if len(files) == 1:
            place = files[0]
    if not place.is_file():
        return "peft", {ALONE: read_adapter(source, revision)}
    return _read_file(place, base, alpha, enable_lora)


def _read_file(
    path: Path, base: str | None, alpha: float | None, enable_lora: Sequence[bool] | None
) -> tuple[str, Parts]:
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        tensors = read_bin(path)
    kind, where = foreign_format(tensors), str(path)
    if kind == "kohya":
        names = base_names(Path(base)) if base and Path(base).is_dir() else {}
        return kind, from_kohya(tensors, metadata, names, where)
    if kind == "diffusers":
        return kind, from_diffusers(tensors, metadata, where)
    if kind == "loralib":
        return kind, {ALONE: from_loralib(tensors, alpha, enable_lora, where)}
    if kind == "cloneofsimo":
        return kind, from_cloneofsimo(tensors, where)
    raise InputError(
        f"{path} is in no format that is read here (kohya, diffusers, loralib, cloneofsimo); of a PEFT or MLX adapter "
        f"give the directory, with its {CONFIG}"
    )


def base_names(base: Path) -> dict[str, list[str]]:
    """For each component of a pipeline on the disk, or for the model that it is, the names of its modules.

    Only headers of safetensors are read.

    Raises:
        InputError: there are none, or damaged ones.
    """
    folders = {name: base / name for name in COMPONENTS if (base / name).is_dir()} or {ALONE: base}
    found = {}
    for name, folder in folders.items():
        shards = [read_shard(path) for path in sorted(folder.glob("*.safetensors"))]
        modules = [tensor.removesuffix(".weight") for shard in shards for tensor in shard.entries if "weight" in tensor]
        if not modules:
            raise InputError(f"{folder} has no safetensors, so the names of its modules are not known")
        found[name if name != ALONE else component(modules)] = modules
    return found


def _write_peft(parts: Parts, out: str | Path, base: str | None, overwrite: bool, source: str | Path) -> None:
    """One adapter as the directory, those of several components each as a directory in it."""
    names = {name: "." if len(parts) == 1 else name for name in parts}
    mark = f"{next(iter(names.values()))}/{CONFIG}"
    with new_directory(out, overwrite=overwrite, inputs=(source,), mark=mark) as directory:
        for name, adapter in parts.items():
            (directory / names[name]).mkdir(exist_ok=True)
            put_adapter(_based(adapter, base), directory / names[name], expand=True)


def _based(adapter: Adapter, base: str | None) -> Adapter:
    return replace(adapter, config={**adapter.config, "base_model_name_or_path": base}) if base else adapter


def _write_gguf(
    parts: Parts, out: str | Path, base: str | None, dtype: Output, overwrite: bool, source: str | Path
) -> None:
    if set(parts) != {ALONE}:
        raise InputError(f"{source} is for a diffusion pipeline; a GGUF LoRA is for a language model")
    adapter = parts[ALONE]
    model = base or adapter.base_model
    if model is None:
        raise InputError("the adapter names no base model; name it with --base")
    try:
        config = find_base_config(model, None if base else adapter.config.get("revision"))
    except InputError as error:
        raise InputError(f"GGUF needs the base's configuration, and {error}. Name it with --base") from None
    made = to_gguf(adapter, read_json(config), str(config), dtype)
    with new_file(out, overwrite=overwrite, inputs=(source, config.parent)) as path:
        write_gguf(made, path)


def _notes(parts: Parts) -> list[str]:
    return [
        f"the modules{f' of the {name}' if name else ''} have different alphas; diffusers (0.42) gives attention "
        "layers of a kohya file the commonest one: give it a file made with --to diffusers"
        for name, adapter in parts.items()
        if len({alpha_of(adapter, module) for module in adapter.modules}) > 1
    ]


def _save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))
    found, said = read_safetensors(path)
    if said != metadata or found.keys() != tensors.keys() or not all(torch.equal(found[n], tensors[n]) for n in found):
        raise OutputError("what was written reads back differently; nothing was kept. Check the disk")
