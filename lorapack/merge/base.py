"""A base model as files: which shards there are, and what else belongs to it."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapack.errors import InputError
from lorapack.merge.layout import Entry, Shard, read_shard
from lorapack.read.files import CONFIG, read_bin, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MODEL_CONFIG = "config.json"
# what comes along; weights, indices, the model card and whatever belongs to an adapter do not
TAKEN = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*")
LEFT = ("*.index.json", "adapter_*.json", "model_index.json", "requirements.txt", "trainer_state.json", ".*")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
WAY_OUT = "merge into the model it was made from, before quantisation (--base), and quantise the result"


@dataclass(frozen=True)
class Base:
    """A base model's files, nothing of its weights in memory.

    Attributes:
        directory: where it lies.
        config: its `config.json`.
        shards: its safetensors files, by the name that the result's files get.
        index: the JSON of the sharded model's index, None for a single file.
    """

    directory: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    index: Mapping[str, Any] | None

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: entry for shard in self.shards.values() for name, entry in shard.entries.items()}


def read_base(directory: Path, work: Path) -> Base:
    """Find and check a base model's files.

    Args:
        directory: holds `config.json` and safetensors, single or with an index, or `.bin` files.
        work: where `.bin` files become safetensors, one at a time in memory.

    Raises:
        InputError: a missing or damaged file, an index that lies, or a quantised model.
    """
    if not directory.is_dir():
        raise InputError(f"the base model {directory} is no directory")
    if not (directory / MODEL_CONFIG).exists():
        raise InputError(f"{directory} has no {MODEL_CONFIG}: it is not a model directory; name it with --base")
    config = read_json(directory / MODEL_CONFIG)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise InputError(f"the base {directory} is quantised ({method or 'quantization_config'}): {WAY_OUT}")
    if (directory / SINGLE).exists():
        return Base(directory, config, {SINGLE: read_shard(directory / SINGLE)}, None)
    if (directory / INDEX).exists():
        index = read_json(directory / INDEX)
        names = _named(index, directory / INDEX, ".safetensors")
        shards = {name: read_shard(directory / name) for name in names}
        _check_index(index, shards, directory / INDEX)
        return Base(directory, config, shards, index)
    if (directory / BIN_SINGLE).exists():
        return Base(directory, config, {SINGLE: _converted(directory / BIN_SINGLE, work / SINGLE)}, None)
    if (directory / BIN_INDEX).exists():
        index = read_json(directory / BIN_INDEX)
        shards = {}
        for name in _named(index, directory / BIN_INDEX, ".bin"):
            new = name.removesuffix(".bin").replace("pytorch_model", "model", 1) + ".safetensors"
            shards[new] = _converted(directory / name, work / new)
        placed = {tensor: new for new, shard in shards.items() for tensor in shard.entries}
        return Base(directory, config, shards, {**index, "weight_map": placed})
    raise InputError(f"{directory} has none of {SINGLE}, {INDEX}, {BIN_SINGLE}, {BIN_INDEX}")


def companions(base: Path, adapter: Path) -> dict[str, Path]:
    """The small files that come along, by name: the base's, and the adapter's tokenizer where it brings a whole one.

    Raises:
        InputError: one is a link to somewhere else.
    """
    found = {p.name: p for p in sorted(base.iterdir()) if p.is_file() and _matches(p.name, TAKEN, LEFT)}
    if (adapter / "tokenizer_config.json").exists():
        found = {name: path for name, path in found.items() if not _matches(name, TOKENIZER, ())}
        found |= {p.name: p for p in sorted(adapter.iterdir()) if p.is_file() and _matches(p.name, TOKENIZER, ())}
    found = {name: path for name, path in found.items() if name not in (CONFIG, MODEL_CONFIG)}
    for path in found.values():
        refuse_foreign(path)
    return found


def refuse_foreign(path: Path) -> None:
    """Refuse a link to a file that is none of a model's: what it leads to would be copied into the result.

    A link is followed within its directory, to the file of the same name of another model, and from a snapshot in the
    Hub's cache to the `blobs` beside it.

    Raises:
        InputError: names both.
    """
    target, directory = path.resolve(), path.parent.resolve()
    own = [directory, directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else [directory]
    model = target.name == path.name and any((target.parent / name).is_file() for name in (MODEL_CONFIG, CONFIG))
    if not model and not any(place in target.parents for place in own):
        raise InputError(f"{path} is a link to {target}, which is no file of a model; put the file itself there")


def _matches(name: str, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in unwanted
    )


def _named(index: Mapping[str, Any], path: Path, suffix: str) -> list[str]:
    """The files an index names: plain names in its own directory, nothing else."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{path} has no weight_map of tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or name.startswith(".") or not name.endswith(suffix):
            raise InputError(f"{path} names the file {name!r}, which is no plain name of a {suffix} file beside it")
        if not (path.parent / name).is_file():
            raise InputError(f"{path} names {name}, which is not there. Download it again")
    return names


def _check_index(index: Mapping[str, Any], shards: Mapping[str, Shard], path: Path) -> None:
    held = {tensor: name for name, shard in shards.items() for tensor in shard.entries}
    for tensor, name in index["weight_map"].items():
        if tensor not in shards[name].entries:
            raise InputError(f"{path} says that {tensor} is in {name}, which does not hold it. Download both again")
    for tensor, name in held.items():
        if index["weight_map"].get(tensor) != name:
            raise InputError(f"{path} does not say that {tensor} is in {name}. Download both again")


def _converted(path: Path, to: Path) -> Shard:
    """A `.bin` file as safetensors; of several names for one tensor the first stays, as transformers does it."""
    from safetensors.torch import save_file

    tensors, seen = {}, set()
    for name, tensor in read_bin(path).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            tensors[name] = tensor.clone().contiguous()
    save_file(tensors, to, metadata={"format": "pt"})
    return read_shard(to)
