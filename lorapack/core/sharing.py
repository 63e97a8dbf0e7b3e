"""The ways in which the modules of a group can share, and what each costs."""

from typing import Literal

Sharing = Literal["scale", "diagonal", "core", "tied", "vera"]
CoreKind = Literal["diagonal", "full"]

# of each way: what stands between the shared A and B in every layer, and whether it scales its outputs
CORES: dict[Sharing, CoreKind | None] = {
    "scale": None,
    "diagonal": "diagonal",
    "core": "full",
    "tied": "diagonal",
    "vera": "diagonal",
}
OUTPUTS: frozenset[Sharing] = frozenset({"tied", "vera"})


def parameters(sharing: Sharing, rank: int, shape: tuple[int, int], members: int) -> int:
    """How many parameters a group has: its factors, unless a seed makes them, and what each layer adds.

    Args:
        sharing: how its modules share.
        rank: of the shared factors.
        shape: (d_out, d_in) of its modules.
        members: how many they are.
    """
    pair = 0 if sharing == "vera" else rank * sum(shape)
    core = {None: 0, "diagonal": rank, "full": rank * rank}[CORES[sharing]]
    return pair + members * (core + (shape[0] if sharing in OUTPUTS else 0))
