"""What a model is for, which decides its head and what its graphs take and give."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lorapack.errors import InputError

Task = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"]
TASKS: tuple[Task, ...] = get_args(Task)
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
# the endings of transformers' class names, the first that fits
_ENDINGS: dict[str, Task] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}


def find_task(config: Mapping[str, Any], task_type: str | None) -> Task:
    """The task that the adapter was trained for, or the one the base's class is named after.

    Args:
        config: the base's `config.json`.
        task_type: of the adapter's configuration, None where it names none.

    Raises:
        InputError: a task that has no export, or a class whose name says nothing.
    """
    if task_type is not None:
        for task in TASKS:
            if task == task_type:
                return task
        raise InputError(f"task_type {task_type} cannot be exported (possible: {', '.join(TASKS)})")
    for name in config.get("architectures") or []:
        for ending, task in _ENDINGS.items():
            if str(name).endswith(ending):
                return task
    raise InputError(
        f"the adapter names no task_type, and the base's architectures ({config.get('architectures')}) do not say what "
        f"it is for; add one of {', '.join(TASKS)} to adapter_config.json as task_type"
    )
