"""What is known of a graph: its weights, while they are inputs of a traced one, and where it takes an adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

_KEY = "lorapack.weights"


@dataclass(frozen=True)
class Weight:
    """An input of a traced graph that is to become an initializer.

    Attributes:
        names: the model's names for it, the initializer's first; a tied one has several.
        transposed: the graph wants the transpose of what a checkpoint holds.
    """

    names: list[str]
    transposed: bool


@dataclass(frozen=True)
class Slot:
    """The inputs of one module.

    Attributes:
        factors: the stem of its factors' inputs, ``<factors>.lora_A`` and ``<factors>.lora_B``.
        shared: whether other modules have the same. Then what is the module's own has inputs too:
        core: ``diagonal`` or ``full``, where there is a ``<module>.lora_core`` between the factors.
        output: whether there is a ``<module>.lora_output`` on the outputs.
    """

    factors: str
    shared: bool = False
    core: str | None = None
    output: bool = False

    @property
    def scaled(self) -> bool:
        """Whether a ``<module>.lora_scale`` holds what elsewhere is in a tensor of the module's own."""
        return self.shared and not (self.core or self.output)


def weights(model: ir.Model) -> dict[str, Weight]:
    """The weights of a traced graph, by the name of its input."""
    return {name: Weight(**value) for name, value in json.loads(model.metadata_props[_KEY]).items()}


def record(model: ir.Model, found: Mapping[str, Weight]) -> None:
    """Note what the weights of a traced graph are."""
    model.metadata_props[_KEY] = json.dumps({name: vars(weight) for name, weight in found.items()})


def forget(model: ir.Model) -> None:
    """Take the note away: the weights are there."""
    del model.metadata_props[_KEY]
