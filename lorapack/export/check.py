"""The check of an export, both sides one after the other."""

import gc
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lorapack.core.adapter import Adapter
from lorapack.export.empty import as_input_error, model_config
from lorapack.export.job import Job
from lorapack.export.record import Record
from lorapack.export.reference import reference
from lorapack.export.tasks import Task
from lorapack.export.verify import Answers, Session, Sessions, answer, compare, read_rows, torch_step


def verify(job: Job, adapter: Adapter, record: Record, graphs: Path, directory: Path) -> dict[str, dict[str, Any]]:
    """The figures by what was run: ``merged``, or ``adapter`` and ``base`` for a graph with the adapter apart.

    Args:
        job, adapter: what was exported.
        record: how.
        graphs: where the graphs lie.
        directory: where the tokenizer lies, and the adapter, where it is apart.

    Raises:
        InputError: the base cannot be loaded, or has no tokenizer.
        GateError: a difference above the tolerance.
    """
    config = model_config(graphs, job.task)
    rows = read_rows(graphs, config, job.task)
    inputs = _inputs(graphs, job.task)
    model = reference(adapter, job.base.directory, config, job.task)
    step = torch_step(model.get_base_model(), job.task, inputs)
    wanted: dict[str, Answers] = {}
    with_adapter = "merged" if record.slots is None else "adapter"
    wanted[with_adapter] = answer(job.task, rows, step, inputs)
    if record.slots is not None and not any(record.carried.values()):
        with model.disable_adapter():
            wanted["base"] = answer(job.task, rows, step, inputs)
    del model, step
    gc.collect()
    made = {}
    session: Session | Sessions
    if job.task == "SEQ_2_SEQ_LM":
        session = Sessions(graphs / "encoder_model.onnx", graphs / "decoder_model.onnx")
    else:
        session = Session(graphs / "model.onnx")
    for what, truth in wanted.items():
        session.activate(directory if what == "adapter" else None)
        with as_input_error("the graph does not run on every length and batch, so it was not written"):
            found = answer(job.task, rows, session, inputs)
        figures = compare(truth, found, rows)
        figures.check(record.dtype, f"the graph ({what})")
        made[what] = figures.as_dict()
    return made


def _inputs(graphs: Path, task: Task) -> list[str]:
    """What the model must be given, by the names that transformers has for it too."""
    if task == "SEQ_2_SEQ_LM":
        return ["input_ids", "attention_mask", "decoder_input_ids"]
    graph = ir.load(graphs / "model.onnx").graph
    return [str(value.name) for value in graph.inputs if value.name not in graph.initializers]
