"""Which other tool wrote a file of LoRA tensors, by their names. `lorapack.convert` reads them."""

import re
from collections.abc import Collection
from typing import Literal

Foreign = Literal["kohya", "diffusers", "loralib", "cloneofsimo"]

CALLED: dict[Foreign, str] = {
    "kohya": "in kohya's form of the kohya/diffusers format",
    "diffusers": "in diffusers' form of the kohya/diffusers format",
    "loralib": "a loralib state dict",
    "cloneofsimo": "in the early Stable Diffusion format (cloneofsimo)",
}
_NAMES: dict[Foreign, re.Pattern[str]] = {
    "kohya": re.compile(r"^lora_(unet|transformer|te[123]?)_[^.]+\."),
    "diffusers": re.compile(r"^(unet|transformer|text_encoder(_[23])?|diffusion_model)\..*lora"),
    "loralib": re.compile(r"\.lora_[AB]$"),
    "cloneofsimo": re.compile(r"^(unet|text_encoder):\d+:(up|down)$"),
}


def foreign_format(names: Collection[str]) -> Foreign | None:
    """The format whose names these are; None where it is none of them."""
    for found, pattern in _NAMES.items():
        if any(pattern.search(name) for name in names):
            return found
    return None
