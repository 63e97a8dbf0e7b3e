"""SNIP: what a small change of every element would do to the loss.

Sources: SNIP (arXiv 1810.02340); on adapters, SparseAdapter (arXiv 2210.04284).
"""

from typing import Literal

import torch

from lorapack.core.adapter import Adapter, digest
from lorapack.core.codes import sparse_parameters
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.plan.method import Method

Unit = Literal["module", "element"]


def plan(
    adapter: Adapter,
    statistics: Statistics,
    *,
    budget: int | None = None,
    unit: Unit = "module",
    keep: float | None = None,
) -> Plan:
    """Keep what has the most |theta * dloss/dtheta|, as it is; drop the rest.

    Args:
        adapter: to plan for.
        statistics: measured with ``gradients``.
        budget: the parameters allowed.
        unit: whole modules, the most sensitive per parameter, or single elements, wherever they are.
        keep: of elements, the share that stays, instead of a budget (SparseAdapter's keep rate).

    Raises:
        InputError: no budget, one too small for one module or element, a share outside (0, 1] or of
            modules, or statistics without gradients.
    """
    check_fits(statistics, adapter)
    if keep is not None and (unit != "element" or budget is not None or not 0 < keep <= 1):
        raise InputError("--keep is a share above 0, at most 1, of --unit element, and takes the place of --budget")
    if budget is None and keep is None:
        raise InputError("snip needs --budget")
    options = {"budget": budget, "unit": unit, "keep": keep}
    choices = (
        _elements(adapter, statistics, budget, keep)
        if unit == "element"
        else _modules(adapter, statistics, budget or 0)
    )
    return Plan("snip", options, choices, adapter=digest(adapter))


def _modules(adapter: Adapter, statistics: Statistics, budget: int) -> tuple[Choice, ...]:
    score = {m: float(statistics.modules[m].saliency.sum()) / statistics.weight for m in adapter.linear}
    cost = {m: adapter.factors(m).parameters for m in adapter.linear}
    kept, left = set(), budget
    for m in sorted(score, key=lambda m: -score[m] / cost[m]):
        if cost[m] <= left:
            kept.add(m)
            left -= cost[m]
    if not kept:
        least = min(cost.values())
        raise InputError(f"a budget of {budget:,} parameters is too small for snip: one module takes {least:,}")
    return tuple(
        Choice(m, "keep", adapter.factors(m).rank, None, score[m], "the loss is sensitive to it")
        if m in kept
        else Choice(m, "drop", None, None, score[m], "the loss is less sensitive to it")
        for m in adapter.linear
    )


def _elements(adapter: Adapter, statistics: Statistics, budget: int | None, keep: float | None) -> tuple[Choice, ...]:
    """One threshold for all elements of all modules; a module pays for its mask with its first element."""
    score = {m: statistics.modules[m].saliency for m in adapter.linear}
    values = torch.cat(list(score.values()))
    order = torch.argsort(values, descending=True, stable=True)
    of_module = torch.repeat_interleave(torch.tensor([len(s) for s in score.values()]))[order]
    cost = torch.ones(len(order), dtype=torch.int64)
    for number, found in enumerate(score.values()):
        first = int((of_module == number).int().argmax())
        cost[first] = sparse_parameters(1, len(found))
    taken = round(keep * len(order)) if keep is not None else int((cost.cumsum(0) <= (budget or 0)).sum())
    if not taken:
        raise InputError("too small for snip: not one element is kept")
    count = torch.bincount(of_module[:taken], minlength=len(score)).tolist()
    return tuple(
        Choice(m, "keep", adapter.factors(m).rank, None, total, f"{n} of {len(found)} elements", elements=n)
        if n
        else Choice(m, "drop", None, None, total, "no element of it is sensitive enough")
        for (m, found), n in zip(score.items(), count, strict=True)
        for total in [float(found.sum()) / statistics.weight]
    )


METHOD = Method(plan, lambda options: "gradients", "keep the modules, or elements, to which the loss is most sensitive")
