"""An adapter: a pool of low-rank factors, and a pointer into the pool for every module.

Sharing is two pointers to the same factors; an uncompressed adapter has one pool entry a module.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.codes import Codes
from lorapack.core.names import order
from lorapack.errors import InputError

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True, eq=False)
class Factors:
    """One low-rank pair: the update is ``scale * B @ A``, the scale held by the pointer.

    Attributes:
        A: (rank, d_in); for ``conv`` (rank, channels_in, height, width).
        B: (d_out, rank); for ``conv`` (channels_out, rank, 1, 1).
        kind: the layer it acts on. Only ``linear`` pairs are compressed, the others are carried.
        codes: where it is stored in few bits, how; A and B are then exactly `Codes.values`.
    """

    A: Tensor
    B: Tensor
    kind: Kind = "linear"
    codes: Codes | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the update."""
        return self.B.shape[0], self.A[0].numel() if self.rank else self.A.shape[1]

    @property
    def parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    @property
    def nbytes(self) -> int:
        """As stored: of the codes and scales, where there are some."""
        if self.codes is not None:
            return self.codes.nbytes
        return self.A.numel() * self.A.element_size() + self.B.numel() * self.B.element_size()


def decoded(codes: Codes) -> Factors:
    """The linear pair that the codes stand for, in float32."""
    a, b = codes.values()
    return Factors(a, b, codes=codes)


@dataclass(frozen=True)
class Pointer:
    """Where a module finds its factors, and the factor its update is multiplied with."""

    factors: str
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA checkpoint in memory. Immutable: every step returns a new one.

    Attributes:
        config: PEFT's ``adapter_config.json``, as read.
        pool: the factors, by name. A private pair carries its module's name.
        modules: for each module (named as in the base model) its pointer, lower layers first.
        carried: all other tensors (saved modules, biases, embeddings), by their name in the file.
            They are never changed.

    Raises:
        InputError: a pointer leads nowhere, or factors that no module points to.
    """

    config: Mapping[str, Any]
    pool: Mapping[str, Factors]
    modules: Mapping[str, Pointer]
    carried: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        used = {pointer.factors for pointer in self.modules.values()}
        for module, pointer in self.modules.items():
            if pointer.factors not in self.pool:
                raise InputError(f"{module} points to the shared adapter {pointer.factors!r}, which is not there")
        for name in self.pool:
            if name not in used:
                raise InputError(f"the factors {name!r} belong to no module")
        ordered = dict(sorted(self.modules.items(), key=lambda item: order(item[0])))
        object.__setattr__(self, "modules", ordered)

    def factors(self, module: str) -> Factors:
        return self.pool[self.modules[module].factors]

    def scale(self, module: str) -> float:
        return self.modules[module].scale

    @property
    def linear(self) -> list[str]:
        """The modules that can be compressed, lower layers first."""
        return [module for module in self.modules if self.factors(module).kind == "linear"]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The shared factors: pool name to the modules that point to it, where more than one does."""
        members: dict[str, list[str]] = {}
        for module, pointer in self.modules.items():
            members.setdefault(pointer.factors, []).append(module)
        return {name: modules for name, modules in members.items() if len(modules) > 1}

    @property
    def base_model(self) -> str | None:
        """The base model's id or path, as the checkpoint names it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def task_type(self) -> str | None:
        return self.config.get("task_type") or None

    def with_pool(self, pool: Mapping[str, Factors], modules: Mapping[str, Pointer]) -> "Adapter":
        return replace(self, pool=pool, modules=modules)


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of an adapter's tensors, low-rank factors and carried ones apart.

    Attributes:
        modules: how many modules the adapter acts on.
        factors: how many distinct pairs of factors serve them.
        parameters, bytes: of the distinct low-rank factors of linear layers.
        carried_parameters, carried_bytes: of everything else in the file (saved modules, biases,
            embedding and convolution pairs), which compression leaves alone.
    """

    modules: int
    factors: int
    parameters: int
    bytes: int
    carried_parameters: int
    carried_bytes: int


def size(adapter: Adapter) -> Size:
    linear = [f for f in adapter.pool.values() if f.kind == "linear"]
    other = [f for f in adapter.pool.values() if f.kind != "linear"]
    return Size(
        modules=len(adapter.linear),
        factors=len(linear),
        parameters=sum(f.parameters for f in linear),
        bytes=sum(f.nbytes for f in linear),
        carried_parameters=sum(f.parameters for f in other) + sum(t.numel() for t in adapter.carried.values()),
        carried_bytes=sum(f.nbytes for f in other)
        + sum(t.numel() * t.element_size() for t in adapter.carried.values()),
    )


def digest(adapter: Adapter) -> str:
    """SHA-256 over every module's pointer and every tensor's bytes: equal adapters, equal digests."""
    state = hashlib.sha256()
    for module, pointer in adapter.modules.items():
        state.update(json.dumps([module, pointer.factors, pointer.scale]).encode())
    for name in sorted(adapter.pool):
        for tensor in (adapter.pool[name].A, adapter.pool[name].B):
            _feed(state, name, tensor)
    for name in sorted(adapter.carried):
        _feed(state, name, adapter.carried[name])
    return state.hexdigest()


def _feed(state: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
