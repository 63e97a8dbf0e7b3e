"""The job: a fine-tuned model and its base in, a PEFT adapter out, one weight at a time in memory."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapack.convert.pairs import Pair, adapter_of
from lorapack.core.names import PREFIX
from lorapack.errors import InputError
from lorapack.extract.lowrank import LowRank, of_error, of_rank
from lorapack.hub import find_base
from lorapack.merge.base import Base, read_base
from lorapack.merge.layout import FLOATS, Entry, fill
from lorapack.merge.match import CONV1D_LAYERS, CONV1D_MODELS, EMBEDDINGS, WITH_A_HEAD, places
from lorapack.merge.numbers import STORED, widen
from lorapack.write.adapter import put_adapter
from lorapack.write.directory import new_directory, refuse_overlap

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
HEAD = "lm_head"  # of causal language models
# what PEFT saves for these tasks, whether it is asked to or not
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
OTHER_EMBEDDINGS = ("wpe", "relative_attention_bias")  # of positions, in GPT-2 and T5


@dataclass(frozen=True)
class Layer:
    """One module of the adapter: its rank, and how much of the difference the pair leaves out (`LowRank.error`)."""

    module: str
    rank: int
    error: float


@dataclass(frozen=True)
class Extracted:
    """What was found.

    Attributes:
        layers: the low-rank pairs.
        saved: modules that changed and are stored whole (``modules_to_save``).
        biases: how many biases changed and are stored.
        unchanged: how many weights are the base's.
    """

    layers: tuple[Layer, ...]
    saved: tuple[str, ...]
    biases: int
    unchanged: int


@dataclass(frozen=True)
class Difference:
    """The names of a fine-tuned model's tensors, by what becomes of them.

    Attributes:
        low_rank: weights of linear layers.
        saved: modules that are stored whole.
        biases: of all other modules.
        unchanged: how many are the base's.
    """

    low_rank: tuple[str, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    unchanged: int


def extract_adapter(
    full: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Extracted:
    """Write the difference of two models as a PEFT adapter.

    Weights of linear layers become low-rank pairs. Whatever else changed is stored as it is: embeddings, norms,
    convolutions and new heads as saved modules, biases as biases.

    Args:
        full: a model directory or Hub id, fine-tuned or merged, saved as its class saves it.
        base: what it was made from.
        out: the adapter directory to make; it appears whole or not at all.
        rank: of all pairs, or
        error: the largest relative error (Frobenius norm) of each pair's product; one of the two.
        seed: of the sketches.
        overwrite: replace an existing adapter.

    Raises:
        InputError: models that do not belong together or do not differ, a parameter that no adapter can hold, a layer
            of which the difference is not of low rank.
        OutputError: `out` exists or cannot be written.
    """
    if (rank is None) == (error is None):
        raise InputError("give either a rank or an error")
    with new_directory(out, overwrite=overwrite, inputs=(full, base)) as directory:
        work = directory / ".bin"
        tuned, original = _models(full, base, out, work)
        same = _places(tuned, original)
        found = difference(tuned, original, same)
        pairs, layers = {}, []
        for name in found.low_rank:
            module = name.removesuffix(".weight")
            matrix = _matrix(tuned, name) - _matrix(original, same[name])
            low = _low_rank(matrix.T if _is_conv1d(tuned, module) else matrix, module, rank, error, seed)
            pairs[module] = Pair(low.A.float(), low.B.float(), float(low.rank))
            layers.append(Layer(module, low.rank, low.error))
        carried = _carried(tuned, found) | _tied_head(tuned, found)
        shutil.rmtree(work)
        put_adapter(adapter_of(pairs, str(full), carried, **_config(tuned, found, base)), directory, expand=True)
    return Extracted(tuple(layers), found.saved, len(found.biases), found.unchanged)


def difference(tuned: Base, original: Base, same: Mapping[str, str]) -> Difference:
    """What changed, and what can hold it.

    Args:
        tuned, original: the two models.
        same: the names of the tuned model's tensors that the original has, and its names for them.

    Raises:
        InputError: nothing changed, or a bare parameter did; names it.
    """
    low_rank, biases, unchanged = [], [], 0
    saved: dict[str, None] = {}
    heads = HEADS.get(_task(tuned) or "", ())
    for name, entry in tuned.entries.items():
        module, _, leaf = name.rpartition(".")
        first = name.partition(".")[0]
        if name not in same or first in heads:
            if first not in heads and any(other.startswith(f"{first}.") for other in same):
                raise InputError(f"{name} is not in the base {original.directory}: it is not what was fine-tuned")
            saved[first] = None
            continue
        if _equal(tuned, name, original, same[name]):
            unchanged += 1
            continue
        if leaf not in ("weight", "bias"):
            raise InputError(f"{name} changed and is no weight or bias of a layer of its own: no adapter can hold it")
        if leaf == "bias":
            biases.append(name)
        elif _is_linear(module, entry, original.entries[same[name]]):
            low_rank.append(name)
        else:
            saved[module] = None
    if not low_rank:
        raise InputError(f"no linear layer of {tuned.directory} differs from {original.directory}")
    rest = tuple(name for name in biases if name.removesuffix(".bias") not in saved)
    return Difference(tuple(low_rank), tuple(saved), rest, unchanged)


def _low_rank(matrix: Tensor, module: str, rank: int | None, error: float | None, seed: int) -> LowRank:
    """The pair of a layer.

    Raises:
        InputError: an error for which the pair would have more numbers than the layer.
    """
    if error is None:
        return of_rank(matrix, rank or 1, seed)
    found = of_error(matrix, error, seed)
    if found.rank * sum(matrix.shape) >= matrix.numel():
        raise InputError(
            f"{module} needs the rank {found.rank} for an error of {error:g}, more numbers than the layer has: the "
            "difference is not of low rank. Give a larger --error, or a --rank"
        )
    return found


def _models(full: str | Path, base: str | Path, out: str | Path, work: Path) -> tuple[Base, Base]:
    found = []
    for name, source in (("full", full), ("base", base)):
        place = find_base(source)
        refuse_overlap(out, place)
        (work / name).mkdir(parents=True)
        found.append(read_base(place, work / name))
    return found[0], found[1]


def _places(tuned: Base, original: Base) -> dict[str, str]:
    """The tuned model's tensors that the original has, with its names for them; a head may be new.

    Raises:
        InputError: the names do not fit each other.
    """
    shared = {name: name for name in tuned.entries if name in original.entries}
    return shared or places(tuned.entries, original.entries, str(original.directory))


def _is_linear(module: str, entry: Entry, other: Entry) -> bool:
    """Whether the difference of two weights is a matrix that acts on the layer's input.

    Raises:
        InputError: the shapes differ where only a vocabulary may.
    """
    embedding = (
        module.rpartition(".")[2] in EMBEDDINGS or "embed" in module.rpartition(".")[2] or module.endswith("wpe")
    )
    if entry.shape != other.shape and not embedding:
        raise InputError(f"{module} is {list(entry.shape)} and {list(other.shape)} in the base: it is not the base")
    return len(entry.shape) == 2 and not embedding


def _is_conv1d(model: Base, module: str) -> bool:
    return model.config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LAYERS


def _carried(tuned: Base, found: Difference) -> dict[str, Tensor]:
    """Saved modules and biases under the names that PEFT gives them."""
    adapted = {name.removesuffix(".weight") for name in found.low_rank}
    carried = {}
    for name in tuned.entries:
        module = name.rpartition(".")[0]
        if any(module == saved or module.startswith(f"{saved}.") for saved in found.saved):
            carried[PREFIX + name] = _stored(tuned, name)
        elif name in found.biases:
            inside = f"{module}.base_layer.bias" if module in adapted else name
            carried[PREFIX + inside] = _stored(tuned, name)
    return carried


def _tied_head(tuned: Base, found: Difference) -> dict[str, Tensor]:
    """A saved embedding once more as the output layer, where both are one tensor; PEFT ties its copies.

    Raises:
        InputError: an architecture whose output layer is not known by its name.
    """
    embeddings = [name for name in found.saved if name.rpartition(".")[2] in EMBEDDINGS]
    architectures = [str(name) for name in tuned.config.get("architectures") or []]
    tied = tuned.config.get("tie_word_embeddings") and f"{HEAD}.weight" not in tuned.entries
    if not embeddings or not tied or not any(word in name for name in architectures for word in WITH_A_HEAD):
        return {}
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputError(
            f"{embeddings[0]} changed and is tied to an output layer whose name is not certain: untie them in both "
            "models (save them with tie_word_embeddings=False and both weights)"
        )
    return {f"{PREFIX}{HEAD}.weight": _stored(tuned, f"{embeddings[0]}.weight")}


def _task(model: Base) -> str | None:
    architectures = [str(name) for name in model.config.get("architectures") or []]
    return next((task for end, task in TASKS.items() if any(name.endswith(end) for name in architectures)), None)


def _config(tuned: Base, found: Difference, base: str | Path) -> dict[str, Any]:
    return {
        "base_model_name_or_path": str(base),
        "task_type": _task(tuned),
        "bias": "all" if found.biases else "none",
        "modules_to_save": list(found.saved) or None,
        "fan_in_fan_out": any(_is_conv1d(tuned, name.removesuffix(".weight")) for name in found.low_rank),
        "ensure_weight_tying": bool(_tied_head(tuned, found)),
    }


def _entry(model: Base, name: str) -> tuple[Path, Entry]:
    shard = next(shard for shard in model.shards.values() if name in shard.entries)
    return shard.path, shard.entries[name]


def _numbers(model: Base, name: str) -> "np.ndarray[Any, Any]":
    """A tensor's numbers as they are stored (`STORED`), flat.

    Raises:
        InputError: it is quantised.
    """
    path, entry = _entry(model, name)
    if entry.dtype not in FLOATS:
        raise InputError(f"{name} of {model.directory} is stored as {entry.dtype}, which is no plain float")
    raw = np.empty((entry.stop - entry.start) // STORED[entry.dtype].itemsize, STORED[entry.dtype])
    with open(path, "rb") as file:
        fill(file.fileno(), raw, entry.start)
    return raw


def _matrix(model: Base, name: str) -> Tensor:
    """A tensor in float64."""
    _, entry = _entry(model, name)
    values = np.empty(entry.shape, np.float64)
    widen(_numbers(model, name).reshape(entry.shape), entry.dtype, values, np.empty(entry.shape, np.uint32))
    return torch.from_numpy(values)


def _stored(model: Base, name: str) -> Tensor:
    """A tensor as it is stored."""
    _, entry = _entry(model, name)
    raw = torch.from_numpy(_numbers(model, name))
    return (raw.view(torch.bfloat16) if entry.dtype == "BF16" else raw).reshape(entry.shape)


def _equal(tuned: Base, name: str, original: Base, other: str) -> bool:
    """Whether two tensors hold the same numbers; one may be stored in a wider type."""
    (_, one), (_, two) = _entry(tuned, name), _entry(original, other)
    if one.shape != two.shape:
        return False
    if one.dtype == two.dtype and (
        one.dtype not in FLOATS or np.array_equal(_numbers(tuned, name), _numbers(original, other))
    ):
        return True  # also counters and masks, which no training changes
    return torch.equal(_matrix(tuned, name), _matrix(original, other))
