"""Where a graph takes an adapter: one pair of inputs for every distinct pair of factors.

An input's default has rank 0, so without an adapter the graph is the base. Modules that share factors share the
inputs, and what each has of its own beside them is an input too. Factors lie as the graph multiplies:
``x @ A @ B``, A (d_in, rank) and B (rank, d_out).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, fold
from lorapack.errors import InputError
from lorapack.export.graph import Slot, weights
from lorapack.merge.numbers import Array


def find_slots(adapter: Adapter) -> dict[str, Slot]:
    """The slots that an adapter asks for, by module.

    Raises:
        InputError: an embedding or a convolution, which can only be merged.
    """
    users = Counter(pointer.factors for pointer in adapter.modules.values())
    private = {module for module, pointer in adapter.modules.items() if users[pointer.factors] == 1}
    found = {}
    for module, pointer in adapter.modules.items():
        if adapter.pool[pointer.factors].kind != "linear":
            raise InputError(
                f"{module} is no linear layer, its factors cannot be kept apart: export without --separate"
            )
        if module in private:
            found[module] = Slot(module)
        else:
            stem = pointer.factors + (".shared" if pointer.factors in private else "")
            found[module] = Slot(stem, True, *pointer.form)
    return found


def add_slots(model: ir.Model, slots: Mapping[str, Slot]) -> None:
    """Put the branches into a traced graph, behind the product with each module's weight.

    Raises:
        InputError: a module that the graph does not multiply with.
    """
    known = {alias: name for name, weight in weights(model).items() for alias in weight.names}
    values = {str(value.name): value for value in model.graph.inputs}
    made: dict[str, ir.Value] = {}
    for module, slot in slots.items():
        weight = values.get(known.get(f"{module}.weight", ""))
        products = list(_products(weight)) if weight is not None else []
        if not products:
            raise InputError(f"{module} is not in the graph, or no matrix product: export without --separate")
        for node in products:
            _branch(model.graph, node, module, slot, made)
    for value in made.values():
        model.graph.inputs.append(value)
        model.graph.register_initializer(value)


def entries(adapter: Adapter, slots: Mapping[str, Slot], dtype: Any) -> dict[str, Array]:
    """The tensors of an adapter for a graph with these slots, each once.

    Raises:
        InputError: a number that the type cannot hold.
    """
    found: dict[str, Array] = {}
    for module, slot in slots.items():
        pointer = adapter.modules.get(module)
        if pointer is None:
            if slot.scaled and _group_is_used(adapter, slots, slot):
                found[f"{module}.lora_scale"] = np.zeros(1, dtype)
            continue
        factors, own = _split(adapter, module, slot)
        found[f"{slot.factors}.lora_A"] = _array(factors.A.T, dtype)
        found[f"{slot.factors}.lora_B"] = _array(factors.B.T, dtype)
        found |= {f"{module}.lora_{part}": _array(tensor, dtype) for part, tensor in own.items()}
    return found


def _split(adapter: Adapter, module: str, slot: Slot) -> tuple[Factors, dict[str, Tensor]]:
    """A module's factors as its slot has them, and what goes beside them; the scale is in exactly one of all."""
    pointer = adapter.modules[module]
    factors = adapter.pool[pointer.factors]
    if not slot.shared:
        plain = fold(factors, pointer)
        return Factors(plain.A, plain.B.double() * pointer.scale), {}
    own = {}
    if pointer.core is not None:
        core = pointer.core.double() * (1.0 if slot.output else pointer.scale)
        own["core"] = core.T if core.ndim == 2 else core
    if pointer.output is not None:
        own["output"] = pointer.output.double() * pointer.scale
    if slot.scaled:
        own["scale"] = torch.tensor([pointer.scale], dtype=torch.float64)
    return factors, own


