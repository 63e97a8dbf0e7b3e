"""SNIP: what a small change of every element would do to the loss.

Sources: SNIP (arXiv 1810.02340); on adapters, SparseAdapter (arXiv 2210.04284).
"""

from lorapack.core.adapter import Adapter, digest
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.plan.method import Method


def plan(adapter: Adapter, statistics: Statistics, *, budget: int | None = None) -> Plan:
    """Keep the modules with the most |theta * dloss/dtheta| per parameter, as they are; drop the others.

    Args:
        adapter: to plan for.
        statistics: measured with ``gradients``.
        budget: the parameters allowed.

    Raises:
        InputError: no budget, one below one module, or statistics without gradients.
    """
    check_fits(statistics, adapter)
    if budget is None:
        raise InputError("snip needs --budget")
    score = {m: saliency(statistics, m) for m in adapter.linear}
    cost = {m: adapter.factors(m).parameters for m in adapter.linear}
    kept, left = set(), budget
    for m in sorted(score, key=lambda m: -score[m] / cost[m]):
        if cost[m] <= left:
            kept.add(m)
            left -= cost[m]
    if not kept:
        least = min(cost.values())
        raise InputError(f"a budget of {budget:,} parameters is too small for snip: one module takes {least:,}")
    choices = tuple(
        Choice(m, "keep", adapter.factors(m).rank, None, score[m], "the loss is sensitive to it")
        if m in kept
        else Choice(m, "drop", None, None, score[m], "the loss is less sensitive to it")
        for m in adapter.linear
    )
    return Plan("snip", {"budget": budget}, choices, adapter=digest(adapter))


def saliency(statistics: Statistics, module: str) -> float:
    """Sum of |theta * dloss/dtheta| over the module's elements, per unit of weight.

    Raises:
        InputError: statistics without gradients.
    """
    moments = statistics.modules[module]
    if moments.taylor_a is None or moments.taylor_b is None:
        raise InputError("snip needs gradients: `lorapack measure --method snip`, or give --data")
    return float(moments.taylor_a.abs().sum() + moments.taylor_b.abs().sum()) / statistics.weight


METHOD = Method(plan, lambda options: "gradients", "keep the modules to whose elements the loss is most sensitive")
