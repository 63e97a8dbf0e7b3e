"""Dotted module names and the underscored ones of kohya's format, which lost where the dots were.

Back from ``down_blocks_0_attentions_0`` the names come, in this order, from the base model's files, from a list that
the file itself brings, or from the parts that the names of diffusion pipelines are made of. Whatever none of
them knows for certain is refused.
"""

from lorapack.errors import InputError

# The parts of module names in diffusers' UNets and transformers (SD, SDXL, SD3, Flux) and in CLIP and T5 text encoders.
_WITH_UNDERSCORE = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks"),
    *("to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj"),
    *("proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "conv_shortcut", "linear_1", "linear_2"),
    *("time_emb_proj", "time_embedding", "add_embedding", "time_text_embed", "timestep_embedder", "text_embedder"),
    *("guidance_embedder", "context_embedder", "x_embedder", "pos_embed", "ff_context", "norm1_context", "norm_out"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection"),
    *("wi_0", "wi_1"),
)
_WITHOUT = (
    *("attentions", "resnets", "downsamplers", "upsamplers", "attn", "attn1", "attn2", "ff", "net", "proj", "norm"),
    *("conv", "conv1", "conv2", "norm1", "norm2", "linear", "encoder", "layers", "layer", "block", "mlp", "fc1", "fc2"),
    *("SelfAttention", "DenseReluDense", "q", "k", "v", "o", "wi", "wo"),
)
_PARTS = {tuple(part.split("_")) for part in (*_WITH_UNDERSCORE, *_WITHOUT)}
_LONGEST = max(map(len, _PARTS))


def underscored(module: str) -> str:
    """``mid_block.attentions.0`` as ``mid_block_attentions_0``."""
    return module.replace(".", "_")


def dotted(flat: str, where: str) -> str:
    """``mid_block_attentions_0`` as ``mid_block.attentions.0``, by the parts that such names are made of.

    The longest part that fits is taken: no part is another one followed by a number or a third one, in an order
    in which any of these models has them.

    Raises:
        InputError: a word that is none of them.
    """
    words = flat.split("_")
    parts = []
    while words:
        for length in range(min(_LONGEST, len(words)), 0, -1):
            if tuple(words[:length]) in _PARTS or (length == 1 and words[0].isdigit()):
                break
        else:
            raise InputError(
                f"{where}: where the dots belong in {flat!r} is not certain; name the model that it is for with --base"
            )
        parts.append("_".join(words[:length]))
        words = words[length:]
    return ".".join(parts)
