"""Give a budget of parameters to rank-one atoms: which rank each module gets."""

from collections.abc import Mapping, Sequence


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


def by_share(values: Mapping[str, Sequence[float]], share: float) -> dict[str, int]:
    """For every module the lowest rank whose atoms hold at least `share` of its value; 0 where it has none."""
    ranks = {}
    for module, found in values.items():
        total, held, rank = sum(found), 0.0, 0
        while rank < len(found) and held < share * total * (1 - 1e-12):
            held += found[rank]
            rank += 1
        ranks[module] = rank
    return ranks