def check_fits(adapter: Adapter, slots: Mapping[str, Slot]) -> None:
    """Whether an adapter can be written for graphs with these slots.

    Raises:
        InputError: it acts on other modules than the graphs, or shares otherwise.
    """
    for module, pointer in adapter.modules.items():
        slot = slots.get(module)
        if slot is None:
            raise InputError(f"the graph has no place for {module}: export a graph with this adapter (--separate)")
        if not slot.shared:
            continue
        others = [m for m, other in slots.items() if other.factors == slot.factors and m in adapter.modules]
        if any(adapter.modules[m].factors != pointer.factors for m in others):
            raise InputError(
                f"in the graph {module} shares its factors ({slot.factors}), in the adapter it has its own: "
                "export a graph with this adapter (--separate)"
            )
        if pointer.form != (slot.core, slot.output):
            raise InputError(
                f"{module} has another form of sharing in the graph than in the adapter (a core, or an output vector): "
                "export a graph with this adapter (--separate)"
            )


def _group_is_used(adapter: Adapter, slots: Mapping[str, Slot], slot: Slot) -> bool:
    return any(other.factors == slot.factors and module in adapter.modules for module, other in slots.items())


def _array(tensor: Tensor, dtype: Any) -> Array:
    """Contiguous, in the graph's type.

    Raises:
        InputError: a number that the type cannot hold.
    """
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(tensor.double().numpy().astype(dtype))
    if not np.isfinite(made).all():
        raise InputError(f"the adapter has numbers too large for {np.dtype(dtype).name}; choose another --dtype")
    return made


def _products(weight: ir.Value) -> Iterator[ir.Node]:
    """The matrix products with a weight as it lies, or turned (one that is also an embedding)."""
    for use in weight.uses():
        if use.node.op_type in ("MatMul", "Gemm") and use.idx == 1:
            yield use.node
        elif use.node.op_type == "Transpose":
            yield from _products(use.node.outputs[0])


def _branch(graph: ir.Graph, node: ir.Node, module: str, slot: Slot, made: dict[str, ir.Value]) -> None:
    """``out + (x @ A @ B)`` in the place of ``out``, with what the module has of its own in between."""
    before, out = node.inputs[0], node.outputs[0]
    d_in, d_out = _widths(node)
    weight = node.inputs[1]
    assert weight is not None and weight.dtype is not None
    dtype = weight.dtype
    rank = f"{slot.factors}.rank"

    def taken(name: str, shape: list[int | str], default: tuple[int, ...]) -> ir.Value:
        if name not in made:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            value.const_value = ir.tensor(np.zeros(default, dtype.numpy()), name=name)
            made[name] = value
        return made[name]

    steps: list[tuple[str, ir.Value]] = [("MatMul", taken(f"{slot.factors}.lora_A", [d_in, rank], (d_in, 0)))]
    if slot.core == "full":
        steps.append(("MatMul", taken(f"{module}.lora_core", [rank, rank], (0, 0))))
    elif slot.core:
        steps.append(("Mul", taken(f"{module}.lora_core", [rank], (0,))))
    steps.append(("MatMul", taken(f"{slot.factors}.lora_B", [rank, d_out], (0, d_out))))
    if slot.output:
        steps.append(("Mul", taken(f"{module}.lora_output", [d_out], (d_out,))))
    if slot.scaled:
        steps.append(("Mul", taken(f"{module}.lora_scale", [1], (1,))))
    nodes, value = [], before
    for n, (op, operand) in enumerate(steps):
        nodes.append(ir.node(op, [value, operand], name=f"{module}.lora.{n}"))
        value = nodes[-1].outputs[0]
    total = ir.node("Add", [out, value], name=f"{module}.lora.add")
    total.outputs[0].type, total.outputs[0].shape = out.type, out.shape
    name, is_output = out.name, out.is_graph_output()
    out.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, out)
    graph.insert_after(node, [*nodes, total])
    if is_output:
        out.name, total.outputs[0].name = f"{name}.base", name


def _widths(node: ir.Node) -> tuple[int, int]:
    """(d_in, d_out) of a product with a weight."""
    value = node.inputs[1]
    assert value is not None
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    producer = value.producer()
    if producer is not None:  # a transposition
        value, turned = producer.inputs[0], not turned
    assert value is not None and value.shape is not None
    d_in, d_out = (int(n) for n in value.shape)  # type: ignore[arg-type]  # weights have numbers for axes
    return (d_out, d_in) if turned else (d_in, d_out)
