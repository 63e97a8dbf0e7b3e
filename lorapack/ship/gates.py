"""Gates: limits that a result must keep to, decided on the bound of the interval that speaks against it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lorapack.core.adapter import Size
from lorapack.core.report import GateOutcome, Interval, Quality
from lorapack.errors import GateError, InputError

NEED_QUALITY = ("min_retained", "max_loss_increase")
CAPTIONS = {
    "min-retained": "gain retained",
    "max-loss-increase": "loss increase",
    "max-bytes": "LoRA bytes",
    "max-params": "LoRA parameters",
}


@dataclass(frozen=True)
class Gates:
    """The limits that were asked for; None where there is none.

    Attributes:
        min_retained: least share of the gain retained, 0.99 for 99%.
        max_loss_increase: most that the loss may rise over the original's, nats a prediction (or squared error).
        max_bytes, max_params: most bytes and parameters of the low-rank factors, counted as in `Size`.
    """

    min_retained: float | None = None
    max_loss_increase: float | None = None
    max_bytes: int | None = None
    max_params: int | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and (not math.isfinite(limit) or (limit < 0 and name not in NEED_QUALITY)):
                raise InputError(f"--{name.replace('_', '-')} {limit}: give a finite number, for sizes 0 or more")

    def __bool__(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())

    @property
    def of_quality(self) -> list[str]:
        """The options given that need figures of quality."""
        return ["--" + name.replace("_", "-") for name in NEED_QUALITY if getattr(self, name) is not None]


def judge(gates: Gates, size: Size, quality: Quality | None) -> tuple[GateOutcome, ...]:
    """The outcome of each gate that was asked for.

    The lower bound of the gain retained and the upper bound of the loss increase decide; a figure that is
    not defined, or has no bound, does not pass.

    Args:
        gates: the limits.
        size: of the result.
        quality: of the result beside its base and its original.

    Raises:
        InputError: a gate on quality without figures of quality.
    """
    if gates.of_quality and (quality is None or "compressed" not in next(iter(quality.metrics.values()))):
        raise InputError(f"{gates.of_quality[0]} needs figures of quality, and none were measured")
    retained = quality.retained if quality else None
    increase = quality.increase if quality else None
    figures = (
        ("min-retained", gates.min_retained, retained),
        ("max-loss-increase", gates.max_loss_increase, increase),
        ("max-bytes", gates.max_bytes, _exact(size.bytes)),
        ("max-params", gates.max_params, _exact(size.parameters)),
    )
    return tuple(_outcome(name, limit, figure) for name, limit, figure in figures if limit is not None)


def demand(outcomes: Sequence[GateOutcome], written: str | None = None) -> None:
    """Raise unless all gates are met.

    Args:
        outcomes: of `judge`.
        written: what stays although a gate is not met.

    Raises:
        GateError: one line with every gate that is not met, its figure and its bound.
    """
    missed = "; ".join(explained(outcome) for outcome in outcomes if not outcome.met)
    if missed:
        raise GateError(f"gate not met: {missed}" + (f" ({written} was written and stays)" if written else ""))


def explained(outcome: GateOutcome) -> str:
    """One gate in words: the option, the figure with its interval, the bound that decided."""
    name, figure, bound = outcome.gate, outcome.figure, outcome.bound
    least = name.startswith("min")
    option = f"--{name} {_shown(name, outcome.limit)}"
    if figure is None or figure.value is None:
        why = "the original is not measurably better than the base on these rows" if least else "it is no finite number"
        return f"{option}: {CAPTIONS[name]} is not defined ({why})"
    said = f"{option}: {CAPTIONS[name]} {_shown(name, figure.value)}"
    if figure.low is None or figure.high is None or bound is None:
        return f"{said} has no interval"
    if figure.low < figure.high:
        said += f" [{_shown(name, figure.low)}, {_shown(name, figure.high)}]"
        said += f", {'lower' if least else 'upper'} bound {_shown(name, bound)}"
    if outcome.met:
        return f"{said} is {'not below' if least else 'not above'} it"
    return f"{said} is {'below' if least else 'above'} it"


def _outcome(name: str, limit: float, figure: Interval | None) -> GateOutcome:
    least = name.startswith("min")
    bound = None if figure is None else figure.low if least else figure.high
    met = bound is not None and (bound >= limit if least else bound <= limit)
    return GateOutcome(name, limit, figure, bound, met)


def _exact(number: int) -> Interval:
    return Interval(number, number, number)


def _shown(name: str, value: float) -> str:
    """With as many digits as tell a figure from its limit."""
    if name == "min-retained":
        return f"{value:.2%}"
    return f"{value:.5g}" if name == "max-loss-increase" else f"{value:,.0f}"
