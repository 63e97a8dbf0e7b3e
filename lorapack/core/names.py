"""Module names: their natural order, and the type a module belongs to.

A *module* is a layer the adapter acts on, named as in the base model
(``model.layers.3.self_attn.q_proj``). Its *type* is the name with every numbered component taken
out (``model.layers.self_attn.q_proj``), so attention's and the MLP's ``c_proj`` stay apart, and so
do an encoder's and a decoder's layers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

PREFIX = "base_model.model."  # what PEFT puts before a module's name in a checkpoint
LORA = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.weight)?$"
)  # a factor's name in a checkpoint
MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # on the Hub; also without an owner, such as gpt2

_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight", "classifier.dense.weight")


def order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 9 before layer 10, and lower layers first."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in module.split("."))


def module_type(module: str) -> str:
    """The name without its numbered components: equal for the same layer kind at every depth."""
    return ".".join(part for part in module.split(".") if not part.isdigit())


def by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module type to its modules, in the order given."""
    types: dict[str, list[str]] = {}
    for module in modules:
        types.setdefault(module_type(module), []).append(module)
    return types


def short_types(modules: list[str]) -> dict[str, str]:
    """For each module type among `modules`, its shortest ending that no other type shares."""
    types = sorted({module_type(m) for m in modules})
    endings = {t: [".".join(t.split(".")[-n:]) for n in range(1, t.count(".") + 2)] for t in types}
    short = {}
    for t in types:
        others = {ending for other in types if other != t for ending in endings[other]}
        short[t] = next((ending for ending in endings[t] if ending not in others), t)
    return short


class Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def head_classes(carried: Mapping[str, Shaped]) -> int | None:
    """How many outputs the classification head has that is saved among an adapter's tensors; None for no head."""
    heads = [t.shape for name, t in carried.items() if name.endswith(_HEADS) and len(t.shape) == 2]
    return min((int(shape[0]) for shape in heads), default=None)
