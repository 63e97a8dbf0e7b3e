"""The serving engines' rules. To add one: a file beside this, its name here, and its row in docs/engines.md."""

from importlib import import_module
from typing import TYPE_CHECKING

from lorapack.errors import InputError

if TYPE_CHECKING:
    from lorapack.engines.engine import Engine

NAMES = ("peft", "vllm", "sglang", "tgi", "llama.cpp")


def rules(name: str) -> "Engine":
    """The rules of an engine.

    Raises:
        InputError: there is none of this name.
    """
    if name not in NAMES:
        raise InputError(f"the engine {name!r} is none of {', '.join(NAMES)}")
    found: Engine = import_module(f"{__name__}.{name.replace('.', '_')}").ENGINE
    return found
