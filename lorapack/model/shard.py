"""Cut a base over several processes: each keeps its part of every layer, and has a layer whole only while it runs."""

from collections.abc import Collection

import torch
from torch import nn

from lorapack.errors import InputError
from lorapack.processes import count, in_a_row


def check_shardable() -> None:
    """Refuse before anything is loaded.

    Raises:
        InputError: there is one process.
    """
    if count() == 1:
        raise InputError("--device shard cuts the base over several processes: start them with torchrun")


def shard(attached: nn.Module, body: nn.Module, base: Collection[nn.Parameter], device: torch.device) -> None:
    """Cut the layers' own weights, in place; all else, LoRA factors too, stays whole in every process.

    What is cut are torch's own FSDP2 units, one a layer. The body is one without weights of its own: it lets the
    next layer be fetched while one computes.

    Args:
        attached: PEFT's model, frozen, on the CPU.
        body: of it, what is above all layers.
        base: the weights that are the base's, not the adapter's.
        device: where each process has what it keeps.

    Raises:
        InputError: no layers, or weights that are not plain ones.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--device shard: {type(body).__name__} has no layers that can be cut one by one")
    mesh = in_a_row(device.type)
    own = {parameter for layer in layers for parameter in layer.parameters()} & set(base)
    if any(type(p.data) is not torch.Tensor or not p.is_floating_point() for p in own):
        raise InputError("--device shard: the base is quantised, and only plain weights can be cut")
    ignored = set(attached.parameters()) - own
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(body, mesh=mesh, ignored_params=ignored)
    attached.to(device)
