"""An adapter: a pool of low-rank factors, and a pointer into the pool for every module.

Sharing is two pointers to the same factors; an uncompressed adapter has one pool entry a module. What a
layer has of its own beside shared factors (a core between them, a vector on its outputs) is in its pointer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorapack.core.codes import Codes, Sparse
from lorapack.core.names import order
from lorapack.core.sharing import CoreKind
from lorapack.errors import InputError

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True, eq=False)
class Factors:
    """One low-rank pair: the update is ``scale * B @ A``, the scale held by the pointer.

    Attributes:
        A: (rank, d_in); for ``conv`` (rank, channels_in, height, width).
        B: (d_out, rank); for ``conv`` (channels_out, rank, 1, 1).
        kind: the layer it acts on. Only ``linear`` pairs are compressed, the others are carried.
        codes: where it is stored in few bits or few elements, how; A and B are then exactly `Codes.values`.
        seed: where A and B are those of `lorapack.core.seeded.seeded`: such a pair is not stored, and
            counts nothing.
    """

    A: Tensor
    B: Tensor
    kind: Kind = "linear"
    codes: Codes | Sparse | None = None
    seed: int | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the update."""
        return self.B.shape[0], self.A[0].numel() if self.rank else self.A.shape[1]

    @property
    def parameters(self) -> int:
        if isinstance(self.codes, Sparse):
            return self.codes.parameters
        return 0 if self.seed is not None else self.A.numel() + self.B.numel()

    @property
    def nbytes(self) -> int:
        """As stored: of the codes and scales, where there are some."""
        if self.seed is not None:
            return 0
        if self.codes is not None:
            return self.codes.nbytes
        return self.A.numel() * self.A.element_size() + self.B.numel() * self.B.element_size()


def decoded(codes: Codes | Sparse) -> Factors:
    """The linear pair that the codes stand for, in float32."""
    a, b = codes.values()
    return Factors(a, b, codes=codes)


@dataclass(frozen=True, eq=False)
class Pointer:
    """Where a module finds its factors, and what its update is made of beside them.

    The update is ``scale * diag(output) @ B @ K @ A``, with K the core.

    Attributes:
        factors: a key of the pool.
        scale: the number the update is multiplied with.
        core: None for the identity, (rank,) a diagonal, or (rank, rank).
        output: None for ones, or (d_out,).
    """

    factors: str
    scale: float
    core: Tensor | None = None
    output: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        def same(one: Tensor | None, two: Tensor | None) -> bool:
            return one is two or (one is not None and two is not None and torch.equal(one, two))

        return (
            isinstance(other, Pointer)
            and (self.factors, self.scale) == (other.factors, other.scale)
            and same(self.core, other.core)
            and same(self.output, other.output)
        )

    def __hash__(self) -> int:
        return hash((self.factors, self.scale))

    @property
    def own(self) -> tuple[Tensor, ...]:
        """The tensors that this module has for itself."""
        return tuple(t for t in (self.core, self.output) if t is not None)

    @property
    def form(self) -> tuple[CoreKind | None, bool]:
        """The kind of core, and whether there is an output vector."""
        kind: CoreKind | None = None if self.core is None else "diagonal" if self.core.ndim == 1 else "full"
        return kind, self.output is not None


