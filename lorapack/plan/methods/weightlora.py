"""WeightLoRA: learn a weight for every adapter, keep the K largest.

Source: "WeightLoRA: Keep Only Necessary Adapters" (arXiv 2506.02724), on a trained adapter.
"""

from lorapack.core.adapter import Adapter, digest
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.plan.allocate import atom_costs, uniformly
from lorapack.plan.method import Method


def plan(
    adapter: Adapter,
    statistics: Statistics,
    *,
    budget: int | None = None,
    keep: int | None = None,
    expand_rank: bool = False,
) -> Plan:
    """Keep the modules with the largest |omega|, as they are; drop the others.

    A module's output is multiplied by the weight that was learnt for it while no more than K
    modules were allowed one; where no stage of the learning had exactly this K, the next larger one
    is cut to its K largest.

    Args:
        adapter: to plan for.
        statistics: measured with ``omega``.
        budget: the parameters allowed.
        keep: K, how many modules to keep; needed where there is no budget.
        expand_rank: WeightLoRA+: what the budget leaves goes to the kept, whose ranks grow by rows
            that change nothing before the recovery trains them.

    Raises:
        InputError: neither budget nor K, a K there are not as many modules for, a budget below one
            module, or statistics without omega.
    """
    check_fits(statistics, adapter)
    omegas = {m: statistics.modules[m].omega for m in adapter.linear}
    allowed = statistics.provenance.get("omega")
    if not isinstance(allowed, list) or any(o is None or len(o) != len(allowed) for o in omegas.values()):
        raise InputError("weightlora needs learnt weights: `lorapack measure --method weightlora`, or give --data")
    if keep is not None and not 1 <= keep <= len(omegas):
        raise InputError(f"--keep {keep} is outside 1 to {len(omegas)}, the number of modules")
    if keep is None and budget is None:
        raise InputError("weightlora needs --budget, or --keep with the number of modules to keep")
    cost = {m: adapter.factors(m).parameters for m in adapter.linear}
    most = keep if keep is not None else len(omegas)
    kept: dict[str, float] = {}
    while most and not kept:
        stage = max(i for i, count in enumerate(allowed) if count >= most)
        omega = {m: float(o[stage]) for m, o in omegas.items() if o is not None}
        ranked = sorted((m for m in omega if omega[m]), key=lambda m: -abs(omega[m]))[:most]
        if budget is None or sum(cost[m] for m in ranked) <= budget:
            kept = {m: omega[m] for m in ranked}
        most -= 1
    if not kept:
        raise InputError(
            f"a budget of {budget:,} parameters is too small for weightlora: one module takes {min(cost.values()):,}"
        )
    ranks = {m: adapter.factors(m).rank for m in kept}
    if expand_rank and budget is not None:
        room = {m: min(adapter.factors(m).shape) for m in kept}
        costs = atom_costs(adapter)
        ranks = {m: max(ranks[m], r) for m, r in uniformly(room, {m: costs[m] for m in room}, budget).items()}
    choices = tuple(
        Choice(
            m,
            "grow" if ranks[m] > adapter.factors(m).rank else "keep",
            ranks[m],
            None,
            abs(kept[m]),
            f"weight {kept[m]:.3g}",
            kept[m],
        )
        if m in kept
        else Choice(m, "drop", None, None, 0.0, "no weight left")
        for m in adapter.linear
    )
    options = {"keep": len(kept), "expand_rank": expand_rank, "budget": budget}
    return Plan("weightlora", options, choices, adapter=digest(adapter))


METHOD = Method(plan, lambda options: "omega", "learn a weight per module on the calibration data, keep the largest")
