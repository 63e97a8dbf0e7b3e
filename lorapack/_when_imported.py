"""Run something once PEFT is imported, so that `import lorapack` itself stays light."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `name` as everybody else would, and calls `then` when its import is complete."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then
        self.loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        # it stays in the list until the import: whoever only asks whether there is such a package comes here too
        others = [
            f for f in sys.meta_path if hasattr(f, "find_spec") and not (isinstance(f, _After) and f.name == name)
        ]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec) if self.loader else None

    def exec_module(self, module: ModuleType) -> None:
        if self.loader and module.__spec__:
            module.__spec__.loader = module.__loader__ = self.loader
            self.loader.exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.then()


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call `then` after the package `name` is imported; now, if it has been."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _After(name, then))
