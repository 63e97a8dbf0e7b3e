"""A plan: what happens to each module. Written by a method, editable by hand, obeyed by `pack`."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorapack.core import sharing as ways
from lorapack.core.adapter import Adapter
from lorapack.core.codes import sparse_parameters
from lorapack.core.sharing import Sharing
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
        elements: with ``keep`` at the full rank, how many elements of the module's `canonical` factors stay, those
            to which the loss is most sensitive; the others become zeros. None for all.
    """

    module: str
    action: Action
    rank: int | None = None
    group: str | None = None
    score: float | None = None
    reason: str = ""
    scale: float = 1.0
    elements: int | None = None


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
        sharing: how the modules of a group share, by its name; a group that is not named shares with
            a ``scale`` a layer. ``diagonal`` and ``core`` put rank or rank x rank numbers a layer
            between A and B, ``tied`` a diagonal and a vector on the outputs, ``vera`` the same with
            A and B made from the seed.
        version: of this format.
    """

    method: str
    options: Mapping[str, Any]
    choices: tuple[Choice, ...]
    groups: Mapping[str, int] = field(default_factory=dict)
    adapter: str = ""
    metric: Metric | None = None
    sharing: Mapping[str, Sharing] = field(default_factory=dict)
    version: int = VERSION

    def way(self, group: str) -> Sharing:
        """How the modules of a group share."""
        return self.sharing.get(group, "scale")

    def members(self, group: str) -> list[str]:
        return [choice.module for choice in self.choices if choice.group == group]


def parameters(plan: Plan, adapter: Adapter) -> int:
    """How many parameters the packed linear factors will have."""

    def pair(module: str, rank: int) -> int:
        d_out, d_in = adapter.factors(module).shape
        return rank * (d_out + d_in)

    kept: dict[str, int] = {}
    vectors = 0
    for choice in plan.choices:
        if choice.action in ("keep", "grow") and choice.rank is not None:
            pointer = adapter.modules[choice.module]
            if choice.elements is not None:
                kept[choice.module] = sparse_parameters(choice.elements, pair(choice.module, choice.rank))
            elif choice.rank != adapter.pool[pointer.factors].rank:
                kept[choice.module] = pair(choice.module, choice.rank)
            else:
                kept[pointer.factors] = adapter.pool[pointer.factors].parameters
                vectors += sum(t.numel() for t in pointer.own)
    shared = 0
    for group, rank in plan.groups.items():
        members = plan.members(group)
        shared += ways.parameters(plan.way(group), rank, adapter.factors(members[0]).shape, len(members))
    return sum(kept.values()) + vectors + shared


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
            if choice.elements is not None and not (
                rank == choice.rank and 1 <= choice.elements <= rank * sum(shape) and choice.action == "keep"
            ):
                raise InputError(
                    f"plan: {choice.module} keeps {choice.elements} elements at rank {choice.rank}, possible are 1 to "
                    f"{rank * sum(shape)} at rank {rank}"
                )
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
        if rank < 1 or (rank > min(most, *shapes.pop()) and plan.way(group) != "vera"):
            raise InputError(f"plan: group {group!r} asks for rank {rank}, which its modules cannot fill")
        if not group or not all(c.isalnum() or c in "._-" for c in group):
            raise InputError(f"plan: the group name {group!r} has characters other than letters, digits, . _ -")
    for group in plan.sharing:
        if group not in plan.groups:
            raise InputError(f"plan: `sharing` names the group {group!r}, which `groups` lacks")


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
