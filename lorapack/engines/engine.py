"""What a serving engine is to `lorapack expand`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.core.checked import parse_value
from lorapack.errors import InputError

LARGEST = 1_000_000  # more layers, heads or channels has no model


@dataclass(frozen=True)
class Base:
    """What an engine's rule may want to know of the base model, as its `config.json` names it; 0 where it does not."""

    num_hidden_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = 0
    head_dim: int | None = 0


def base_of(config: Mapping[str, Any], where: str) -> Base:
    """The facts of a `config.json`, of its text model where it has several.

    Raises:
        InputError: a field of another type or out of all proportion; names it.
    """
    text = config.get("text_config")
    found = parse_value(Base, text if isinstance(text, Mapping) else config, where)
    for name, value in vars(found).items():
        if not 0 <= (value or 0) <= LARGEST:
            raise InputError(f"{where}: {name} is {value}")
    return found


AskBase = Callable[[], Base]
"""Gives the base model's facts, or refuses where there is none. Asked where the adapter does not say enough."""
Scales = Callable[[str, int], float]
"""What an engine multiplies B @ A with, of the module and the rank of its tensors."""


@dataclass(frozen=True)
class Engine:
    """How an engine reads a PEFT directory, and what has to stand in it so that it computes the adapter.

    Attributes:
        title: its own name.
        version: the release whose sources the rules were read from.
        sources: those files of it.
        arrange: the adapter as this engine has to be given it. It gets one private pair a module; raises
            `InputError` where the engine cannot compute it, naming the module or tensor.
        scales: what the engine makes of the written configuration.
        serve: how the arranged adapter in a directory is loaded; one line for the user.
    """

    title: str
    version: str
    sources: tuple[str, ...]
    arrange: Callable[[Adapter, AskBase], Adapter]
    scales: Callable[[Mapping[str, Any]], Scales]
    serve: Callable[[Adapter, str], str]
