"""What a compression method is to the rest of lorapack."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorapack.core.adapter import Adapter
from lorapack.core.plan import Metric, Plan
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError


@dataclass(frozen=True)
class Method:
    """A way to decide what happens to each module.

    Attributes:
        plan: ``plan(adapter, statistics, *, budget=None, **options)``; its keyword arguments are its
            options, and their defaults are the options' defaults.
        needs: of the options that are in force, what has to be measured: ``weight`` nothing, ``output``
            the forward moments, ``loss`` the backward moments as well.
        summary: one line for `lorapack methods`.
    """

    plan: Callable[..., Plan]
    needs: Callable[[Mapping[str, Any]], Metric]
    summary: str

    @property
    def options(self) -> dict[str, Any]:
        """The names and defaults of its own options."""
        parameters = inspect.signature(self.plan).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "budget"}

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Refuse an option the method does not have.

        Raises:
            InputError: names the option and those there are.
        """
        for option in options:
            if option not in self.options:
                known = ", ".join("--" + o.replace("_", "-") for o in self.options) or "no options"
                raise InputError(f"{name} has no --{option.replace('_', '-')}; it has {known}")

    def run(
        self, adapter: Adapter, statistics: Statistics | None, budget: int | None, options: Mapping[str, Any]
    ) -> Plan:
        return self.plan(adapter, statistics, budget=budget, **options)
