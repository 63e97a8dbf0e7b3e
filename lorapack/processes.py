"""Several processes at one job, started by `torchrun -m lorapack …` or `accelerate launch` (docs/scale.md).

All of them run the same program on the same input and come to the same plan. The passes over the data are
shared out, and what they find is put together in an order that does not depend on how many there are. The
first process alone writes and prints. Without `join` there is one process, and nothing here does anything.
"""

import gc
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from lorapack.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

_store: Any = None  # what all processes can read and write; None without others
_row: Any = None  # all processes, as torch's tensors that are cut over them know them


def join() -> None:
    """Join the processes that a launcher has started beside this one (it sets WORLD_SIZE and RANK); alone, do nothing.

    Each takes the GPU of its local rank, where there are some.

    Raises:
        InputError: the others cannot be reached.
    """
    global _store
    if _store is not None or not _launched():
        return
    import torch

    # Its functions have the group of their import as a default argument. Imported later, by transformers, they would
    # hold this one for ever: gloo's threads would outlive `others_leave` and at times abort the end of the process.
    import torch.distributed.nn
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the other processes of the launcher cannot be reached ({reason[:200]})") from None
    _store = store


def count() -> int:
    """How many processes there are."""
    from torch import distributed

    return 1 if _store is None else int(distributed.get_world_size())


def number() -> int:
    """Which of them this is, the first is 0."""
    from torch import distributed

    return 0 if _store is None else int(distributed.get_rank())


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return _store is None or number() == 0


def tells() -> bool:
    """Whether this process is the one that tells the user of an error: the first to ask, of all."""
    if _store is None:
        return not _launched() or os.environ.get("RANK") == "0"
    return bool(_store.add("lorapack/told", 1) == 1)


def others_leave() -> None:
    """When all have come this far, the others end well, and the first goes on alone.

    Raises:
        InputError: one of them has ended before.
    """
    global _store, _row
    if _store is None:
        return
    from torch import distributed

    gathered(None)
    leaves = not first()
    if _row is not None:  # torch's caches keep it, and with it the group and its threads (see `join`)
        vars(_row).get("_pg_registry", {}).clear()
        _row = None
        gc.collect()  # a model that was cut knows the group as well
    _store = None
    distributed.destroy_process_group()
    if leaves:
        raise SystemExit(0)


def in_a_row(device: str) -> Any:
    """All processes as a `DeviceMesh` of one dimension, for tensors that are cut over them."""
    global _row
    if _row is None:
        from torch.distributed.device_mesh import init_device_mesh

        _row = init_device_mesh(device, (count(),))
    return _row


def rounds(items: Iterable[Item]) -> Iterator[Item | None]:
    """This process's item of every round, in which each takes the next of the items; None where they have run out."""
    for each in zip_longest(*[iter(items)] * count()):
        yield each[number()]


def gathered(value: Item) -> list[Item]:
    """The value of every process, in their order, on all of them; plain values, tensors on the CPU.

    Raises:
        InputError: another process has ended.
    """
    if _store is None:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * count()
    with _others():
        distributed.all_gather_object(found, value)
    return found


def gathered_tensors(tensors: Mapping[Key, "Tensor"]) -> list[Mapping[Key, "Tensor"]]:
    """The float64 tensors of every process, by whatever keys each has, in the order of the processes."""
    if _store is None:
        return [tensors]
    import torch

    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    flat = torch.cat([tensor.reshape(-1).cpu() for tensor in tensors.values()]) if tensors else None
    found: list[Mapping[Key, Tensor]] = []
    for their_shapes, numbers in gathered((shapes, flat)):
        sizes = [shape.numel() for shape in their_shapes.values()]
        parts = () if numbers is None else numbers.split(sizes)  # type: ignore[no-untyped-call]
        found.append({key: part.view(shape) for (key, shape), part in zip(their_shapes.items(), parts, strict=True)})
    return found


def add_up(tensors: Sequence["Tensor"]) -> None:
    """Replace each tensor by the sum of all processes' tensors, in place; they are of one dtype and device.

    Exact where, of each number, only one process has another than zero.

    Raises:
        InputError: another process has ended.
    """
    if _store is None or not tensors:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _others():
        distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    for tensor, total in zip(tensors, parts, strict=True):
        tensor.copy_(total.view_as(tensor))


def anywhere(flag: bool) -> bool:
    """Whether it is so in any of the processes."""
    return any(gathered(flag))


def from_first(value: Item) -> Item:
    """The first process's value, on all: what is decided, so that machines that round differently go on as one.

    Raises:
        InputError: another process has ended.
    """
    if _store is None:
        return value
    from torch import distributed

    found: list[Any] = [value]
    with _others():
        distributed.broadcast_object_list(found, src=0)
    decided: Item = found[0]
    return decided


def broken(error: Exception) -> bool:
    """Whether torch says with this error that the connection broke: nccl by its type, gloo in words."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def ended() -> InputError:
    """What to raise where another process has ended."""
    return InputError("another of the processes has ended, so this one ends too; nothing was written")


def _launched() -> bool:
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdecimal() and int(size) > 1


@contextmanager
def _others() -> Iterator[None]:
    """What torch raises when a connection breaks, in one line."""
    try:
        yield
    except RuntimeError:
        raise ended() from None
