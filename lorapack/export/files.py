"""What an export writes beside its record, without torch: texts, and graphs with merged weights."""

import json
import logging
import os
import shutil
from pathlib import Path

import onnx_ir as ir

import lorapack
from lorapack.errors import InputError
from lorapack.export.job import Job
from lorapack.export.weights import fill, find_sources
from lorapack.merge.base import MODEL_CONFIG, companions

MOST_THREADS = 4  # each holds a weight


def write_texts(job: Job, directory: Path) -> None:
    """Tokenizer, generation configuration, and the configuration with its labels; no code."""
    for name, path in companions(job.base.directory, job.adapter_at).items():
        if not name.endswith(".py"):
            shutil.copyfile(path, directory / name)
    (directory / MODEL_CONFIG).write_text(json.dumps(job.config, indent=2) + "\n", encoding="utf-8")


def write_graph(job: Job, graph: ir.Model, path: Path) -> None:
    """A graph with the merged weights.

    Raises:
        InputError: the base lacks a weight, or the adapter does not fit.
    """
    fill(graph, find_sources(graph, job.base, job.updates, merged=True))
    save(graph, path)


def quantise(path: Path, work: Path) -> None:
    """ONNX Runtime's dynamic quantisation, to signed 8 bits, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for file in (path, path.with_name(f"{path.name}.data")):
        shutil.move(file, work / file.name)
    logging.disable(logging.WARNING)  # it recommends a preparation that the exporter did
    try:
        quantize_dynamic(
            work / path.name,
            path,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    shutil.copymode(path, path.with_name(f"{path.name}.data"))


def save(graph: ir.Model, path: Path) -> None:
    """Write a graph and its weights, and read back what lies where.

    Raises:
        InputError: it is not what was written.
    """
    graph.producer_name, graph.producer_version = "lorapack", lorapack.__version__
    wanted = {name: value.shape for name, value in graph.graph.initializers.items()}
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    ir.save(graph, path, external_data=f"{path.name}.data", max_workers=threads)
    length = path.with_name(f"{path.name}.data").stat().st_size
    back = ir.load(path).graph.initializers
    for name, value in back.items():
        tensor = value.const_value
        end = (tensor.offset or 0) + tensor.nbytes if isinstance(tensor, ir.ExternalTensor) else 0
        if value.shape != wanted.pop(name, None) or end > length:
            raise InputError(f"{path.name} reads back otherwise than was written ({name}). Check the disk")
    if wanted:
        raise InputError(f"{path.name} reads back without {next(iter(wanted))}. Check the disk")
