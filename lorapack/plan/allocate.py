"""Give a budget of parameters to rank-one atoms: which rank each module gets."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError

Cutoff = Literal["energy", "frobenius", "cumulative", "ratio"]


def atom_costs(adapter: Adapter) -> dict[str, int]:
    """The parameters of one rank of every linear module, d_in + d_out, lower layers first."""
    return {module: sum(adapter.factors(module).shape) for module in adapter.linear}


def refuse_nothing(ranks: Mapping[str, int], costs: Mapping[str, int], budget: int | None) -> None:
    """Refuse a plan that keeps nothing.

    Raises:
        InputError: no module has a rank; names the least that one takes.
    """
    if not any(ranks.values()):
        if budget is None:
            raise InputError("every update of the adapter is zero: there is nothing to keep")
        least = min(costs.values())
        raise InputError(f"a budget of {budget:,} parameters is too small: one rank of one module takes {least:,}")


def by_value(values: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Take the atoms of the best value per parameter until the budget is spent.

    An atom that no longer fits is passed over, and with it the later ones of its module. Optimal
    where all costs are equal; otherwise at most one atom away from the optimum.

    Args:
        values: for each module the values of its atoms, falling; none negative.
        costs: for each module the parameters of one atom, d_in + d_out.
        budget: the parameters allowed.

    Returns:
        The rank of every module, 0 for those that get nothing. Ties go to the earlier module.
    """
    atoms = [
        (-value / costs[module], place, number, module)
        for place, (module, found) in enumerate(values.items())
        for number, value in enumerate(found)
    ]
    ranks = dict.fromkeys(values, 0)
    spent = 0
    for _, _, number, module in sorted(atoms):
        if number == ranks[module] and spent + costs[module] <= budget:
            ranks[module] += 1
            spent += costs[module]
    return ranks


def uniformly(most: Mapping[str, int], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The same rank for every module, as far as it has one; what is left goes to the lower layers, one rank more each.

    Args:
        most: the present rank of every module, lower layers first.
        costs, budget: as in `by_value`.
    """
    ranks = dict.fromkeys(most, 0)
    spent = 0
    for rank in range(1, max(most.values()) + 1):
        for module, cost in costs.items():
            if most[module] >= rank and ranks[module] == rank - 1 and spent + cost <= budget:
                ranks[module] = rank
                spent += cost
    return ranks


def by_cutoff(values: Mapping[str, Sequence[float]], cutoff: Cutoff, share: float) -> dict[str, int]:
    """For every module the lowest rank that keeps enough of it; 0 where it has no value at all.

    Args:
        values: for each module the squares of its singular values, falling.
        cutoff: enough is what holds `share` of the sum of the squares (``energy``), of the root of
            that sum (``frobenius``), of the sum of the singular values (``cumulative``), or every one
            of them that is at least `share` times the largest (``ratio``).
        share: above 0, at most 1.
    """
    ranks = {}
    for module, found in values.items():
        if cutoff == "ratio":
            ranks[module] = sum(value > 0 and value >= share**2 * found[0] * (1 - 1e-12) for value in found)
            continue
        parts = [value**0.5 for value in found] if cutoff == "cumulative" else found
        aim = (share**2 if cutoff == "frobenius" else share) * sum(parts) * (1 - 1e-12)
        reached = [0.0, *itertools.accumulate(parts)]
        ranks[module] = next((rank for rank, held in enumerate(reached) if held >= aim), len(found))
    return ranks
