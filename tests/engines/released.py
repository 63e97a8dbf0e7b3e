"""An engine's own adapter code out of its released package, without the engine.

An engine needs a GPU, a compiler and a hundred packages; the files that check and load an adapter need torch. They
are run as they stand in the wheel that `make engines` downloads. Whatever they import of the engine beside that is a
hollow module: its names are there, and nothing is behind them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from lorapack.engines import rules

WHEELS = Path(__file__).parent.parent.parent / ".cache" / "engines"


class Hollow(types.ModuleType):
    """A module with every name that is asked for: a class where it looks like one, else something callable."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        a_class = name[0].isupper() and not name.isupper()
        made = (
            type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)}) if a_class else MagicMock(name=name)
        )
        setattr(self, name, made)
        return made


class Wheel(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a package out of its wheel: the named files for real, all others hollow.

    Args:
        path: the wheel.
        package: its top-level name.
        real: modules that are run.
        given: values of a hollow module's names.
    """

    def __init__(self, path: Path, package: str, real: set[str], given: dict[str, dict]):
        self.files, self.package, self.real, self.given = zipfile.ZipFile(path), package, real, given

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=name not in self.real)
        return None

    def create_module(self, spec):
        return None if spec.name in self.real else Hollow(spec.name)

    def get_source(self, name):
        return self.files.read(name.replace(".", "/") + ".py").decode()

    def exec_module(self, module):
        if module.__name__ in self.real:
            super().exec_module(module)
        else:
            vars(module).update(self.given.get(module.__name__, {}))


def wheel(name: str) -> Path:
    """The engine's wheel; skips where it was not downloaded."""
    version = rules(name).version
    found = sorted(WHEELS.glob(f"{name}-{version}-*.whl"))
    if not found:
        pytest.skip(f"{name} {version} is not downloaded: `make engines`", allow_module_level=True)
    return found[0]


def released(name: str, real: set[str], given: dict[str, dict]) -> dict[str, types.ModuleType]:
    """An engine's modules by their last name, imported for real."""
    sys.meta_path.insert(0, Wheel(wheel(name), name, real, given))
    return {module.rpartition(".")[2]: importlib.import_module(module) for module in sorted(real)}


def source(name: str, module: str) -> str:
    """The text of an engine's module."""
    return Wheel(wheel(name), name, {module}, {}).get_source(module)
