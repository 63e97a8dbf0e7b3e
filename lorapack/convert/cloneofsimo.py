"""The early Stable Diffusion format (cloneofsimo): ``unet:17:up``, numbers in torch's order of the layers.

The names are those of Stable Diffusion 1's UNet and of its CLIP text encoder, whose order is known; every
pair must have the shape that its layer has, or the file is for another model.

Source: cloneofsimo/lora ``lora_diffusion/lora.py`` (linear layers inside CrossAttention and GEGLU, and inside
CLIPAttention; ``LoraInjectedLinear``: scale 1). diffusers registered ``mid_block`` after the others, and in a
transformer block attn1, ff, attn2; transformers registers k, v, q, out in CLIP's attention.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from lorapack.convert.pairs import Pair, adapter_of
from lorapack.core.adapter import Adapter
from lorapack.errors import InputError

_NAME = re.compile(r"^(?P<component>unet|text_encoder):(?P<at>\d+):(?P<half>up|down)$")
_CONTEXT, _TEXT_LAYERS = 768, 12
_WIDTHS = (320, 640, 1280)  # of the UNet's blocks, the outermost first
_MERGED_GATE = 8  # GEGLU has four times the width, twice


def from_cloneofsimo(tensors: Mapping[str, Tensor], where: str) -> dict[str, Adapter]:
    """The adapters of the UNet and the text encoder.

    Raises:
        InputError: another model's layers, a half without the other, embeddings of new tokens.
    """
    halves: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if not match:
            raise InputError(
                f"{where}: {name} is no LoRA pair (the embedding of a new token?), PEFT has no place for it"
            )
        halves.setdefault(match["component"], {}).setdefault(int(match["at"]), {})[match["half"]] = tensor
    shapes = {"unet": _unet(), "text_encoder": _text_encoder()}
    found = {}
    for component, layers in halves.items():
        expected = shapes[component]
        if sorted(layers) != list(range(len(expected))):
            raise InputError(
                f"{where}: the {component} has {len(layers)} layers with a LoRA, that of Stable Diffusion 1 has "
                f"{len(expected)}: which layers these are is not certain"
            )
        pairs = {}
        for at, (module, shape) in enumerate(expected.items()):
            if layers[at].keys() != {"up", "down"}:
                raise InputError(f"{where}: {component}:{at} has only one half; the file is not complete")
            down, up = layers[at]["down"], layers[at]["up"]
            if (up.shape[0], down.shape[-1]) != shape:
                raise InputError(
                    f"{where}: {component}:{at} is {up.shape[0]}x{down.shape[-1]}, {module} of Stable Diffusion 1 is "
                    f"{shape[0]}x{shape[1]}: the file is for another model"
                )
            pairs[module] = Pair(down, up)
        found[component] = adapter_of(pairs, where)
    return found


def _unet() -> dict[str, tuple[int, int]]:
    """The layers of Stable Diffusion 1's UNet in the order of the numbers, each with its (d_out, d_in)."""
    blocks = [(f"down_blocks.{n}.attentions.{m}", _WIDTHS[n]) for n in (0, 1, 2) for m in (0, 1)]
    blocks += [(f"up_blocks.{n}.attentions.{m}", _WIDTHS[3 - n]) for n in (1, 2, 3) for m in (0, 1, 2)]
    blocks += [("mid_block.attentions.0", _WIDTHS[2])]
    found = {}
    for name, width in blocks:
        block = f"{name}.transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", _CONTEXT)):
            if attention == "attn2":
                found[f"{block}.ff.net.0.proj"] = (_MERGED_GATE * width, width)
            found[f"{block}.{attention}.to_q"] = (width, width)
            found[f"{block}.{attention}.to_k"] = (width, context)
            found[f"{block}.{attention}.to_v"] = (width, context)
            found[f"{block}.{attention}.to_out.0"] = (width, width)
    return found


def _text_encoder() -> dict[str, tuple[int, int]]:
    """The same of its text encoder."""
    return {
        f"text_model.encoder.layers.{layer}.self_attn.{part}": (_CONTEXT, _CONTEXT)
        for layer in range(_TEXT_LAYERS)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj")
    }
