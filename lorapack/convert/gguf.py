"""llama.cpp's LoRA adapters in GGUF: the base's tensor names with ``.lora_a`` and ``.lora_b``, and one alpha for all.

Names come from the tensor map of the `gguf` package. What llama.cpp's own converter does to a base's weights must
be done to B here: the rows of query and key are put in the order of its rotary embedding.

Source: llama.cpp ``convert_lora_to_gguf.py``, ``conversion/llama.py`` (``LlamaModel.permute``),
``src/llama-adapter.cpp`` (scale = alpha / rank of each tensor, an alpha of zero is none; embeddings have A transposed).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lorapack.convert.pairs import alpha_of, check_finite, refuse_carried
from lorapack.core.adapter import Adapter, Factors
from lorapack.core.checked import parse_value
from lorapack.errors import InputError, OutputError

Output = Literal["float32", "float16"]

# model_type of transformers to gguf's architecture, of the models whose layers llama.cpp takes over as they are
ARCHITECTURES = {
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
PERMUTED = ("granite", "llama", "mistral", "olmo", "smollm3")  # of them, those with rows of q and k in another order
EMBEDDING = "token_embd.weight"
MOST = 1000  # layers or heads; the tensor map has an entry for each name of every layer
TIED_ENDS = (EMBEDDING, "output.weight")


@dataclass(frozen=True)
class ModelSettings:
    """What of a base's `config.json` names and orders its tensors."""

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool = True


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a GGUF LoRA file holds: architecture, alpha and arrays, by name."""

    architecture: str
    alpha: float
    arrays: Mapping[str, "np.ndarray[Any, Any]"]


def to_gguf(adapter: Adapter, config: Mapping[str, Any], where: str, dtype: Output = "float32") -> LoraFile:
    """The adapter as llama.cpp reads it.

    Its one alpha is that of most modules; where another one holds, B is scaled to make up for it.

    Args:
        adapter: of a causal language model.
        config: the base model's `config.json`.
        where: its path, for messages.
        dtype: of the arrays.

    Raises:
        InputError: an architecture or a module that llama.cpp does not take over as it is, saved modules, a tied
            embedding, a number that the type cannot hold.
    """
    names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}  # as GPT-2 calls them
    settings = parse_value(ModelSettings, {n: config.get(old) for n, old in names.items()} | dict(config), where)
    counts = (settings.num_hidden_layers, settings.num_attention_heads, settings.num_key_value_heads or 1)
    if min(counts) < 1 or max(counts) > MOST:
        raise InputError(f"{where}: {counts[0]} layers and {counts[1]} heads are those of no model")
    if settings.model_type not in ARCHITECTURES:
        raise InputError(
            f"{where}: a LoRA for model_type {settings.model_type!r} cannot be converted to GGUF; merge it into the "
            f"base and convert that with llama.cpp (known: {', '.join(ARCHITECTURES)})"
        )
    places = _places(adapter, settings, where)
    refuse_carried(adapter, "a GGUF LoRA")
    alphas = {module: alpha_of(adapter, module) for module in places}
    alpha = _alpha(alphas)
    arrays = {}
    for module, place in places.items():
        factors = adapter.factors(module)
        up = _permuted(factors, module, settings).double() * (alphas[module] / alpha)
        down = factors.A.double()
        arrays[f"{place}.lora_a"] = _array(down.T if place == EMBEDDING else down, dtype, module)
        arrays[f"{place}.lora_b"] = _array(up, dtype, module)
    return LoraFile(ARCHITECTURES[settings.model_type], alpha, arrays)


def write_gguf(found: LoraFile, path: Path) -> None:
    """Write the file and read it back.

    Raises:
        InputError: the `gguf` package is not installed.
        OutputError: what was read back differs.
    """
    gguf = _package()
    writer = gguf.GGUFWriter(path, found.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, found.alpha)
    for name, array in found.arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    there = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if there.keys() != found.arrays.keys() or not all(np.array_equal(there[n], a) for n, a in found.arrays.items()):
        raise OutputError(f"what was written to {path} reads back differently; nothing was kept. Check the disk")


def _places(adapter: Adapter, settings: ModelSettings, where: str) -> dict[str, str]:
    """For each module the name of its weight in GGUF.

    Raises:
        InputError: a convolution, a module that the map does not know, an end of the model that is tied to the other.
    """
    gguf = _package()
    architecture = ARCHITECTURES[settings.model_type]
    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, settings.num_hidden_layers)
    places = {}
    for module in adapter.modules:
        place = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if place is None or adapter.factors(module).kind == "conv":
            raise InputError(f"{module} is no layer that GGUF's tensor map of {architecture} knows")
        if place in TIED_ENDS and settings.tie_word_embeddings:
            raise InputError(
                f"{module} is tied to the model's other end ({where}: tie_word_embeddings), and llama.cpp would apply "
                "its LoRA to both; drop it from the adapter, or merge it into an untied base"
            )
        if (place == EMBEDDING) != (adapter.factors(module).kind == "embedding"):
            raise InputError(f"{module} has a LoRA of the kind {adapter.factors(module).kind}, which it is not")
        places[module] = place
    return places


def _alpha(alphas: Mapping[str, float]) -> float:
    """That of most modules; a one that float32 holds, and never zero, which llama.cpp takes for no alpha at all."""
    usual = [float(np.float32(alpha)) for alpha in alphas.values() if alpha]
    return Counter(usual).most_common(1)[0][0] if usual else 1.0


def _permuted(factors: Factors, module: str, settings: ModelSettings) -> Tensor:
    """B with each head's rows paired as llama.cpp rotates them: the halves of a head interleaved.

    Raises:
        InputError: rows that are no whole heads.
    """
    name = module.rpartition(".")[2]
    if settings.model_type not in PERMUTED or name not in ("q_proj", "k_proj"):
        return factors.B
    heads = settings.num_attention_heads
    if name == "k_proj":
        heads = settings.num_key_value_heads or heads
    rows, rank = factors.B.shape
    if rows % (2 * heads):
        raise InputError(f"{module} has {rows} rows, which are not {heads} heads: the base is not the adapter's")
    return factors.B.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _array(tensor: Tensor, dtype: Output, module: str) -> "np.ndarray[Any, Any]":
    made = tensor.to(torch.float32 if dtype == "float32" else torch.float16).contiguous()
    check_finite((made,), f"{module} has numbers too large for {dtype}: it")
    return made.numpy()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF needs the package gguf: pip install 'lorapack[gguf]'") from None
    return gguf
