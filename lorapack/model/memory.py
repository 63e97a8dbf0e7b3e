"""When memory runs out: the batch again, in pieces of half the size."""

import gc
import logging
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from lorapack.data.batches import Batch, cut, stand_in
from lorapack.errors import InputError
from lorapack.model.load import Loaded
from lorapack.processes import broken, ended, gathered

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

# the most tokens at a time, padding included, once memory has run out; for the rest of the run
_limits: "weakref.WeakKeyDictionary[Loaded, int]" = weakref.WeakKeyDictionary()


def piecewise(
    loaded: Loaded,
    batch: Batch | None,
    run: Callable[[Batch], Result],
    forget: Callable[[], object] = lambda: None,
    tokens: int | None = None,
) -> list[Result]:
    """What `run` makes of a batch: of the whole, or of its pieces, on the device, where memory is short.

    Where it runs out, the whole batch is begun anew, in pieces of half the tokens, and later batches are cut at once.

    Args:
        loaded: the model that it runs.
        batch: of rows; None where this process has none, though others may.
        run: called with each piece in turn.
        forget: takes back what `run` has left outside of its results.
        tokens: of a piece, where memory is not short; the whole batch without it.

    Raises:
        InputError: a single row does not fit.
    """
    if loaded.sharded:
        return _in_step(loaded, batch, run, forget, tokens)
    while batch is not None:
        found: list[Result] = []
        piece = batch
        limits = [limit for limit in (tokens, _limits.get(loaded)) if limit is not None]
        try:
            for piece in cut(batch, min(limits)) if limits else [batch]:
                found.append(run(piece.to(loaded.device)))
            return found
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        found.clear()  # and the error is gone as well, with the tensors in its frames
        forget()
        _smaller(loaded, piece)
    return []


def _in_step(
    loaded: Loaded,
    batch: Batch | None,
    run: Callable[[Batch], Result],
    forget: Callable[[], object],
    tokens: int | None,
) -> list[Result]:
    """Of a base that is cut over the processes: each runs as often as the others, a stand-in where it has no piece.

    A layer is put together by all processes at once, and one that came alone would wait for ever. So no batch is
    begun anew in smaller pieces either.
    """
    pieces = [] if batch is None else [batch] if tokens is None else list(cut(batch, tokens))
    idle = max(gathered(len(pieces))) - len(pieces)
    try:
        for _ in range(idle):
            run(stand_in(loaded.task == "CAUSAL_LM").to(loaded.device))
        if idle:
            forget()
        return [run(piece.to(loaded.device)) for piece in pieces]
    except (RuntimeError, MemoryError) as error:
        if broken(error):
            raise ended() from None
        if not _out_of_memory(error):
            raise
        raise InputError(
            "memory runs out, and a batch is not cut while the base is (--device shard): "
            "give a smaller --batch-tokens, --batch-size or --max-length"
        ) from None


def _smaller(loaded: Loaded, piece: Batch) -> None:
    rows, length = piece.input_ids.shape
    if rows == 1:
        raise InputError(
            f"memory runs out with a single row of {length} tokens: give a smaller --max-length, or --dtype bfloat16"
        )
    _limits[loaded] = limit = rows * length // 2
    _log.warning("lorapack: memory ran out; from here on at most %s tokens at once (--batch-tokens)", f"{limit:,}")
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    """torch has an error of its own for a GPU; its allocator on the CPU says it in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
