"""Graphs depend on the configuration alone, so they are traced once and kept."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

import lorapack
from lorapack.errors import OutputError
from lorapack.export.graph import weights
from lorapack.write.directory import new_directory

MADE_BY = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
FORMAT = 1  # of the cached graphs; raise it when what is traced changes


def versions() -> dict[str, str]:
    """Of everything that decides what a graph looks like."""
    found = {"lorapack": lorapack.__version__}
    for name in MADE_BY:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cached(
    config: Mapping[str, Any], task: str, dtype: str, make: Callable[[], dict[str, ir.Model]]
) -> dict[str, ir.Model]:
    """The traced graphs of a configuration, by the file each is to become: from the cache, or made and put there.

    The cache is ``$XDG_CACHE_HOME/lorapack/graphs`` (``~/.cache/…``). A file in it that cannot be read is made again,
    and where nothing can be written the graphs are made every time.

    Args:
        config: what `config.json` says.
        task, dtype: what else a graph depends on.
        make: trace them.
    """
    kept = {name: value for name, value in config.items() if name not in IRRELEVANT}
    key = hashlib.sha256(json.dumps([FORMAT, kept, task, dtype, versions()], sort_keys=True).encode()).hexdigest()
    place = _place() / key[:40]
    found = _read(place)
    if not found:
        found = make()
        with contextlib.suppress(OSError, OutputError):
            _keep(found, place)
    return found


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lorapack" / "graphs"


def _read(place: Path) -> dict[str, ir.Model]:
    try:
        models = {path.name: ir.load(path) for path in sorted(place.glob("*.onnx"))}
        for model in models.values():
            weights(model)
    except Exception:  # whatever a damaged protobuf makes its reader raise
        return {}
    return models


def _keep(models: Mapping[str, ir.Model], place: Path) -> None:
    """Whole or not at all; of two that write the same the first stays."""
    if not _read(place):  # a damaged one
        shutil.rmtree(place, ignore_errors=True)
    with new_directory(place) as made:
        for name, model in models.items():
            ir.save(model, made / name)
