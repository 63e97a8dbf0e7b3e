"""From a configuration to a graph whose weights are named and not there yet.

torch.export sees a model that was never given weights (`lorapack.export.empty`). In the graph they are inputs;
what is known of each is in the graph's metadata, so that a cached graph needs nothing beside it.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lorapack.errors import InputError
from lorapack.export.empty import as_input_error, empty_model, model_config, names_of_weights
from lorapack.export.graph import Weight, record, weights
from lorapack.export.tasks import Task

BATCH, LENGTH, PAST, TOTAL, SOURCE = 2, 3, 5, 8, 7  # of the traced example; no two alike, none of them 0 or 1
OPSET = 20
KINDS = {"fp32": torch.float32, "fp16": torch.float16}
INSIDE = "model_."  # what a wrapper puts before the names of the model's weights
Axes = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a model: a module to trace, what it takes and what it gives, each with its axes."""

    file: str
    module: nn.Module
    inputs: Mapping[str, tuple[Tensor, Axes]]
    outputs: Mapping[str, Axes]


class Decoder(nn.Module):
    """Logits and the grown cache, for the first tokens (an empty cache) and all later ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()  # of plain layers: a window is kept by the mask
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        logits = self.model_(**inputs, past_key_values=cache, use_cache=True).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class Encoder(nn.Module):
    """One output of a model without a cache, by its name."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model_, self.output = model, output

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        return (getattr(self.model_(**inputs), self.output),)


class SourceEncoder(nn.Module):
    """The encoder of a model that has a decoder too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.model_.get_encoder()(**inputs).last_hidden_state,)  # type: ignore[operator]


class TargetDecoder(nn.Module):
    """Logits and the grown cache, given what the encoder made; what it sees of that is computed at every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        own = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            own.update(key, value, layer)
        logits = self.model_(
            decoder_input_ids=inputs["input_ids"],
            attention_mask=inputs["encoder_attention_mask"],
            encoder_outputs=BaseModelOutput(last_hidden_state=inputs["encoder_hidden_states"]),
            past_key_values=EncoderDecoderCache(own, DynamicCache()),
            use_cache=True,
        ).logits
        return logits, *(tensor for layer in own.layers for tensor in (layer.keys, layer.values))


def trace_all(directory: Path, task: Task, kind: str) -> dict[str, ir.Model]:
    """The graphs of a configuration, by the file each is to become.

    Args:
        directory: holds `config.json`.
        task: decides the head.
        kind: ``fp32`` or ``fp16``.

    Raises:
        InputError: an architecture that cannot be exported.
    """
    config = model_config(directory, task)
    return {part.file: trace(part) for part in parts(config, task, KINDS[kind])}


def parts(config: Any, task: Task, dtype: torch.dtype) -> list[Part]:
    """The graphs of a model: one, or two for an encoder and its decoder."""
    model = empty_model(config, task, dtype)
    if task == "CAUSAL_LM":
        return [_decoder(model, dtype)]
    if task == "SEQ_2_SEQ_LM":
        return _encoder_and_decoder(model, dtype)
    return [_encoder(model, task)]


