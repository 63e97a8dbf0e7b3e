"""The compression methods. To add one: a file beside this, and its line here (docs/methods/adding.md)."""

from importlib import import_module

from lorapack.plan.method import Method

NAMES = (
    "adaptive",
    "lora-drop",
    "rank",
    "weightlora",
    "snip",
    "adalora",
)

METHODS: dict[str, Method] = {name: import_module(f"{__name__}.{name.replace('-', '_')}").METHOD for name in NAMES}
