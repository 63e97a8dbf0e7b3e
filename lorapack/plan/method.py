"""What a compression method is to the rest of lorapack."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorapack.core.adapter import Adapter
from lorapack.core.plan import Plan
from lorapack.core.statistics import Need, Statistics
from lorapack.errors import InputError


@dataclass(frozen=True)
class Option:
    """One option of a method, as its signature declares it.

    Attributes:
        default: its default value.
        choices: the values it takes, where it is one of a few.
        kind: float, int, bool or str.
    """

    default: Any
    kind: type
    choices: tuple[str, ...] = ()

    def parse(self, flag: str, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            InputError: it is none of the choices, or no number.
        """
        if self.choices:
            if text not in self.choices:
                raise InputError(f"{flag} {text!r} is none of {', '.join(self.choices)}")
            return text
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise InputError(f"{flag} {text!r} is neither true nor false")
            return text.lower() == "true"
        try:
            return self.kind(text)
        except ValueError:
            number = "a whole number" if self.kind is int else "a number"
            raise InputError(f"{flag} {text!r} is not {number}") from None


@dataclass(frozen=True)
class Method:
    """A way to decide what happens to each module.

    Attributes:
        plan: ``plan(adapter, statistics, *, budget=None, **options)``; its keyword arguments are its
            options, with their types and defaults.
        needs: of the options that are in force, what has to be measured.
        summary: one line for `lorapack methods`.
        tried: values of an option that `compress` and `sweep` try, where it is not given, keeping the
            one that measures best on the selection rows.
        again: whether `compress` and `sweep` measure once more, with what the plan has made of the adapter, and try
            what both measurements together say as well.
    """

    plan: Callable[..., Plan]
    needs: Callable[[Mapping[str, Any]], Need]
    summary: str
    tried: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    again: bool = False

    @property
    def options(self) -> dict[str, Option]:
        """Its own options by name, in the order of the signature."""
        parameters = inspect.signature(self.plan, eval_str=True).parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "budget"]
        return {p.name: _option(p.annotation, p.default) for p in own}

    def parse(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options as values; texts, as a command line gives them, are parsed.

        Raises:
            InputError: an option the method does not have, or a value it does not take; names it.
        """
        options = self.options
        for option in given:
            if option not in options:
                known = ", ".join(map(flag, options)) or "no options of its own"
                raise InputError(f"{name} has no {flag(option)}; it has {known}")
        return {o: options[o].parse(flag(o), v) if isinstance(v, str) else v for o, v in given.items()}

    def run(
        self, adapter: Adapter, statistics: Statistics | None, budget: int | None, options: Mapping[str, Any]
    ) -> Plan:
        return self.plan(adapter, statistics, budget=budget, **options)


def flag(option: str) -> str:
    """How the command line writes it."""
    return "--" + option.replace("_", "-")


def _option(annotation: Any, default: Any) -> Option:
    if typing.get_origin(annotation) is types.UnionType:  # X | None
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    if typing.get_origin(annotation) is Literal:
        return Option(default, str, typing.get_args(annotation))
    return Option(default, annotation)
