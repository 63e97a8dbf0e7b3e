"""AdaLoRA's cut, once: singular triplets by sensitivity times uncertainty.

Source: AdaLoRA (arXiv 2303.10512), section 3.2, on a trained adapter instead of during its training.
"""

from lorapack.core.adapter import Adapter, digest
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.plan.allocate import atom_costs, by_value, refuse_nothing
from lorapack.plan.method import Method


def plan(adapter: Adapter, statistics: Statistics, *, budget: int | None = None) -> Plan:
    """Give every module a rank: as many triplets as have an importance above what the budget allows.

    The importance decides how many triplets a module keeps; those it keeps are its largest ones,
    which a cut in the ``weight`` metric leaves. (AdaLoRA zeroes the unimportant ones and trains on;
    for a trained adapter the two orders nearly agree, and this one keeps the smaller error.)

    Args:
        adapter: to plan for.
        statistics: measured with ``gradients``.
        budget: the parameters allowed.

    Raises:
        InputError: no budget, one below one triplet, or statistics without gradients.
    """
    check_fits(statistics, adapter)
    if budget is None:
        raise InputError("adalora needs --budget")
    values = {}
    for m in adapter.linear:
        found = statistics.modules[m].triplets
        if found is None:
            raise InputError("adalora needs gradients: `lorapack measure --method adalora`, or give --data")
        values[m] = sorted(found.tolist(), reverse=True)
    costs = atom_costs(adapter)
    ranks = by_value(values, costs, budget)
    refuse_nothing(ranks, costs, budget)
    choices = tuple(
        Choice(m, "keep", ranks[m], None, sum(values[m]), f"{ranks[m]} of {len(values[m])} triplets")
        if ranks[m]
        else Choice(m, "drop", None, None, sum(values[m]), "no triplet of it is important enough")
        for m in adapter.linear
    )
    return Plan("adalora", {"budget": budget}, choices, adapter=digest(adapter), metric="weight")


METHOD = Method(plan, lambda options: "gradients", "cut singular triplets by AdaLoRA's sensitivity times uncertainty")
