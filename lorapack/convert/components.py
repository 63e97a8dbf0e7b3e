"""The models of a diffusion pipeline: each has an adapter of its own, and a prefix in a file for all of them."""

from collections.abc import Iterable, Mapping

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
Parts = Mapping[str, Adapter]  # component to its adapter

# how modules' names begin that no other component has
_BEGIN = {
    "transformer": ("transformer_blocks.", "single_transformer_blocks.", "context_embedder", "x_embedder"),
    "unet": ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding."),
    "text_encoder": ("text_model.", "encoder.layers.", "encoder.block.", "text_projection"),
}


def denoiser(modules: Iterable[str]) -> str:
    """Whether modules of what turns noise into an image are a transformer's; a UNet's otherwise."""
    return "transformer" if any(module.startswith(_BEGIN["transformer"]) for module in modules) else "unet"


def component(modules: Iterable[str]) -> str:
    """Which model of a pipeline modules are of, by their names; a text encoder is taken for the first.

    Raises:
        InputError: names a module that is of no diffusion pipeline.
    """
    names = list(modules)
    for found, beginnings in _BEGIN.items():
        if any(name.startswith(beginnings) for name in names):
            return found
    raise InputError(
        f"{names[0]} is of no UNet, diffusion transformer or text encoder of a diffusion pipeline: the kohya and "
        "diffusers formats are for those"
    )
