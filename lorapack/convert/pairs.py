"""Low-rank pairs with an alpha each, as other tools store them, and the adapter that they make."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Kind, Pointer
from lorapack.errors import InputError
from lorapack.read.adapter import pair


class Pair(NamedTuple):
    """One module's ``alpha / rank * up @ down``.

    Attributes:
        down: (rank, d_in); of a convolution (rank, channels_in, height, width).
        up: (d_out, rank); of a convolution (channels_out, rank, 1, 1).
        alpha: None for the rank, which is a scale of one.
        kind: an embedding cannot be told from a linear layer by its shapes.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    kind: Kind = "linear"


def adapter_of(pairs: Mapping[str, Pair], where: str, carried: Mapping[str, Tensor] = {}, **config: Any) -> Adapter:
    """The adapter of these pairs, by the module's name in the base model.

    Args:
        pairs: of all modules.
        where: the file, for messages.
        carried: other tensors, by PEFT's names.
        config: for `adapter_config.json`, beside ranks, alphas and targets.

    Raises:
        InputError: no pairs, factors that do not fit each other, numbers that are not finite.
    """
    if not pairs:
        raise InputError(f"{where} holds no LoRA tensors")
    pool, modules = {}, {}
    for module, (down, up, alpha, kind) in pairs.items():
        check_finite((down, up), f"{where}: {module}")
        names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
        pool[module] = pair(module, dict(zip(names, (down, up), strict=True)), where)
        modules[module] = Pointer(module, 1.0 if alpha is None else alpha / pool[module].rank)
        if not abs(modules[module].scale) < float("inf"):
            raise InputError(f"{where}: the alpha of {module} is {alpha}")
    return Adapter({"peft_type": "LORA", "task_type": None, "bias": "none"} | config, pool, modules, carried)


def alpha_of(adapter: Adapter, module: str) -> float:
    """The alpha that gives the module's scale in tools that divide it by the rank."""
    rank = adapter.factors(module).rank
    alpha = adapter.scale(module) * rank
    return float(round(alpha)) if abs(alpha - round(alpha)) <= 1e-12 * abs(alpha) else alpha


def check_finite(tensors: Iterable[Tensor], name: str) -> None:
    """Refuse NaN, infinite numbers, and tensors that are no floats.

    Raises:
        InputError: begins with `name`.
    """
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise InputError(f"{name} is stored as {tensor.dtype}; quantised adapters are not read")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds NaN or infinite numbers")


def refuse_carried(adapter: Adapter, what: str) -> None:
    """Refuse an adapter that brings more than low-rank pairs to a format that has no place for it.

    Raises:
        InputError: names the first tensor.
    """
    if adapter.carried:
        first = next(iter(adapter.carried))
        raise InputError(
            f"{first} (a saved module or a bias) has no place in {what}; merge the adapter into its base "
            "(`lorapack merge`) and convert that model instead"
        )
