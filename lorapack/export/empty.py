"""A model of a configuration, its weights never set: enough to trace it, and next to no memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorapack.errors import InputError
from lorapack.export.tasks import Task
from lorapack.model.load import quiet

CLASSES: Mapping[Task, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def model_config(directory: Path, task: Task) -> Any:
    """transformers' configuration.

    Raises:
        InputError: transformers does not know the architecture, or not for this task.
    """
    import transformers

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{directory} has no configuration that can be exported ({_first(error)})") from None
    if type(config) not in model_class(config, task)._model_mapping:
        raise InputError(f"the architecture {config.model_type} cannot be exported for the task {task}")
    return config


def model_class(config: Any, task: Task) -> Any:
    """transformers' class that makes models of the task."""
    import transformers

    speech = task == "SEQ_2_SEQ_LM" and config.model_type in ("whisper", "speech_to_text")
    return getattr(transformers, "AutoModelForSpeechSeq2Seq" if speech else CLASSES[task])


def empty_model(config: Any, task: Task, dtype: torch.dtype) -> Any:
    """The model in eval mode: buffers computed, parameters allocated and never written, so no memory is taken.

    Args:
        config: of `model_config`.
        task: its head.
        dtype: of the parameters.
    """
    with quiet(), torch.device("meta"):
        model = model_class(config, task).from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that transformers sets the buffers and leaves these alone
    model.initialize_weights()
    model.tie_weights()
    return model.requires_grad_(False).eval()


def names_of_weights(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter and stored buffer, by the first of its names, all of them: tied ones have several."""
    stored = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        names.setdefault(id(tensor), []).append(name)
    return {found[0]: found for found in names.values()}


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Whatever a tracer raises as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch.export and torch.onnx raise their own, a model may raise anything
        raise InputError(f"{what} ({_first(error)})") from None


def _first(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter wraps what happened in pages of advice
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
