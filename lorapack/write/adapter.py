"""Write an adapter to a new directory, and prove that it can be read back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorapack.core.adapter import Adapter
from lorapack.core.report import Report, to_json
from lorapack.errors import OutputError
from lorapack.read.adapter import CONFIG, REPORT, SAFETENSORS, read_adapter
from lorapack.read.files import CARD, file_digests
from lorapack.write.card import card
from lorapack.write.directory import new_directory
from lorapack.write.form import compact_form, peft_form

DIFFERS = "what was written to {} reads back differently; nothing was kept. Check the disk"


def write_adapter(
    adapter: Adapter, out: str | Path, *, report: Report | None = None, expand: bool = False, overwrite: bool = False
) -> None:
    """Write an adapter to a new directory, which appears whole or not at all.

    Args:
        adapter: to write.
        out: the directory to make.
        report: of how it was made; `report.json` and the model card are written from it.
        expand: plain PEFT LoRA with shared factors repeated, instead of the compact format.
        overwrite: replace an existing directory.

    Raises:
        OutputError: it exists, there is no space or permission, or what was read back differs.
    """
    with new_directory(out, overwrite=overwrite) as directory:
        put_adapter(adapter, directory, report=report, expand=expand)


def put_adapter(adapter: Adapter, directory: Path, *, report: Report | None = None, expand: bool = False) -> None:
    """`write_adapter` into a directory that is there, inside a `new_directory` block."""
    put_files(directory, *(peft_form(adapter) if expand else compact_form(adapter)))
    if report is not None:
        report = replace(report, files=file_digests(directory))
        (directory / REPORT).write_text(to_json(report), encoding="utf-8")
        text = card(adapter, report, expanded=expand)
        (directory / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
    _compare(adapter, read_adapter(directory), directory)


def put_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The two files of a checkpoint, into a directory that is there.

    Raises:
        OutputError: they cannot be written.
    """
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = directory / SAFETENSORS
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps the operating system's error in text
        raise OutputError(f"{path.name} cannot be written: {error}") from None
    path.chmod((directory / CONFIG).stat().st_mode)  # the library makes it readable to its owner alone


def _compare(written: Adapter, found: Adapter, directory: Path) -> None:
    same = (
        written.modules.keys() == found.modules.keys()
        and written.carried.keys() == found.carried.keys()
        and all(torch.equal(t, found.carried[n]) for n, t in written.carried.items())
        and all(
            torch.equal(written.factors(m).A, found.factors(m).A)
            and torch.equal(written.factors(m).B, found.factors(m).B)
            and written.factors(m).seed == found.factors(m).seed
            and abs(written.scale(m) - found.scale(m)) <= 1e-12 * abs(written.scale(m))
            for m in written.modules
        )
    )
    if not same:
        raise OutputError(DIFFERS.format(directory))
