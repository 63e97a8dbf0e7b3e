"""Flux under the names of its original code (``double_blocks_0_img_attn_qkv``), in those of diffusers.

There the query, key and value projections are one layer, and a LoRA on it is one pair: its down factor serves
all of them, its up factor is cut into theirs. That is exact.
"""

import re
from collections.abc import Mapping

import torch

from lorapack.convert.pairs import Pair
from lorapack.errors import InputError

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_BLOCK = re.compile(r"^(?P<kind>double|single)_blocks_(?P<at>\d+)_(?P<rest>.+)$")


def is_flux(flat: str) -> bool:
    """Whether an underscored name is one of Flux's original code."""
    return bool(_BLOCK.match(flat)) or flat in _OUTSIDE


def diffusers_pairs(pairs: Mapping[str, Pair], where: str) -> dict[str, Pair]:
    """The pairs of Flux's own layers as those of diffusers' layers, by dotted names.

    Raises:
        InputError: a name that is none of Flux's, or an up factor that cannot be cut.
    """
    found: dict[str, Pair] = {}
    for flat, pair in pairs.items():
        match = _BLOCK.match(flat)
        if match:
            double = match["kind"] == "double"
            names = (_DOUBLE if double else _SINGLE).get(match["rest"], ())
            start = f"{'' if double else 'single_'}transformer_blocks.{match['at']}."
            found |= _cut(pair, [start + name for name in names], f"{where}: {flat}")
        elif flat in _OUTSIDE:
            found[_OUTSIDE[flat]] = _swapped(pair) if flat.startswith("final_layer_ada") else pair
        else:
            raise InputError(f"{where}: {flat} is no layer of Flux, and others in this file are")
    return found


def _cut(pair: Pair, names: list[str], where: str) -> dict[str, Pair]:
    """One pair for each name: the same down factor, and the up factor's rows in three equal parts and a rest."""
    if not names:
        raise InputError(f"{where} is no layer of Flux that diffusers has")
    if len(names) == 1:
        return {names[0]: pair}
    rows = pair.up.shape[0]
    width = rows // 3 if len(names) == 3 else pair.down.shape[1]  # of a single block the width is that of its input
    sizes = [width] * 3 + [rows - 3 * width] * (len(names) - 3)
    if min(sizes) < 1 or sum(sizes) != rows:
        raise InputError(f"{where}: {rows} rows are not query, key and value of equal width, and a rest for the MLP")
    ups = torch.split(pair.up, sizes)
    return {name: pair._replace(up=up.clone()) for name, up in zip(names, ups, strict=True)}


def _swapped(pair: Pair) -> Pair:
    """Flux has shift before scale in the last layer's modulation, diffusers scale before shift."""
    shift, scale = pair.up.chunk(2)
    return pair._replace(up=torch.cat([scale, shift]))
