"""The job: base and adapter in, a model directory out, shard by shard."""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lorapack
from lorapack.errors import InputError
from lorapack.hub import find_adapter, find_base
from lorapack.merge.base import INDEX, MODEL_CONFIG, Base, companions, read_base
from lorapack.merge.layout import FLOATS, Entry, Shard, header, read_shard
from lorapack.merge.match import Change, Matched, match
from lorapack.merge.stream import Files, Scratch, change, copy, write
from lorapack.merge.updates import Updates, read_updates, weighted
from lorapack.write.directory import new_directory, refuse_overlap

Output = Literal["auto", "float32", "bfloat16", "float16"]
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
RECORD = "lorapack_merge.json"
PIECE = 1 << 26  # bytes the kernel copies at once
MOST_THREADS = 8  # more only wait for the disk
FLUSH_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Merged:
    """What was done: how many of the model's tensors changed, and how many there are."""

    changed: int
    tensors: int


def merge_adapter(
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    base: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: Output = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> Merged:
    """Write the base model with the adapter merged into it: W + s·B·A, rounded once.

    The sum is made in float64 and rounded to nearest, ties to even.
    Nothing is loaded but blocks of rows and the factors of the layers at work, so the memory needed does not
    grow with the model.

    Args:
        adapter: a PEFT or compact directory, or a Hub id; or several, whose weighted updates are added.
        out: the model directory to make; it appears whole or not at all.
        base: another place for the base model than the adapter names.
        weights: a factor for each adapter; several need them.
        dtype: of all weights of the result; ``auto``: each as it is in the base.
        revision: of an adapter on the Hub.
        overwrite: replace what an earlier merge wrote.
        verify: load both and compare their outputs (`lorapack.verify`) before the result gets its name.

    Raises:
        GateError: the result does not say what the adapter on its base says; nothing is kept.
        InputError: an adapter or base that is damaged or quantised, or that do not belong together.
        OutputError: `out` exists or cannot be written.
    """
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    factors = _weights(weights, len(adapters))
    if verify and (len(adapters), *factors) != (1, 1):
        raise InputError("--verify compares with one adapter as it is; leave it out where adapters are weighed")
    inputs = (*adapters, *(() if base is None else (base,)))
    with new_directory(out, overwrite=overwrite, inputs=inputs, mark=RECORD) as directory:
        updates_at = [find_adapter(each, revision) for each in adapters]
        read = [read_updates(each) for each in updates_at]
        source = base or _base_of(read)
        updates = weighted(read, factors)
        place = find_base(source, updates.settings.revision if base is None else None)
        refuse_overlap(out, place)
        work = directory / ".bin"
        work.mkdir()
        found = read_base(place, work)
        matched = match(updates, found)
        kind = None if dtype == "auto" else TYPES[dtype]
        for name, shard in found.shards.items():
            _write_shard(shard, directory / name, matched, kind)
        shutil.rmtree(work)
        _write_texts(found, directory, updates_at, dtype, matched)
        record = {
            "lorapack": lorapack.__version__,
            "adapter": [Path(each).name for each in adapters],
            "weights": factors,
            "base": Path(source).name if Path(source).exists() else str(source),
            "dtype": dtype,
            "changed": sorted(matched.changes),
        }
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if verify:
            from lorapack.verify import demand_same
            from lorapack.verify import verify as compare

            demand_same(compare(updates_at[0], directory, place))
        return Merged(len(matched.changes), len(found.entries) + len(matched.untied))


def _weights(given: Sequence[float] | None, adapters: int) -> list[float]:
    if given is None and adapters > 1:
        raise InputError(f"{adapters} adapters need {adapters} --weights, for example {','.join(['0.5'] * adapters)}")
    weights = [1.0] * adapters if given is None else list(given)
    if len(weights) != adapters or not all(map(math.isfinite, weights)):
        raise InputError(f"--weights: {len(weights)} numbers for {adapters} adapters; give one finite number each")
    return weights


def _base_of(read: Sequence[Updates]) -> str:
    bases = {each.settings.base_model_name_or_path for each in read}
    if len(bases) > 1:
        raise InputError(
            f"the adapters name different base models ({', '.join(sorted(map(str, bases)))}); name one with --base"
        )
    source = bases.pop()
    if not source:
        raise InputError("the adapter names no base model; name it with --base")
    return source


def _write_shard(shard: Shard, path: Path, matched: Matched, kind: str | None) -> None:
    """One shard: the header, then every tensor at its place, several at a time."""
    sources = dict(shard.entries)
    sources |= {new: shard.entries[old] for new, old in matched.untied.items() if old in shard.entries}
    targets = {n: _as(entry, kind) for n, entry in sources.items()}
    same = all(targets[n].dtype == entry.dtype for n, entry in sources.items()) and len(sources) == len(shard.entries)
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
        with _flushed_meanwhile(target.fileno()):
            _together(_jobs(files, sources, targets, matched.changes))
    written = read_shard(path)
    if written.entries != targets:
        raise InputError(f"{path.name} reads back with another header than was written. Check the disk")


def _as(entry: Entry, kind: str | None) -> Entry:
    return Entry(kind, entry.shape, entry.start, entry.stop) if kind and entry.dtype in FLOATS else entry


def _jobs(
    files: Files, sources: Mapping[str, Entry], targets: Mapping[str, Entry], changes: Mapping[str, Change]
) -> list[Callable[[], None]]:
    """The work of a shard: changed tensors one by one, untouched ones in runs that lie together on both sides."""
    jobs: list[Callable[[], None]] = []
    runs: list[tuple[int, int, int]] = []
    scratch = Scratch()
    for name, entry in sources.items():
        target = targets[name]
        what = changes.get(name)
        if what is not None or target.dtype != entry.dtype:
            what = what or Change()
            jobs.append(lambda n=name, e=entry, t=target, w=what: change(files, n, e, t, w, scratch))  # type: ignore[misc]
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


@contextlib.contextmanager
def _flushed_meanwhile(descriptor: int) -> Iterator[None]:
    """What was written goes to the disk while more is computed, so that little is left for the flush at the end.

    Raises:
        OSError: the disk did not take something; it says so only once.
    """
    ended = threading.Event()

    def flush() -> None:
        while not ended.wait(FLUSH_EVERY):
            os.fdatasync(descriptor)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            ended.set()
        flushing.result()


def _write_texts(base: Base, directory: Path, adapters: Sequence[Path], dtype: Output, matched: Matched) -> None:
    """Configuration, tokenizer and index; the tokenizer of the first adapter that has one."""
    tokenizer = next((each for each in adapters if (each / "tokenizer_config.json").exists()), adapters[0])
    for name, path in companions(base.directory, tokenizer).items():
        shutil.copyfile(path, directory / name)
    if dtype == "auto" and not matched.untied:
        shutil.copyfile(base.directory / MODEL_CONFIG, directory / MODEL_CONFIG)
    else:
        config = dict(base.config) if dtype == "auto" else _retyped(base.config, dtype)
        config |= {"tie_word_embeddings": False} if matched.untied else {}
        (directory / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base.index is not None:
        total = sum(_bytes(directory / name) for name in base.shards)
        metadata = {**(base.index.get("metadata") or {}), "total_size": total}
        places = dict(base.index["weight_map"])
        places |= {new: places[old] for new, old in matched.untied.items()}
        index = {**base.index, "metadata": metadata, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(path: Path) -> int:
    return sum(entry.stop - entry.start for entry in read_shard(path).entries.values())


def _retyped(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another type of weights, also in its parts (`text_config`)."""
    made = {k: _retyped(v, dtype) if isinstance(v, Mapping) and k.endswith("_config") else v for k, v in config.items()}
    for name in ("dtype", "torch_dtype"):
        if isinstance(made.get(name), str):
            made[name] = dtype
    return made