def fold(factors: Factors, pointer: Pointer) -> Factors:
    """The plain pair whose product is ``diag(output) @ B @ K @ A``; the pair itself where there is neither.

    Args:
        factors: A (rank, d_in), B (d_out, rank).
        pointer: of a module that uses them.
    """
    if not pointer.own:
        return factors
    a, b = factors.A, factors.B
    if pointer.core is not None:
        core = pointer.core.double()
        a = (core @ a.double() if core.ndim == 2 else core[:, None] * a.double()).to(a.dtype)
    if pointer.output is not None:
        b = (pointer.output.double()[:, None] * b.double()).to(b.dtype)
    return Factors(a, b, factors.kind)


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
            _check_own(module, pointer, self.pool[pointer.factors])
        forms: dict[str, tuple[CoreKind | None, bool]] = {}
        for module, pointer in self.modules.items():
            if forms.setdefault(pointer.factors, pointer.form) != pointer.form:
                raise InputError(f"{module} has another kind of core or output vector than others of its group")
        for name in self.pool:
            if name not in used:
                raise InputError(f"the factors {name!r} belong to no module")
        ordered = dict(sorted(self.modules.items(), key=lambda item: order(item[0])))
        object.__setattr__(self, "modules", ordered)

    def factors(self, module: str) -> Factors:
        """The plain pair of a module, whatever it has of its own folded in (`fold`); the scale is apart."""
        pointer = self.modules[module]
        return fold(self.pool[pointer.factors], pointer)

    def scale(self, module: str) -> float:
        return self.modules[module].scale

    @property
    def linear(self) -> list[str]:
        """The modules that can be compressed, lower layers first."""
        return [module for module, pointer in self.modules.items() if self.pool[pointer.factors].kind == "linear"]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Pool name to the modules that point to it, where plain LoRA could not say it.

        That is where more than one does, where they have a core or an output vector, or where the
        factors are seeded.
        """
        members: dict[str, list[str]] = {}
        for module, pointer in self.modules.items():
            members.setdefault(pointer.factors, []).append(module)
        return {
            name: modules
            for name, modules in members.items()
            if len(modules) > 1 or self.modules[modules[0]].own or self.pool[name].seed is not None
        }

    @property
    def base_model(self) -> str | None:
        """The base model's id or path, as the checkpoint names it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def task_type(self) -> str | None:
        return self.config.get("task_type") or None

    def free_name(self, name: str) -> str:
        """A name for a new group: the one given, or a longer one where the pool of a compact adapter has it."""
        while name in self.pool:
            name += ".again"
        return name

    def with_pool(self, pool: Mapping[str, Factors], modules: Mapping[str, Pointer]) -> "Adapter":
        return replace(self, pool=pool, modules=modules)


def _check_own(module: str, pointer: Pointer, factors: Factors) -> None:
    """Refuse a core or an output vector that does not fit the factors.

    Raises:
        InputError: names the module and both shapes.
    """
    rank, (d_out, _) = factors.rank, factors.shape
    for name, tensor, wanted in (
        ("core", pointer.core, ((rank,), (rank, rank))),
        ("output vector", pointer.output, ((d_out,),)),
    ):
        if tensor is not None and tuple(tensor.shape) not in wanted:
            shapes = " or ".join(map(str, wanted))
            raise InputError(f"the {name} of {module} has the shape {tuple(tensor.shape)}, expected {shapes}")
    if pointer.own and factors.kind != "linear":
        raise InputError(f"{module} is a layer of kind {factors.kind} and has a core or an output vector")


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of an adapter's tensors, low-rank factors and carried ones apart.

    Attributes:
        modules: how many modules the adapter acts on.
        factors: how many distinct pairs of factors serve them.
        parameters, bytes: of the distinct low-rank factors of linear layers, seeded ones aside, and of
            their cores and output vectors.
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
    own = [t for pointer in adapter.modules.values() for t in pointer.own]
    return Size(
        modules=len(adapter.linear),
        factors=len(linear),
        parameters=sum(f.parameters for f in linear) + sum(t.numel() for t in own),
        bytes=sum(f.nbytes for f in linear) + sum(t.numel() * t.element_size() for t in own),
        carried_parameters=sum(f.parameters for f in other) + sum(t.numel() for t in adapter.carried.values()),
        carried_bytes=sum(f.nbytes for f in other)
        + sum(t.numel() * t.element_size() for t in adapter.carried.values()),
    )


def digest(adapter: Adapter) -> str:
    """SHA-256 over every module's pointer and every tensor's bytes: equal adapters, equal digests.

    Of a scale it knows what float32 holds: a checkpoint says it as alpha, and alpha over the rank (over its root with
    rsLoRA) need not be the same number to the last bit.
    """
    state = hashlib.sha256()
    for module, pointer in adapter.modules.items():
        scale = torch.tensor(pointer.scale, dtype=torch.float32).item() + 0.0  # no -0.0
        state.update(json.dumps([module, pointer.factors, scale]).encode())
    for name in sorted(adapter.pool):
        for tensor in (adapter.pool[name].A, adapter.pool[name].B):
            _feed(state, name, tensor)
        if adapter.pool[name].seed is not None:
            state.update(json.dumps([name, adapter.pool[name].seed]).encode())
    for module, pointer in adapter.modules.items():
        for part, own in (("core", pointer.core), ("output", pointer.output)):
            if own is not None:
                _feed(state, f"{module} {part}", own)
    for name in sorted(adapter.carried):
        _feed(state, name, adapter.carried[name])
    return state.hexdigest()


def _feed(state: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
