"""A Llama from the disk as GGUF in float32; with invented words: token ids in, token ids out."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file


def write_base(directory: Path, path: Path) -> Path:
    """Write `path` as llama.cpp's own converter would, but for the tokenizer."""
    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    words = [f"<0x{n:02X}>" if n < 256 else f"word{n}" for n in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        count = heads if "q_proj" in name else kv_heads if "k_proj" in name else 0
        values = interleaved(tensor.float(), count) if count else tensor.float()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's rows 0, 1, 2, … as 0, half, 1, half + 1, …: transformers rotates halves, llama.cpp neighbours."""
    size = weight.shape[0] // heads
    order = torch.arange(size).reshape(2, size // 2).T.reshape(-1)
    return torch.cat([head[order] for head in weight.split(size)]).contiguous()
