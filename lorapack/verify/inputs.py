"""Sample inputs for a model of any kind: rows of the user's, or numbers drawn with a seed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorapack.data.prepare import Reader, prepare_evaluation
from lorapack.errors import InputError

ROWS = 4
LENGTH = 48  # tokens a row
DECODED = 12  # tokens of an encoder-decoder's second input
EDGE = 64  # of a picture, where the configuration names none
SOUND = 8000  # samples of a wave form

Inputs = dict[str, Tensor]


def drawn(model: Any, seed: int) -> list[Inputs]:
    """`ROWS` inputs of one row each: token ids, pictures, spectra or sound, whatever the model's main input is.

    Args:
        model: transformers' model.
        seed: the same seed draws the same inputs for models of the same configuration.

    Raises:
        InputError: the model's main input is none of these.
    """
    generator = torch.Generator().manual_seed(seed)
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        length = min(LENGTH, getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH)
        rows = [_ids(model, length - 2, generator) for _ in range(ROWS)]
    elif name in _SHAPES:
        shape = _SHAPES[name](getattr(config, "vision_config", config))
        rows = [torch.randn(shape, generator=generator) for _ in range(ROWS)]
    else:
        raise InputError(f"verify makes no sample inputs for {type(model).__name__}, whose main input is {name}")
    return [{name: row} | _decoded(model, generator) for row in rows]


def given(model: Any, tokenizer: Any, data: str, columns: Mapping[str, str] | None, seed: int) -> list[Inputs]:
    """The first `ROWS` usable rows of some data, at most `LENGTH` tokens of each.

    Args:
        model: transformers' model, one that reads text.
        tokenizer: its tokenizer.
        data, columns: see `lorapack.data.rows.read_rows`.
        seed: of what an encoder-decoder is given to decode.

    Raises:
        InputError: the data cannot be used, or the model does not read text.
    """
    if model.main_input_name != "input_ids":
        raise InputError(f"--data: {type(model).__name__} does not read text; leave --data out for drawn inputs")
    generator = torch.Generator().manual_seed(seed)
    classifies = "SequenceClassification" in type(model).__name__
    reader = Reader(
        tokenizer,
        longest=LENGTH,
        classes=int(model.config.num_labels) if classifies else None,
        label_ids={str(name): int(n) for name, n in (model.config.label2id or {}).items()},
        vocabulary=model.get_input_embeddings().num_embeddings,
    )
    rows, _ = prepare_evaluation(reader, data, columns)
    return [{"input_ids": torch.tensor([row.input_ids])} | _decoded(model, generator) for row in rows[:ROWS]]


def _ids(model: Any, length: int, generator: torch.Generator) -> Tensor:
    known = model.get_input_embeddings().num_embeddings
    return torch.randint(known, (1, length), generator=generator)


def _decoded(model: Any, generator: torch.Generator) -> Inputs:
    """What an encoder-decoder's second half is given."""
    if not model.config.is_encoder_decoder:
        return {}
    known = model.config.get_text_config(decoder=True).vocab_size
    return {"decoder_input_ids": torch.randint(known, (1, DECODED), generator=generator)}


def _picture(config: Any) -> tuple[int, ...]:
    edge = getattr(config, "image_size", None) or EDGE
    height, width = edge if isinstance(edge, (list, tuple)) else (edge, edge)
    return 1, getattr(config, "num_channels", 3), height, width


_SHAPES: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "pixel_values": _picture,
    "input_features": lambda config: (1, config.num_mel_bins, 2 * config.max_source_positions),
    "input_values": lambda config: (1, SOUND),
}
