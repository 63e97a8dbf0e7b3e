"""Tied-LoRA: the modules of a type share A and B, each has a vector of its own on the rank and on the outputs.

Source: "Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying" (arXiv 2311.09578).
"""

from typing import Literal, get_args

from lorapack.core import sharing as ways
from lorapack.core.adapter import Adapter, digest
from lorapack.core.names import module_type, short_types
from lorapack.core.plan import Choice, Plan
from lorapack.core.sharing import Sharing
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError
from lorapack.plan.method import Method

Way = Literal["scale", "diagonal", "core", "tied"]


def plan(
    adapter: Adapter,
    statistics: Statistics | None,
    *,
    budget: int | None = None,
    rank: int | None = None,
    sharing: Way = "tied",
) -> Plan:
    """One shared pair for every module type and shape; the same rank for all, as far as the budget goes.

    What the budget leaves over goes to the lower groups, one rank more each.

    Args:
        adapter: to plan for.
        statistics: not looked at; packing fits the pair on the inputs where there are data.
        budget: the parameters allowed.
        rank: instead of a budget.
        sharing: what a layer has of its own: a ``scale``, a ``diagonal`` or a full ``core`` between A and
            B, or ``tied``, the paper's diagonal and output vector. (``vera`` is the method of that name.)

    Raises:
        InputError: neither a budget nor a rank, both, or a budget too small for rank one.
    """
    if sharing not in get_args(Way):
        raise InputError(f"--sharing {sharing!r} is none of scale, diagonal, core, tied")
    if (budget is None) == (rank is None):
        raise InputError("tied needs a --budget or a --rank, and not both")
    rank = None if rank is None else int(rank)  # `lorapack sweep` gives every number as a float
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank} must be 1 or more")
    groups = by_type_and_shape(adapter)
    shapes = {group: adapter.factors(members[0]).shape for group, members in groups.items()}
    most = {
        group: min(sum(adapter.factors(m).rank for m in members), *shapes[group]) for group, members in groups.items()
    }
    if rank is not None:
        ranks = {group: min(rank, most[group]) for group in groups}
    else:
        ranks = _fill(groups, shapes, most, sharing, budget or 0)
    choices = {m: Choice(m, "share", None, group, None, "its type shares") for group, ms in groups.items() for m in ms}
    options = {"sharing": sharing, **({"rank": rank} if rank is not None else {"budget": budget})}
    return Plan(
        "tied",
        options,
        tuple(choices[m] for m in adapter.linear),
        ranks,
        adapter=digest(adapter),
        sharing=dict.fromkeys(ranks, sharing),
    )


def by_type_and_shape(adapter: Adapter) -> dict[str, list[str]]:
    """Group name to the modules of one type and shape, in the order of the layers."""
    short = short_types(adapter.linear)
    found: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for m in adapter.linear:
        found.setdefault((module_type(m), adapter.factors(m).shape), []).append(m)
    names: dict[str, list[str]] = {}
    for (kind, (d_out, d_in)), members in found.items():
        alone = sum(other == kind for other, _ in found) == 1
        names[adapter.free_name("tied." + short[kind] + ("" if alone else f".{d_out}x{d_in}"))] = members
    return names


def _fill(
    groups: dict[str, list[str]],
    shapes: dict[str, tuple[int, int]],
    most: dict[str, int],
    sharing: Sharing,
    budget: int,
) -> dict[str, int]:
    def cost(group: str, rank: int) -> int:
        return ways.parameters(sharing, rank, shapes[group], len(groups[group]))

    ranks = dict.fromkeys(groups, 1)
    spent = sum(cost(group, 1) for group in groups)
    if spent > budget:
        raise InputError(f"a budget of {budget:,} parameters is too small for tied: rank one takes {spent:,}")
    for rank in range(2, max(most.values()) + 1):
        for group in groups:
            more = cost(group, rank) - cost(group, rank - 1)
            if ranks[group] == rank - 1 and rank <= most[group] and spent + more <= budget:
                ranks[group], spent = rank, spent + more
    return ranks


METHOD = Method(
    plan, lambda options: "nothing", "share A and B within a type, with vectors of their own for every layer"
)
