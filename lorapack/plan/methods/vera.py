"""VeRA: A and B are random and the same for all modules, a module stores two vectors.

Source: "VeRA: Vector-based Random Matrix Adaptation" (arXiv 2310.11454).
"""

from lorapack.core.adapter import Adapter, digest
from lorapack.core.plan import Choice, Plan
from lorapack.core.statistics import Statistics
from lorapack.errors import InputError
from lorapack.plan.method import Method

MOST = 1024  # of a rank that follows from a budget, the largest of the paper: the fit solves systems of that size


def plan(
    adapter: Adapter, statistics: Statistics | None, *, budget: int | None = None, rank: int | None = None
) -> Plan:
    """One rank for all modules; the modules of a shape are a group, and smaller shapes have slices of the larger.

    Args:
        adapter: to plan for.
        statistics: not looked at; packing fits the vectors on the inputs where there are data.
        budget: the parameters allowed: a module has its rank and its outputs in numbers. No rank above
            `MOST` is taken from it.
        rank: instead of a budget.

    Raises:
        InputError: neither a budget nor a rank, both, or a budget too small for rank one.
    """
    if (budget is None) == (rank is None):
        raise InputError("vera needs a --budget or a --rank, and not both")
    outputs = sum(adapter.factors(m).shape[0] for m in adapter.linear)
    if rank is None:
        rank = min(((budget or 0) - outputs) // len(adapter.linear), MOST)
        if rank < 1:
            least = outputs + len(adapter.linear)
            raise InputError(f"a budget of {budget:,} parameters is too small for vera: rank one takes {least:,}")
        options = {"budget": budget, "rank": rank}
    else:
        options = {"rank": rank}
    if rank < 1:
        raise InputError(f"--rank {rank} must be 1 or more")
    groups = {}
    choices = []
    for m in adapter.linear:
        d_out, d_in = adapter.factors(m).shape
        group = adapter.free_name(f"vera.{d_out}x{d_in}")
        groups[group] = rank
        choices.append(Choice(m, "share", None, group, None, "two vectors on seeded factors"))
    return Plan("vera", options, tuple(choices), groups, adapter=digest(adapter), sharing=dict.fromkeys(groups, "vera"))


METHOD = Method(plan, lambda options: "nothing", "seeded random A and B for all modules, two vectors for each")
