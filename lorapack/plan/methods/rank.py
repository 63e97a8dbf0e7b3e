"""Cut ranks: rank-one atoms of all modules compete, in one of four metrics, for a budget of parameters.

Sources: ``weight`` with ``global`` is PARA (arXiv 2604.27796); ``weight`` with ``uniform`` is what
resize tools do; ``output`` and ``loss`` are the metrics of SVD-LLM (arXiv 2403.07378) and of the
Kronecker-factored loss, restricted to the adapter's own span (docs/truncation.md).
"""

from collections.abc import Mapping
from typing import Any, Literal

from lorapack.core.adapter import Adapter, digest
from lorapack.core.plan import Choice, Metric, Plan
from lorapack.core.statistics import NEEDED, Need, Statistics, check_fits
from lorapack.errors import InputError
from lorapack.pack.truncate import shares
from lorapack.plan.allocate import Cutoff, atom_costs, by_cutoff, by_value, refuse_nothing, uniformly
from lorapack.plan.method import Method

Allocation = Literal["global", "uniform", "per-module"]


def plan(
    adapter: Adapter,
    statistics: Statistics | None,
    *,
    budget: int | None = None,
    metric: Metric = "loss",
    allocation: Allocation = "global",
    cutoff: Cutoff = "energy",
    share: float = 0.99,
) -> Plan:
    """Give every module a rank, and drop those that get none.

    Args:
        adapter: to plan for.
        statistics: measured on it; ``weight`` needs none.
        budget: the parameters allowed; needed by ``global`` and ``uniform``.
        metric: which error a cut causes, see `lorapack.pack.truncate.atoms`.
        allocation: ``global``, the atoms with the least error saved per parameter go first, whatever
            their module; ``uniform``, the same rank for all; ``per-module``, each module's own
            `cutoff`.
        cutoff, share: of ``per-module``, see `lorapack.plan.allocate.by_cutoff`.

    Raises:
        InputError: no budget, or one too small for a single atom; statistics that lack the metric.
    """
    if statistics is not None:
        check_fits(statistics, adapter)
    if allocation != "per-module" and budget is None:
        raise InputError(f"--allocation {allocation} needs a --budget")
    if not 0 < share <= 1:
        raise InputError(f"--share {share} is outside (0, 1]")
    values = {module: _values(adapter, statistics, module, metric) for module in adapter.linear}
    costs = atom_costs(adapter)
    most = {module: adapter.factors(module).rank for module in adapter.linear}
    if allocation == "per-module":
        ranks = by_cutoff(values, cutoff, share)
    elif allocation == "uniform":
        ranks = uniformly(most, costs, budget or 0)
    else:
        ranks = by_value(values, costs, budget or 0)
    refuse_nothing(ranks, costs, budget)
    choices = tuple(
        Choice(m, "keep", ranks[m], None, sum(values[m]), f"rank {ranks[m]} of {most[m]}")
        if ranks[m]
        else Choice(m, "drop", None, None, sum(values[m]), "no rank of it is worth its parameters")
        for m in adapter.linear
    )
    limit: dict[str, Any] = {"cutoff": cutoff, "share": share} if allocation == "per-module" else {"budget": budget}
    options = {"metric": metric, "allocation": allocation, **limit}
    return Plan("rank", options, choices, adapter=digest(adapter), metric=metric)


def needs(options: Mapping[str, Any]) -> Need:
    return NEEDED[options.get("metric", "loss")]


def _values(adapter: Adapter, statistics: Statistics | None, module: str, metric: Metric) -> list[float]:
    """The squared errors that the module's atoms cause when they are left out, per token, the largest first."""
    moments = statistics.modules[module] if statistics is not None else None
    lacking = moments is None or moments.backward is None or (metric == "fisher" and moments.row_backward is None)
    if metric in ("loss", "fisher") and lacking:
        raise InputError(f"--metric {metric} needs backward moments: `lorapack measure --method rank`")
    # u = dloss/dh lies before B and the scale and so contains both; the other metrics see B A alone
    scale = 1.0 if metric in ("loss", "fisher") else adapter.scale(module)
    return (shares(adapter.factors(module), metric, moments) * scale**2).tolist()


METHOD = Method(plan, needs, "cut ranks, the atoms of all modules competing for a budget (PARA, resize, output, loss)")
