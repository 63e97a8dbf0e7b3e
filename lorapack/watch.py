"""How a long loop is watched: a function that passes its items on and may show how far it is."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Watch(Protocol):
    """Called with the step's name, its items and, where they have no length, how many there are."""

    def __call__(self, step: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]: ...


def unwatched(step: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]:
    return items
