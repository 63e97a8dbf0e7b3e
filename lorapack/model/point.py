"""Exchange the factors that a loaded model's LoRA layers use: a change of pointers, never a copy of the base."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorapack.core.adapter import Adapter
from lorapack.model.load import NAME, Loaded


@dataclass(frozen=True, eq=False)
class Placed:
    """An adapter's linear factors as parameters on the device: a group is one pair.

    Attributes:
        pairs: pool name to (A, B), float32.
        pointers: module to (pool name, scale).
    """

    pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    pointers: Mapping[str, tuple[str, float]]


def place(adapter: Adapter | None, device: torch.device, trainable: bool = False) -> Placed:
    """Copy an adapter's linear factors to the device; None is the base model without any."""
    if adapter is None:
        return Placed({}, {})

    def parameter(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device, torch.float32, copy=True), requires_grad=trainable)

    return Placed(
        {
            name: (parameter(factors.A), parameter(factors.B))
            for name, factors in adapter.pool.items()
            if factors.kind == "linear"
        },
        {m: (adapter.modules[m].factors, adapter.scale(m)) for m in adapter.linear},
    )


def point(loaded: Loaded, placed: Placed) -> None:
    """Let every linear LoRA layer use its factors of `placed`; a module it lacks adds nothing.

    The other parts of the checkpoint (saved modules, biases, embeddings) are left as attached: no
    method changes them.
    """
    for module, layer in loaded.layers.items():
        if not isinstance(layer.lora_A, nn.ModuleDict) or NAME not in layer.lora_A:
            continue
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        if not isinstance(a, nn.Linear):
            continue
        if module in placed.pointers:
            name, scale = placed.pointers[module]
            a.weight, b.weight = placed.pairs[name]
            layer.scaling[NAME] = scale
        else:
            a.weight = nn.Parameter(a.weight.new_zeros(0, a.weight.shape[1]), requires_grad=False)
            b.weight = nn.Parameter(b.weight.new_zeros(b.weight.shape[0], 0), requires_grad=False)
