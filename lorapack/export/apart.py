"""The adapter apart from its graph: a place for it in the graph, and the `.onnx_adapter` files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError, OutputError
from lorapack.export.files import save
from lorapack.export.graph import weights
from lorapack.export.job import Job
from lorapack.export.record import Record
from lorapack.export.slots import add_slots, check_fits, entries, find_slots
from lorapack.export.weights import alone, fill, find_carried, find_sources, read
from lorapack.merge.numbers import Array


def write_open_graph(job: Job, adapter: Adapter, graph: ir.Model, path: Path, record: Record) -> Record:
    """A graph with the base's weights and a place for the adapter; the record with what that place is.

    Raises:
        InputError: as for `write_graph`, or a module whose factors cannot be kept apart.
    """
    known = weights(graph)
    names = {name for weight in known.values() for name in weight.names}
    slots = {module: slot for module, slot in find_slots(adapter).items() if f"{module}.weight" in names}
    carried = {name: weight for name, weight in known.items() if find_carried(weight, job.updates.carried)}
    sources = find_sources(graph, job.base, job.updates, merged=False)
    add_slots(graph, slots)
    fill(graph, sources, carried)
    save(graph, path)
    return replace(
        record, slots={**(record.slots or {}), path.name: slots}, carried={**record.carried, path.name: carried}
    )


def write_adapters(job: Job, adapter: Adapter, record: Record, graphs: Path, directory: Path) -> None:
    """The adapter of every graph, ``<graph>.onnx_adapter``.

    Args:
        job, adapter: what is written.
        record: says what the graphs take.
        graphs: where they lie.
        directory: where to write.

    Raises:
        InputError: the adapter does not fit the graphs.
        OutputError: a file cannot be written.
    """
    slots = record.slots or {}
    check_fits(adapter, {module: slot for of_graph in slots.values() for module, slot in of_graph.items()})
    dtype = np.float16 if record.dtype == "fp16" else np.float32
    for name, of_graph in slots.items():
        tensors = entries(adapter, of_graph, dtype)
        tensors |= _carried(job, record, name)
        _check_shapes(tensors, ir.load(graphs / name))
        written = onnxruntime.AdapterFormat()
        written.set_adapter_version(1)
        written.set_model_version(1)
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for key, tensor in tensors.items()}
        written.set_parameters(values)
        path = directory / f"{Path(name).stem}.onnx_adapter"
        try:
            written.export_adapter(str(path))
        except Exception:  # ONNX Runtime raises its own, which says where in its sources
            raise OutputError(f"{path.name} cannot be written; the disk may be full") from None
        _compare(tensors, path)


def _carried(job: Job, record: Record, name: str) -> dict[str, Array]:
    """The weights that the adapter brings along, as the graph wants them.

    Raises:
        InputError: the adapter brings others than the graph expects.
    """
    wanted = record.carried.get(name, {})
    dtype = "F16" if record.dtype == "fp16" else "F32"
    made = {}
    for key, weight in wanted.items():
        tensor = find_carried(weight, job.updates.carried)
        if tensor is None:
            raise InputError(f"the graph wants {key} of its adapters (a head, a bias), and this one has none")
        made[key] = read(key, alone(tensor), dtype, weight.transposed)
    known = {alias for of_graph in record.carried.values() for weight in of_graph.values() for alias in weight.names}
    for key in job.updates.carried:
        if key not in known:
            raise InputError(f"the adapter brings {key}, and the graph has no place for it: export a graph with it")
    return made


def _check_shapes(tensors: dict[str, Array], model: ir.Model) -> None:
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, tensor in tensors.items():
        if name not in inputs:
            raise InputError(f"the graph takes no {name}: it is damaged, export it again")
        wanted = list(inputs[name].shape or ())
        if len(wanted) != tensor.ndim or any(
            isinstance(n, int) and n != m for n, m in zip(wanted, tensor.shape, strict=False)
        ):
            raise InputError(f"{name} is {list(tensor.shape)} in the adapter and {wanted} in the graph")


def _compare(tensors: dict[str, Array], path: Path) -> None:
    """Read an adapter back.

    Raises:
        InputError: it is not what was written.
    """
    back = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    if back.keys() != tensors.keys() or not all(np.array_equal(back[n].numpy(), t) for n, t in tensors.items()):
        raise InputError(f"{path.name} reads back otherwise than was written. Check the disk")
