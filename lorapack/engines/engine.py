"""What a serving engine is to `lorapack expand`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorapack.core.adapter import Adapter

BaseConfig = Callable[[], Mapping[str, Any]]
"""Gives the base model's `config.json`, or refuses where there is none. Asked where the adapter does not say enough."""
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
    arrange: Callable[[Adapter, BaseConfig], Adapter]
    scales: Callable[[Mapping[str, Any]], Scales]
    serve: Callable[[Adapter, str], str]
