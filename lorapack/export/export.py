"""The job: an adapter and its base in, a directory for ONNX Runtime out."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorapack.errors import InputError
from lorapack.write.directory import new_directory, refuse_overlap

if TYPE_CHECKING:
    import onnx_ir as ir

    from lorapack.export.job import Job
    from lorapack.export.record import Dtype, Record

NEEDED = {"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    dtype: "Dtype" = "fp32",
    separate: bool = False,
    verify: bool = True,
    revision: str | None = None,
    overwrite: bool = False,
) -> "Record":
    """Write a base and its adapter for ONNX Runtime.

    Args:
        adapter: a PEFT or compact directory, or a Hub id.
        out: the directory to make; it appears whole or not at all.
        base: another place for the base model than the adapter names.
        dtype: of the weights; ``int8``: ONNX Runtime's dynamic quantisation of the merged model.
        separate: keep the adapter apart, in an `.onnx_adapter` beside the base's graph.
        verify: compare with torch before anything is written.
        revision: of an adapter on the Hub.
        overwrite: replace what an earlier export wrote.

    Raises:
        InputError: what cannot be exported, or packages that are missing.
        GateError: the check found a difference.
        OutputError: `out` exists or cannot be written.
    """
    _refuse_missing_packages()
    if separate and dtype == "int8":
        raise InputError("--dtype int8 quantises merged weights; with --separate choose fp32 or fp16")
    from lorapack.export.cache import cached
    from lorapack.export.files import quantise, write_graph, write_texts
    from lorapack.export.job import read_job
    from lorapack.export.record import RECORD, write_record

    inputs = (adapter,) if base is None else (adapter, base)
    kind = "fp16" if dtype == "fp16" else "fp32"
    with new_directory(out, overwrite=overwrite, inputs=inputs, mark=RECORD) as directory:
        work = directory / ".work"
        work.mkdir()
        job = read_job(adapter, base, revision, dtype, work, in_memory=separate or verify)
        refuse_overlap(out, job.base.directory)
        write_texts(job, directory)
        graphs = cached(job.config, job.task, kind, lambda: _trace(directory, job, kind))
        record = _write_apart(job, graphs, directory) if separate else job.record
        for name, graph in graphs.items() if not separate else ():
            write_graph(job, graph, directory / name)
            if dtype == "int8":
                quantise(directory / name, work)
        shutil.rmtree(work)
        if verify and job.adapter is not None:
            record = _verified(job, record, directory, directory)
        write_record(record, directory)
        return record


def export_further(
    adapter: str | Path,
    out: str | Path,
    graph: str | Path,
    base: str | Path | None = None,
    *,
    verify: bool = True,
    revision: str | None = None,
    overwrite: bool = False,
) -> "Record":
    """Write another adapter for a graph that an earlier export kept apart.

    Args:
        adapter, out, base, verify, revision, overwrite: as for `export_adapter`.
        graph: the directory of that export.

    Raises:
        InputError: the adapter does not fit: another base, other modules, shapes, or another way of sharing.
        GateError, OutputError: as for `export_adapter`.
    """
    _refuse_missing_packages()
    from lorapack.export.apart import write_adapters
    from lorapack.export.job import read_job
    from lorapack.export.record import RECORD, read_record, write_record

    place = Path(graph)
    old = read_record(place)
    if old.slots is None:
        raise InputError(f"{place} was exported with its adapter merged; export the graph with --separate")
    inputs = (adapter, graph) if base is None else (adapter, graph, base)
    with new_directory(out, overwrite=overwrite, inputs=inputs, mark=RECORD) as directory:
        work = directory / ".work"
        work.mkdir()
        job = read_job(adapter, base, revision, old.dtype, work, in_memory=True)
        refuse_overlap(out, job.base.directory)
        shutil.rmtree(work)
        if (job.record.fingerprint, job.task) != (old.fingerprint, old.task):
            raise InputError(
                f"{place} holds the graph of {old.base} for {old.task}; {adapter} is for {job.task}, and its base "
                f"{job.record.base} has other weights"
            )
        record = replace(job.record, slots=old.slots, carried=old.carried)
        assert job.adapter is not None
        write_adapters(job, job.adapter, record, place, directory)
        if verify:
            record = _verified(job, record, place, directory)
        write_record(record, directory)
        return record


def _trace(directory: Path, job: "Job", kind: str) -> "dict[str, ir.Model]":
    """The graphs of the configuration that was written; torch is imported where they are not in the cache."""
    from lorapack.export.trace import trace_all

    return trace_all(directory, job.task, kind)


def _write_apart(job: "Job", graphs: "dict[str, ir.Model]", directory: Path) -> "Record":
    """The graphs of the base and the adapter's files; torch is imported for them."""
    from lorapack.export.apart import write_adapters, write_open_graph

    assert job.adapter is not None
    record = job.record
    for name, graph in graphs.items():
        record = write_open_graph(job, job.adapter, graph, directory / name, record)
    write_adapters(job, job.adapter, record, directory, directory)
    return record


def _verified(job: "Job", record: "Record", graphs: Path, directory: Path) -> "Record":
    from lorapack.export.check import verify

    assert job.adapter is not None
    return replace(record, verification=verify(job, job.adapter, record, graphs, directory))


def _refuse_missing_packages() -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"an export needs {', '.join(missing)}: pip install 'lorapack[onnx]'")
