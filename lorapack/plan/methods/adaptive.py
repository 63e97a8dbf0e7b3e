"""The default: ranks by what a cut does to the loss, and sharing where it earns its parameters.

Source: our own; the metric is explained in docs/truncation.md, the sharing in docs/sharing.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from lorapack.core.adapter import Adapter, digest
from lorapack.core.names import module_type
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.pack.share import Member, input_basis, share
from lorapack.pack.truncate import shares, truncate
from lorapack.plan.allocate import atom_costs, by_value, refuse_nothing
from lorapack.plan.method import Method

Curvature = Literal["fisher", "loss"]
TOP = 2  # atoms of a module that are looked at for sharing


def plan(
    adapter: Adapter,
    statistics: Statistics,
    *,
    budget: int | None = None,
    metric: Curvature = "fisher",
    peak: float | None = None,
) -> Plan:
    """Spend the budget on the rank-one atoms that save the most loss per parameter.

    Atoms and their values are those of the ``fisher`` metric, or of ``loss``, and modules are cut in the
    same one. Modules that get none are dropped, or point to one shared rank-one adapter per type and
    shape where what that saves, by the share of their updates that it can represent, is more than what
    the same parameters save as private atoms.

    Args:
        adapter: to plan for.
        statistics: measured with ``backward``.
        budget: the parameters allowed.
        metric: which; neither is the better one always, so `compress` tries both and measures.
        peak: no module gets more than so many times the rank that each would get if all got the same
            (rounded up); None for no limit. The values of single atoms do not add up when most of a module is gone, and
            an even spread is the safer the less is left; `compress` tries both ends and measures.

    Raises:
        InputError: no budget, a peak below 1, a budget below one atom, or statistics without backward
            moments.
    """
    check_fits(statistics, adapter)
    if budget is None:
        raise InputError("adaptive needs --budget, or --retain with --data")
    values: dict[str, list[float]] = {}
    for m in adapter.linear:
        moments = statistics.modules[m]
        if moments.row_backward is None:
            raise InputError("adaptive needs backward moments: `lorapack measure --method adaptive`, or give --data")
        values[m] = shares(adapter.factors(m), metric, moments).tolist()
    costs = atom_costs(adapter)
    if peak is not None:
        if not peak >= 1:
            raise InputError(f"--peak {peak} is below 1")
        even = max(1.0, budget / sum(costs.values()))
        values = {m: found[: math.ceil(min(peak * even, len(found)))] for m, found in values.items()}
    ranks = by_value(values, costs, budget)
    refuse_nothing(ranks, costs, budget)
    groups: dict[str, list[str]] = {}
    for group, members in _candidates(adapter, ranks).items():
        saved = _represented(adapter, members, values)
        left = budget - sum(costs[shared[0]] for shared in groups.values()) - costs[members[0]]
        private = by_value({m: v for m, v in values.items() if m not in members}, costs, left) if left > 0 else {}
        if _saved(values, private) + saved > _saved(values, ranks):
            groups[group] = members
            ranks = {m: private.get(m, 0) for m in values}
    of_group = {m: group for group, members in groups.items() for m in members}
    choices = tuple(_choice(m, ranks[m], of_group.get(m), values[m]) for m in adapter.linear)
    return Plan(
        "adaptive",
        {"budget": budget, "metric": metric, "peak": peak},
        choices,
        dict.fromkeys(groups, 1),
        digest(adapter),
        metric,
    )


def _choice(module: str, rank: int, group: str | None, values: Sequence[float]) -> Choice:
    if rank:
        return Choice(module, "keep", rank, None, sum(values), f"rank {rank} of {len(values)}")
    if group:
        return Choice(module, "share", None, group, sum(values), "shares what no rank of its own is worth")
    return Choice(module, "drop", None, None, sum(values), "no rank of it is worth its parameters")


def _candidates(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, list[str]]:
    """The modules without a rank, by type and shape, where there are two or more."""
    found: dict[str, list[str]] = {}
    for m in adapter.linear:
        if not ranks[m]:
            d_out, d_in = adapter.factors(m).shape
            found.setdefault(f"shared.{module_type(m)}.{d_out}x{d_in}", []).append(m)
    return {group: members for group, members in found.items() if len(members) > 1 and group not in adapter.pool}


def _represented(adapter: Adapter, members: Sequence[str], values: Mapping[str, Sequence[float]]) -> float:
    """What one shared rank saves of the members' values: by the share of each update it represents, inputs white.

    Looked at through the `TOP` largest atoms of each, which keeps the products small; what lies
    beyond them counts as not represented.
    """
    whole = {m: shares(adapter.factors(m), "weight").sum() * adapter.scale(m) ** 2 for m in members}
    pairs = [truncate(f, min(TOP, f.rank), "weight")[0] for f in map(adapter.factors, members)]
    q = input_basis(pairs)
    white = torch.eye(q.shape[0], dtype=torch.float64)
    found = share([Member(f, adapter.scale(m), white) for m, f in zip(members, pairs, strict=True)], q, 1)
    common = found.factors.B.double() @ (found.factors.A.double() @ q.T)
    saved = 0.0
    for m, f, scale in zip(members, pairs, found.scales, strict=True):
        update = adapter.scale(m) * f.B.double() @ (f.A.double() @ q.T)
        caught = float(2 * scale * (update * common).sum() - scale**2 * (common * common).sum())
        saved += sum(values[m]) * max(0.0, caught / float(whole[m])) if whole[m] else 0.0
    return saved


def _saved(values: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> float:
    return sum(sum(values[m][:rank]) for m, rank in ranks.items())


METHOD = Method(
    plan,
    lambda options: "backward",
    "ranks by what a cut does to the loss, and sharing where it pays (the default)",
    {"metric": ("fisher", "loss"), "peak": (None, 1.0)},
    again=True,
)
