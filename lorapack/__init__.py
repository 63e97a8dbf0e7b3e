"""lorapack: make a LoRA adapter smaller, and prove what it cost.

    import lorapack

    adapter = lorapack.read_adapter("adapter")
    made = lorapack.compress_adapter(adapter, "calibration.jsonl")
    lorapack.write_adapter(made.adapter, "smaller", report=made.report)

Importing it also teaches PEFT the compact format: `PeftModel.from_pretrained(base, "compact")` works
afterwards. Nothing heavy is imported before it is used.
"""

import importlib
from typing import Any

from lorapack._when_imported import when_imported

__version__ = "0.1.0"

_PUBLIC = {
    "METHODS": "lorapack.plan",
    "Adapter": "lorapack.core.adapter",
    "Factors": "lorapack.core.adapter",
    "InputError": "lorapack.errors",
    "Plan": "lorapack.core.plan",
    "Pointer": "lorapack.core.adapter",
    "Report": "lorapack.core.report",
    "Statistics": "lorapack.core.statistics",
    "compress_adapter": "lorapack.compress",
    "describe_adapter": "lorapack.describe",
    "evaluate_adapters": "lorapack.evaluate",
    "expand_adapter": "lorapack.expand",
    "measure_adapter": "lorapack.measure",
    "merge_adapter": "lorapack.merge.merge",
    "pack_adapter": "lorapack.pack",
    "plan_adapter": "lorapack.job",
    "read_adapter": "lorapack.hub",
    "recover_adapter": "lorapack.recovery",
    "sweep_adapter": "lorapack.sweep",
    "write_adapter": "lorapack.write",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lorapack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _plug(into: str) -> None:
    importlib.import_module(f"lorapack.plugin.{into}").register()


when_imported("peft", lambda: _plug("peft"))
when_imported("transformers.integrations.peft", lambda: _plug("transformers"))
