"""Equal factors found again: the way back from an expanded adapter (`lorapack compact`)."""

from dataclasses import replace

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.core.names import module_type
from lorapack.errors import InputError


def share_equal(adapter: Adapter) -> Adapter:
    """The same updates, bit for bit, with each distinct pair of factors once.

    What only fills a place is left out: ranks that are zero in A and in B, and modules of which nothing remains.
    Pairs whose bytes and types are equal become one, and every module keeps its own scale. Factors that are
    shared, coded or seeded already stay as they are.

    Raises:
        InputError: the adapter holds nothing but zeros.
    """
    pool: dict[str, Factors] = {}
    alike: dict[tuple[object, ...], list[str]] = {}
    modules = dict(adapter.modules)
    groups = adapter.groups
    for module, pointer in adapter.modules.items():
        factors = adapter.pool[pointer.factors]
        if pointer.factors in groups or factors.codes is not None:
            pool[pointer.factors] = factors
            continue
        pool[module], modules[module] = _stripped(factors), Pointer(module, pointer.scale)
        alike.setdefault(_bytes(pool[module]), []).append(module)
    for members in alike.values():
        if pool[members[0]].rank == 0:
            for module in members:
                del pool[module], modules[module]
        elif len(members) > 1:
            name = f"shared.{module_type(members[0])}"
            while name in pool or name in adapter.pool:
                name += ".again"
            pool[name] = pool[members[0]]
            for module in members:
                del pool[module]
                modules[module] = Pointer(name, adapter.scale(module))
    if not modules:
        raise InputError("the adapter holds nothing but zeros")
    return adapter.with_pool(pool, modules)


def _stripped(factors: Factors) -> Factors:
    """Without the ranks that are zero on both sides."""
    used = factors.A.flatten(1).any(dim=1) | factors.B.transpose(0, 1).flatten(1).any(dim=1)
    return factors if used.all() else replace(factors, A=factors.A[used], B=factors.B[:, used])


def _bytes(factors: Factors) -> tuple[object, ...]:
    """Equal for equal pairs, and only for them."""

    def of(tensor: Tensor) -> tuple[object, ...]:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tensor.shape, raw

    return factors.kind, of(factors.A), of(factors.B)
