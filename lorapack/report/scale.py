"""Numbers onto axes: ranges, ticks and positions; nothing is drawn here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Axis:
    """A range of numbers that is drawn from 0 to 1.

    Attributes:
        low, high: its ends, not equal; above 0 where it is logarithmic.
        ticks: round numbers in it.
        log: whether equal distances are equal ratios.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a number lies, 0 at `low` and 1 at `high`; one outside is drawn at the end."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, max(value, self.low)))
        return min((value - low) / (high - low), 1.0)


def linear(values: Iterable[float], ticks: int = 5) -> Axis:
    """An axis over finite values with about so many round ticks, which lie at its ends."""
    low, high = _ends(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in STEPS if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(round(n * step, 12) for n in range(first, last + 1))
    return Axis(marks[0], marks[-1], marks)


def logarithmic(values: Iterable[float], most: int = 6) -> Axis:
    """An axis over the values above 0, with ticks at 1, 2 and 5 times powers of ten, or at the powers alone."""
    low, high = _ends(v for v in values if v > 0)
    if low == high:
        low, high = low / 2, high * 2
    low, high = low / 1.08, high * 1.08
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [s * 10.0**p for p in powers for s in STEPS[:3] if low <= s * 10.0**p <= high]
    coarse = [10.0**p for p in powers if low <= 10.0**p <= high]
    ticks = fine if len(fine) <= most or len(coarse) < 2 else coarse
    return Axis(low, high, tuple(ticks[:: max(1, -(-len(ticks) // most))]), log=True)


def _ends(values: Iterable[float]) -> Sequence[float]:
    found = [v for v in values if math.isfinite(v)] or [1.0]
    return min(found), max(found)
