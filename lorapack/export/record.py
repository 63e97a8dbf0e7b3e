"""What an export says of itself, in `export.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorapack.core.checked import parse_value
from lorapack.errors import InputError
from lorapack.export.graph import Slot, Weight
from lorapack.read.files import read_json

Dtype = Literal["fp32", "fp16", "int8"]
RECORD = "export.json"


@dataclass(frozen=True)
class Record:
    """What was exported, what further adapters must fit, and how it was checked.

    Attributes:
        lorapack: the version.
        task: PEFT's name for it.
        dtype: of the weights.
        adapter, base: their names.
        fingerprint: of the base's weights.
        slots: of graphs with the adapter apart, by file and module; None where it is merged.
        carried: the weights that the adapter brings along (a head, biases), by file and name.
        verification: `lorapack.export.verify.Figures`, by what was run; None where nothing was.
        versions: of what traced the graphs.
    """

    lorapack: str
    task: str
    dtype: Dtype
    adapter: str
    base: str
    fingerprint: str
    slots: dict[str, dict[str, Slot]] | None = None
    carried: dict[str, dict[str, Weight]] = field(default_factory=dict)
    verification: dict[str, dict[str, Any]] | None = None
    versions: dict[str, str] = field(default_factory=dict)


def write_record(record: Record, directory: Path) -> None:
    (directory / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def read_record(directory: Path) -> Record:
    """The record of an earlier export.

    Raises:
        InputError: it is missing or damaged, or names files elsewhere.
    """
    record = parse_value(Record, read_json(directory / RECORD), str(directory / RECORD))
    for name in {**(record.slots or {}), **record.carried}:
        if name != Path(name).name or not name.endswith(".onnx"):
            raise InputError(f"{directory / RECORD} names the graph {name!r}, which is no plain name of an .onnx file")
    return record
