"""Exchange the factors that a loaded model's LoRA layers use: a change of pointers, never a copy of the base."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.model.load import NAME, Loaded


@dataclass(frozen=True, eq=False)
class Placed:
    """An adapter's linear factors as parameters on the device: a group is one pair.

    Attributes:
        pairs: pool name to (A, B), float32.
        pointers: module to (pool name, scale).
        own: module to its core and output vector, float32, for modules that have one of them.
        frozen: pool names of seeded pairs, which nothing trains.
    """

    pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    pointers: Mapping[str, tuple[str, float]]
    own: Mapping[str, tuple[nn.Parameter | None, nn.Parameter | None]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    def trained(self) -> dict[tuple[str, str], nn.Parameter]:
        """What can be trained, by the name of the pair or the module and of the part."""
        found: dict[tuple[str, str], nn.Parameter] = {}
        for name, (a, b) in self.pairs.items():
            if name not in self.frozen:
                found |= {(name, "A"): a, (name, "B"): b}
        for module, (core, output) in self.own.items():
            found |= {(module, part): p for part, p in (("core", core), ("output", output)) if p is not None}
        return found


def place(adapter: Adapter | None, device: torch.device, trainable: bool = False) -> Placed:
    """Copy an adapter's linear factors to the device; None is the base model without any."""
    if adapter is None:
        return Placed({}, {})

    def parameter(tensor: Tensor, train: bool = True) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device, torch.float32, copy=True), requires_grad=trainable and train)

    def own(pointer: Pointer) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        core, output = (None if t is None else parameter(t) for t in (pointer.core, pointer.output))
        return core, output

    return Placed(
        {
            name: (parameter(factors.A, factors.seed is None), parameter(factors.B, factors.seed is None))
            for name, factors in adapter.pool.items()
            if factors.kind == "linear"
        },
        {m: (adapter.modules[m].factors, adapter.scale(m)) for m in adapter.linear},
        {m: own(adapter.modules[m]) for m in adapter.linear if adapter.modules[m].own},
        frozenset(name for name, factors in adapter.pool.items() if factors.seed is not None),
    )


def taken(adapter: Adapter, placed: Placed) -> Adapter:
    """The adapter with the values that `place` put on the device and something has trained, in its dtypes."""

    def value(found: Tensor, like: Tensor) -> Tensor:
        return found.detach().cpu().to(like.dtype)

    pool, modules = dict(adapter.pool), dict(adapter.modules)
    for name, (a, b) in placed.pairs.items():
        if name not in placed.frozen:
            pool[name] = Factors(value(a, pool[name].A), value(b, pool[name].B))
    for module, (core, output) in placed.own.items():
        old = modules[module]
        modules[module] = replace(
            old,
            core=None if core is None or old.core is None else value(core, old.core),
            output=None if output is None or old.output is None else value(output, old.output),
        )
    return adapter.with_pool(pool, modules)


def point(loaded: Loaded, placed: Placed) -> None:
    """Let every linear LoRA layer use its factors of `placed`; a module it lacks adds nothing.

    A layer with a core or an output vector gets the folded pair as it is now, part of the graph: point
    to it again after a step of training.

    The other parts of the checkpoint (saved modules, biases, embeddings) are left as attached: no
    method changes them.
    """
    for module, layer in loaded.layers.items():
        if not isinstance(layer.lora_A, nn.ModuleDict) or NAME not in layer.lora_A:
            continue
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        if not isinstance(a, nn.Linear):
            continue
        device = _where(layer)
        if module in placed.pointers:
            name, scale = placed.pointers[module]
            pair = _folded(*placed.pairs[name], *placed.own.get(module, (None, None)))
            _set(a, b, *(weight.to(device) for weight in pair))
            layer.scaling[NAME] = scale
        else:
            none = (torch.zeros(0, a.weight.shape[1]), torch.zeros(b.weight.shape[0], 0))
            _set(a, b, *(nn.Parameter(t.to(device), requires_grad=False) for t in none))


def _where(layer: Any) -> Any:
    """Where a layer computes: of a model that is split, accelerate's hooks know."""
    base = layer.get_base_layer()
    hook = getattr(base, "_hf_hook", None)
    return base.weight.device if hook is None else hook.execution_device


def _folded(a: Tensor, b: Tensor, core: Tensor | None, output: Tensor | None) -> tuple[Tensor, Tensor]:
    if core is not None:
        a = core @ a if core.ndim == 2 else core[:, None] * a
    return a, b if output is None else output[:, None] * b


def _set(a: nn.Linear, b: nn.Linear, *weights: Tensor) -> None:
    for layer, weight in zip((a, b), weights, strict=True):
        if not isinstance(weight, nn.Parameter):
            del layer.weight  # torch takes a parameter's name for a parameter only
        layer.weight = weight
