"""The job: base and adapter in, a model directory out, shard by shard."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lorapack
from lorapack.errors import InputError
from lorapack.hub import find_adapter, find_base
from lorapack.merge.base import INDEX, MODEL_CONFIG, Base, companions, read_base
from lorapack.merge.layout import FLOATS, Entry, Shard, header, read_shard
from lorapack.merge.match import Change, match
from lorapack.merge.stream import Files, change, copy, write
from lorapack.merge.updates import read_updates
from lorapack.write.directory import new_directory, refuse_overlap

Output = Literal["auto", "float32", "bfloat16", "float16"]
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
RECORD = "lorapack_merge.json"
PIECE = 1 << 26  # bytes the kernel copies at once
MOST_THREADS = 8  # more only wait for the disk


@dataclass(frozen=True)
class Merged:
    """What was done: how many of the model's tensors changed, and how many there are."""

    changed: int
    tensors: int


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    dtype: Output = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> Merged:
    """Write the base model with the adapter merged into it: W + s·B·A, rounded once.

    The sum is made in float32 for results of 16 bits, in float64 for wider ones, and rounded to nearest.
    Nothing is loaded but blocks of rows and the factors of the layers at work, so the memory needed does not
    grow with the model.

    Args:
        adapter: a PEFT or compact directory, or a Hub id.
        out: the model directory to make; it appears whole or not at all.
        base: another place for the base model than the adapter names.
        dtype: of all weights of the result; ``auto``: each as it is in the base.
        revision: of an adapter on the Hub.
        overwrite: replace what an earlier merge wrote.
        verify: load both and compare their outputs (`lorapack.verify`) before the result gets its name.

    Raises:
        GateError: the result does not say what the adapter on its base says; nothing is kept.
        InputError: an adapter or base that is damaged or quantised, or that do not belong together.
        OutputError: `out` exists or cannot be written.
    """
    inputs = (adapter,) if base is None else (adapter, base)
    with new_directory(out, overwrite=overwrite, inputs=inputs, mark=RECORD) as directory:
        updates_at = find_adapter(adapter, revision)
        updates = read_updates(updates_at)
        source = base or updates.settings.base_model_name_or_path
        if not source:
            raise InputError("the adapter names no base model; name it with --base")
        place = find_base(source, updates.settings.revision if base is None else None)
        refuse_overlap(out, place)
        work = directory / ".bin"
        work.mkdir()
        found = read_base(place, work)
        changes = match(updates, found)
        kind = None if dtype == "auto" else TYPES[dtype]
        for name, shard in found.shards.items():
            _write_shard(shard, directory / name, changes, kind)
        shutil.rmtree(work)
        _write_texts(found, directory, updates_at, dtype)
        record = {
            "lorapack": lorapack.__version__,
            "adapter": Path(adapter).name,
            "base": Path(source).name if Path(source).exists() else str(source),
            "dtype": dtype,
            "changed": sorted(changes),
        }
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if verify:
            from lorapack.verify import demand_same
            from lorapack.verify import verify as compare

            demand_same(compare(updates_at, directory, place))
        return Merged(len(changes), len(found.entries))


def _write_shard(shard: Shard, path: Path, changes: Mapping[str, Change], kind: str | None) -> None:
    """One shard: the header, then every tensor at its place, several at a time."""
    targets = {n: _as(entry, kind) for n, entry in shard.entries.items()}
    same = all(targets[n].dtype == entry.dtype for n, entry in shard.entries.items())
    start = None
    if not same:
        start, targets = header(targets, shard.metadata)
    begin = shard.data if start is None else len(start)
    length = max((entry.stop for entry in targets.values()), default=begin)
    with open(shard.path, "rb") as source, open(path, "w+b") as target:
        files = Files(source.fileno(), target.fileno())
        os.ftruncate(target.fileno(), length)
        if start is None:
            copy(files, 0, shard.data, 0)
        else:
            write(files, start, 0)
        _together(_jobs(files, shard, targets, changes))
    written = read_shard(path)
    if written.entries != targets:
        raise InputError(f"{path.name} reads back with another header than was written. Check the disk")


def _as(entry: Entry, kind: str | None) -> Entry:
    return Entry(kind, entry.shape, entry.start, entry.stop) if kind and entry.dtype in FLOATS else entry


def _jobs(
    files: Files, shard: Shard, targets: Mapping[str, Entry], changes: Mapping[str, Change]
) -> list[Callable[[], None]]:
    """The work of a shard: changed tensors one by one, untouched ones in runs that lie together on both sides."""
    jobs: list[Callable[[], None]] = []
    runs: list[tuple[int, int, int]] = []
    for name, entry in shard.entries.items():
        target = targets[name]
        what = changes.get(name)
        if what is not None or target.dtype != entry.dtype:
            what = what or Change()
            jobs.append(lambda n=name, e=entry, t=target, w=what: change(files, n, e, t, w))  # type: ignore[misc]
        elif runs and (runs[-1][1], runs[-1][2]) == (entry.start, target.start - (runs[-1][1] - runs[-1][0])):
            runs[-1] = (runs[-1][0], entry.stop, runs[-1][2])
        else:
            runs.append((entry.start, entry.stop, target.start))
    for start, stop, to in runs:
        for at in range(start, stop, PIECE):
            end = min(stop, at + PIECE)
            jobs.append(lambda a=at, e=end, t=to + at - start: copy(files, a, e, t))  # type: ignore[misc]
    return jobs


def _together(jobs: list[Callable[[], None]]) -> None:
    """Run the jobs on the processors there are; the first that fails stops the rest."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS)) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for done in wait(running, return_when=FIRST_EXCEPTION).done:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_texts(base: Base, directory: Path, adapter: Path, dtype: Output) -> None:
    """Configuration, tokenizer and index."""
    for name, path in companions(base.directory, adapter).items():
        shutil.copyfile(path, directory / name)
    if dtype == "auto":
        shutil.copyfile(base.directory / MODEL_CONFIG, directory / MODEL_CONFIG)
    else:
        (directory / MODEL_CONFIG).write_text(json.dumps(_retyped(base.config, dtype), indent=2) + "\n")
    if base.index is not None:
        total = sum(_bytes(directory / name) for name in base.shards)
        metadata = {**(base.index.get("metadata") or {}), "total_size": total}
        (directory / INDEX).write_text(json.dumps({**base.index, "metadata": metadata}, indent=2) + "\n")


def _bytes(path: Path) -> int:
    return sum(entry.stop - entry.start for entry in read_shard(path).entries.values())


def _retyped(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another type of weights, also in its parts (`text_config`)."""
    made = {k: _retyped(v, dtype) if isinstance(v, Mapping) and k.endswith("_config") else v for k, v in config.items()}
    for name in ("dtype", "torch_dtype"):
        if isinstance(made.get(name), str):
            made[name] = dtype
    return made
