"""A plan: what happens to each module. Written by a method, editable by hand, obeyed by `pack`."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError

VERSION = 1
Metric = Literal["weight", "output", "loss", "fisher"]
Action = Literal["keep", "grow", "share", "drop"]


@dataclass(frozen=True)
class Choice:
    """What happens to one module.

    Attributes:
        module: its name in the base model.
        action: ``keep`` its own factors at `rank`, let them ``grow`` to `rank`, by rows that change
            nothing until they are trained, ``share`` the factors of `group`, or ``drop`` it.
        rank: with ``keep``, 1 to its present rank; with ``grow``, above it, to what its shape can hold.
        group: with ``share``, a key of `Plan.groups`.
        score: what the method decided on (for lora-drop the normalised importance).
        reason: one phrase for the reader.
        scale: with ``keep`` and ``grow``, a factor on the module's update.
    """

    module: str
    action: Action
    rank: int | None = None
    group: str | None = None
    score: float | None = None
    reason: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The choices for all linear modules of one adapter.

    Attributes:
        method: the name of the method, or ``"by hand"``.
        options: the method's options, for the record.
        choices: one a module, lower layers first.
        groups: the shared adapters to make: name to rank.
        adapter: digest of the adapter it was made for; empty in a plan written by hand.
        metric: in which a module that keeps less than its rank is cut; None for the best that the
            statistics allow.
        version: of this format.
    """

    method: str
    options: Mapping[str, Any]
    choices: tuple[Choice, ...]
    groups: Mapping[str, int] = field(default_factory=dict)
    adapter: str = ""
    metric: Metric | None = None
    version: int = VERSION

    def members(self, group: str) -> list[str]:
        return [choice.module for choice in self.choices if choice.group == group]


def parameters(plan: Plan, adapter: Adapter) -> int:
    """How many parameters the packed linear factors will have."""

    def pair(module: str, rank: int) -> int:
        d_out, d_in = adapter.factors(module).shape
        return rank * (d_out + d_in)

    kept: dict[str, int] = {}
    for choice in plan.choices:
        if choice.action in ("keep", "grow") and choice.rank is not None:
            own = choice.rank != adapter.factors(choice.module).rank
            kept[choice.module if own else adapter.modules[choice.module].factors] = pair(choice.module, choice.rank)
    return sum(kept.values()) + sum(pair(plan.members(group)[0], rank) for group, rank in plan.groups.items())


def cuts_ranks(plan: Plan, adapter: Adapter) -> bool:
    """Whether a module keeps less than the rank it has."""
    return any(c.rank is not None and c.rank < adapter.factors(c.module).rank for c in plan.choices)


def check(plan: Plan, adapter: Adapter) -> None:
    """Refuse a plan that cannot be carried out on this adapter.

    Raises:
        InputError: names the module or group and what is wrong with it.
    """
    named = [choice.module for choice in plan.choices]
    said = set(named)
    known = set(adapter.linear)
    for module, times in Counter(named).items():
        if module not in known:
            raise InputError(f"plan: the adapter has no linear module {module!r}")
        if times > 1:
            raise InputError(f"plan: {module} is named {times} times")
    if missing := [module for module in adapter.linear if module not in said]:
        raise InputError(f"plan: nothing is said of {missing[0]}" + _more(missing))
    for choice in plan.choices:
        if choice.action in ("keep", "grow"):
            rank, shape = adapter.factors(choice.module).rank, adapter.factors(choice.module).shape
            least, most = (1, rank) if choice.action == "keep" else (rank + 1, min(shape))
            if choice.rank is None or not least <= choice.rank <= most:
                does = "keeps" if choice.action == "keep" else "grows to"
                raise InputError(f"plan: {choice.module} {does} rank {choice.rank}, possible are {least} to {most}")
            if not math.isfinite(choice.scale):
                raise InputError(f"plan: the scale {choice.scale} of {choice.module} is no finite number")
            if choice.group is not None:
                raise InputError(f"plan: {choice.module} keeps its own factors and names a group; one of the two")
        elif choice.action == "share":
            if choice.group not in plan.groups:
                raise InputError(f"plan: {choice.module} points to the group {choice.group!r}, which `groups` lacks")
        elif choice.group is not None:
            raise InputError(f"plan: {choice.module} is dropped and names a group; one of the two")
    for group, rank in plan.groups.items():
        members = plan.members(group)
        if not members:
            raise InputError(f"plan: no module points to the group {group!r}")
        shapes = {adapter.factors(module).shape for module in members}
        if len(shapes) > 1:
            raise InputError(f"plan: the modules of group {group!r} have different shapes {sorted(shapes)}")
        most = sum(adapter.factors(module).rank for module in members)
        if not 1 <= rank <= min(most, *shapes.pop()):
            raise InputError(f"plan: group {group!r} asks for rank {rank}, which its modules cannot fill")
        if not group or not all(c.isalnum() or c in "._-" for c in group):
            raise InputError(f"plan: the group name {group!r} has characters other than letters, digits, . _ -")


def _more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def to_json(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=1) + "\n"


def from_json(text: str) -> Plan:
    """Parse `plan.json`.

    Raises:
        InputError: names the field that is missing, unknown or of the wrong type.
    """
    from lorapack.core.checked import parse

    plan = parse(Plan, text, "plan.json")
    if plan.version != VERSION:
        raise InputError(f"plan.json: version {plan.version}; this lorapack reads version {VERSION}")
    return plan