def trace(part: Part) -> ir.Model:
    """The graph of a part, optimised, its weights inputs.

    Raises:
        InputError: torch.export cannot follow the model, or fixed an axis that must be free.
    """
    names = [*part.inputs]
    past = [name for name in names if name.startswith("past_")]
    free = {name: _free(axes) for name, (_, axes) in part.inputs.items()}
    given = {name: example for name, (example, _) in part.inputs.items()}
    kind = type(getattr(part.module, "model_", part.module)).__name__
    with _quiet(), torch.no_grad(), as_input_error(f"{kind} cannot be exported"):
        program = torch.onnx.export(
            part.module,
            ({n: given[n] for n in names if n not in past}, [given[n] for n in past]),
            dynamic_shapes=({n: free[n] for n in names if n not in past}, [free[n] for n in past]),
            input_names=names,
            output_names=[*part.outputs],
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _weights_become_inputs(model, part.module)
    _optimise(model)
    _name_axes(model, part, kind)
    _transpose(model)
    _forget_where_it_came_from(model)
    return model


def _decoder(model: Any, dtype: torch.dtype) -> Part:
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    inputs: dict[str, tuple[Tensor, Axes]] = {
        "input_ids": (ids, ("batch", "sequence")),
        "attention_mask": (torch.ones(BATCH, TOTAL, dtype=torch.int64), ("batch", "total_sequence")),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (ids.clone(), ("batch", "sequence"))
    outputs: dict[str, Axes] = {"logits": ("batch", "sequence", model.config.get_text_config().vocab_size)}
    _add_cache(inputs, outputs, _cache_shapes(model), dtype, "")
    return Part("model.onnx", Decoder(model), inputs, outputs)


def _encoder_and_decoder(model: Any, dtype: torch.dtype) -> list[Part]:
    ids, width = torch.ones(BATCH, LENGTH, dtype=torch.int64), model.config.hidden_size
    source = torch.ones(BATCH, SOURCE, dtype=torch.int64)
    axes: Axes = ("batch", "encoder_sequence")
    inputs: dict[str, tuple[Tensor, Axes]] = {
        "input_ids": (ids, ("batch", "sequence")),
        "encoder_attention_mask": (source, axes),
        "encoder_hidden_states": (torch.zeros(BATCH, SOURCE, width, dtype=dtype), (*axes, width)),
    }
    outputs: dict[str, Axes] = {"logits": ("batch", "sequence", model.config.vocab_size)}
    _add_cache(inputs, outputs, _cache_shapes(model), dtype, ".decoder")
    encoder = {"input_ids": (source, axes), "attention_mask": (source.clone(), axes)}
    return [
        Part("encoder_model.onnx", SourceEncoder(model), encoder, {"last_hidden_state": (*axes, width)}),
        Part("decoder_model.onnx", TargetDecoder(model), inputs, outputs),
    ]


def _add_cache(
    inputs: dict[str, tuple[Tensor, Axes]],
    outputs: dict[str, Axes],
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    whose: str,
) -> None:
    """The cache of every layer, (heads, size of a head), as it comes and as it goes."""
    for layer, (heads, size) in enumerate(shapes):
        for side in ("key", "value"):
            example = torch.zeros(BATCH, heads, PAST, size, dtype=dtype)
            inputs[f"past_key_values.{layer}{whose}.{side}"] = (example, ("batch", heads, "past_sequence", size))
            outputs[f"present.{layer}{whose}.{side}"] = ("batch", heads, "total_sequence", size)


def _encoder(model: Any, task: Task) -> Part:
    known = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    inputs: dict[str, tuple[Tensor, Axes]] = {
        name: (torch.ones(BATCH, LENGTH, dtype=torch.int64), ("batch", "sequence")) for name in names
    }
    if task == "FEATURE_EXTRACTION":
        output, last = "last_hidden_state", model.config.hidden_size
    else:
        output, last = "logits", model.config.num_labels
    axes: Axes = ("batch", last) if task == "SEQ_CLS" else ("batch", "sequence", last)
    return Part("model.onnx", Encoder(model, output), inputs, {output: axes})


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, size of a head) of every layer's cache, from a model whose numbers do not matter.

    Raises:
        InputError: the model keeps another kind of state than keys and values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache, EncoderDecoderCache

    kind = type(model).__name__
    with FakeTensorMode(allow_non_fake_inputs=True), as_input_error(f"{kind} cannot be exported"):
        cache, ids = DynamicCache(), torch.zeros(1, 2, dtype=torch.int64)
        if model.config.is_encoder_decoder:
            both = EncoderDecoderCache(cache, DynamicCache())
            model(input_ids=ids, decoder_input_ids=ids, past_key_values=both, use_cache=True)
        else:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        shapes = [tuple(layer.keys.shape) for layer in cache.layers]
    if not shapes or any(len(shape) != 4 for shape in shapes):
        raise InputError(f"{kind} keeps no cache of keys and values for every layer: it cannot be exported")
    return [(int(shape[1]), int(shape[3])) for shape in shapes]


def _free(axes: Axes) -> dict[int, Any]:
    return {at: torch.export.Dim.DYNAMIC for at, name in enumerate(axes) if isinstance(name, str)}


def _weights_become_inputs(model: ir.Model, module: nn.Module) -> None:
    """So that nothing is folded into them, and a cached graph is small."""
    graph = model.graph
    inner = module.model_
    assert isinstance(inner, nn.Module)
    known = {name: names for names in names_of_weights(inner).values() for name in names}
    found = {}
    for old in list(graph.initializers):
        name = old.removeprefix(INSIDE)
        value = graph.initializers.pop(old)
        if not value.uses():
            continue
        value.name = known.get(name, [name])[0]
        if name not in known:
            graph.initializers.add(value)
            continue
        value.const_value = None
        graph.inputs.append(value)
        found[value.name] = Weight(known[name], transposed=False)
    record(model, found)


def _optimise(model: ir.Model) -> None:
    from onnxscript import optimizer

    with _quiet():
        optimizer.optimize(model)


def _name_axes(model: ir.Model, part: Part, kind: str) -> None:
    """Axes get names that say what they are; one that the tracer fixed is found here.

    Raises:
        InputError: names the input and the axis.
    """
    for value in model.graph.inputs:
        if str(value.name) not in part.inputs:
            continue
        wanted = part.inputs[str(value.name)][1]
        assert value.shape is not None
        for at, name in enumerate(wanted):
            if isinstance(name, str) and isinstance(value.shape[at], int):
                raise InputError(
                    f"{kind} cannot be exported: the tracer fixed the axis {name} of {value.name} "
                    f"at {value.shape[at]}, so other inputs would not fit the graph"
                )
        value.shape = ir.Shape(wanted)
    for value in model.graph.outputs:
        value.shape = ir.Shape(part.outputs[str(value.name)])


def _transpose(model: ir.Model) -> None:
    """Weights that are only used transposed are to be written so, which spares every session the work."""
    graph = model.graph
    found = weights(model)
    for value in graph.inputs:
        users = [use.node for use in value.uses()]
        if value.name not in found or not users or not all(_turns(node) for node in users):
            continue
        assert value.shape is not None
        value.shape = ir.Shape(list(value.shape)[::-1])
        found[value.name] = Weight(found[value.name].names, transposed=True)
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
    record(model, found)


def _turns(node: ir.Node) -> bool:
    """Whether a node is the transposition of a matrix."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [1, 0]


def _forget_where_it_came_from(model: ir.Model) -> None:
    """No stack traces, which name paths of this machine, and no shapes in the tracer's own words."""
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = None
    for value in kept:
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns of what is no user's business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
