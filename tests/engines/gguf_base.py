"""A Llama or GPT-2 from the disk as GGUF in float32; with invented words: token ids in, token ids out."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file


def write_base(directory: Path, path: Path) -> Path:
    """Write `path` as llama.cpp's own converter would, but for the tokenizer."""
    config = json.loads((directory / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    {"llama": _llama, "gpt2": _gpt2}[kind](writer, config)
    words = [f"<0x{n:02X}>" if n < 256 else f"word{n}" for n in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[kind], layers)
    for name, tensor in load_file(directory / "model.safetensors").items():
        values = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T.contiguous()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _llama(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _gpt2(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's rows 0, 1, 2, … as 0, half, 1, half + 1, …: transformers rotates halves, llama.cpp neighbours."""
    size = weight.shape[0] // heads
    order = torch.arange(size).reshape(2, size // 2).T.reshape(-1)
    return torch.cat([head[order] for head in weight.split(size)]).contiguous()
