"""What an export reads before it writes anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lorapack
from lorapack.core.names import head_classes
from lorapack.errors import InputError
from lorapack.export.cache import versions
from lorapack.export.record import Dtype, Record
from lorapack.export.tasks import LABELLED, Task, find_task
from lorapack.export.weights import fingerprint
from lorapack.hub import find_adapter, find_base
from lorapack.merge.base import Base, read_base
from lorapack.merge.updates import Updates, from_adapter, read_updates

if TYPE_CHECKING:
    from lorapack.core.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that is read before something is written.

    Attributes:
        adapter_at: its directory.
        adapter: in memory, where it is needed.
        updates: the same, for merging.
        base: the model's files.
        task: what the model is for.
        config: the `config.json` of the result: the base's, with the labels of the adapter's head.
        record: what is known of the result so far.
    """

    adapter_at: Path
    adapter: "Adapter | None"
    updates: Updates
    base: Base
    task: Task
    config: Mapping[str, Any]
    record: Record


def read_job(
    source: str | Path, base: str | Path | None, revision: str | None, dtype: Dtype, work: Path, *, in_memory: bool
) -> Job:
    """Find and check the inputs.

    Args:
        source: the adapter.
        base: another place for the base than the adapter names.
        revision: of an adapter on the Hub.
        dtype: of the result.
        work: where `.bin` files become safetensors.
        in_memory: whether the adapter itself is needed, not its updates alone.

    Raises:
        InputError: what is missing or damaged.
    """
    at = find_adapter(source, revision)
    adapter = None
    if in_memory:
        from lorapack.read.adapter import read_adapter

        adapter = read_adapter(at)
    updates = read_updates(at) if adapter is None else from_adapter(adapter)
    named = base or updates.settings.base_model_name_or_path
    if not named:
        raise InputError("the adapter names no base model; name it with --base")
    found = read_base(find_base(named, updates.settings.revision if base is None else None), work)
    task = find_task(found.config, updates.settings.task_type)
    return Job(
        adapter_at=at,
        adapter=adapter,
        updates=updates,
        base=found,
        task=task,
        config=_config(found, updates, task, at),
        record=Record(
            lorapack=lorapack.__version__,
            task=task,
            dtype=dtype,
            adapter=Path(source).name,
            base=Path(named).name if Path(named).exists() else str(named),
            fingerprint=fingerprint(found),
            versions=versions(),
        ),
    )


def _config(base: Base, updates: Updates, task: Task, adapter_at: Path) -> dict[str, Any]:
    """The base's `config.json` with as many labels as the adapter's head has, and with a padding token for it."""
    config = dict(base.config)
    if task not in LABELLED:
        return config
    labels = head_classes(updates.carried)
    if labels and labels != len(config.get("id2label") or range(2)):
        config["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
        config["label2id"] = {name: int(n) for n, name in config["id2label"].items()}
    if config.get("pad_token_id") is None:
        place = adapter_at if (adapter_at / "tokenizer_config.json").exists() else base.directory
        config["pad_token_id"] = _padding(place)
    return config


def _padding(directory: Path) -> int | None:
    """The id of the token that rows are padded with, as the tokenizer has it."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # whoever needs a tokenizer says that there is none
        return None
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)
