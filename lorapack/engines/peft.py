"""PEFT itself, and whatever reads adapters through it.

A scale for each module, ``alpha_pattern / rank_pattern`` or over the root of the rank with rsLoRA; a key of a
pattern matches the end of a name, and the first that does counts. Any rank; a module that is not named in
``target_modules`` has no LoRA; saved modules, biases, embeddings and convolutions are read.
"""

from collections.abc import Mapping
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.engines.engine import AskBase, Engine, Scales
from lorapack.read.config import check_config
from lorapack.read.files import CONFIG


def arrange(adapter: Adapter, base: AskBase) -> Adapter:
    return adapter


def scales(config: Mapping[str, Any]) -> Scales:
    return check_config(config, CONFIG).scale


ENGINE = Engine(
    title="PEFT",
    version="0.21.2",
    sources=("peft/tuners/lora/config.py", "peft/tuners/lora/model.py", "peft/utils/other.py"),
    arrange=arrange,
    scales=scales,
    serve=lambda adapter, out: f'PeftModel.from_pretrained(base, "{out}")',
)
