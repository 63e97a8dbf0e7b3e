"""The truth that an export is checked against: transformers' model with PEFT's adapter, in float32."""

from pathlib import Path
from typing import Any

import torch

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError
from lorapack.export.empty import model_class
from lorapack.export.tasks import Task
from lorapack.model.load import attach, quiet


def reference(adapter: Adapter, directory: Path, config: Any, task: Task) -> Any:
    """PEFT's model, in eval mode.

    Args:
        adapter: what is attached.
        directory: of the base.
        config: transformers' configuration, with the labels of the adapter's head.
        task: decides the class.

    Raises:
        InputError: the base cannot be loaded, or the adapter does not fit.
    """
    kind = model_class(config, task)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a head that no file holds is drawn at random, and then replaced by the adapter's
        try:
            model = kind.from_pretrained(directory, config=config, dtype=torch.float32)
        except Exception as error:  # transformers and safetensors raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"the base model {directory} cannot be loaded ({reason[:200]})") from None
    return attach(adapter, model, str(directory))
