"""LoRA-drop: keep the layers whose low-rank output is large, let the others share one adapter.

Source: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation" (arXiv 2402.07721).
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.names import module_type, order
from lorapack.core.plan import Choice, Plan, parameters
from lorapack.core.statistics import Statistics, check_fits, output_norms
from lorapack.errors import InputError
from lorapack.plan.method import Method

ROUNDING = 1e-12  # relative


def plan(adapter: Adapter, statistics: Statistics, *, budget: int | None = None, threshold: float = 0.9) -> Plan:
    """Plan as the paper does: importance by output norm, per module type, kept from the top.

    Importance of a module is E||scale * B A x||^2 divided by the sum over its type. The modules of
    a type are kept in falling order until their importance reaches `threshold`; the rest, by
    shape, point to one shared adapter of the largest rank among them. A module that would share
    with nobody keeps its own.

    Args:
        adapter: to plan for.
        statistics: measured on it (only the forward moments are used).
        threshold: the paper's T, above 0 and at most 1; the module that crosses it is kept.
        budget: instead of a threshold, the parameters allowed: the largest threshold that fits.

    Raises:
        InputError: a threshold outside (0, 1], a budget no threshold fits, or foreign statistics.
    """
    check_fits(statistics, adapter)
    norms = output_norms(adapter, statistics)
    if budget is None:
        if not 0 < threshold <= 1:
            raise InputError(f"threshold {threshold} is outside (0, 1]")
        return replace(_at(adapter, norms, threshold, statistics.average), adapter=digest(adapter))
    thresholds = candidates(adapter, norms)
    if adapter.groups:  # what is shared already is not freed by giving up one of its users: look at every plan
        plans = (_at(adapter, norms, t, statistics.average) for t in reversed(thresholds))
        found = next((p for p in plans if parameters(p, adapter) <= budget), None)
    else:  # the size never falls as the threshold rises
        last = bisect.bisect_right(
            thresholds, budget, key=lambda t: parameters(_at(adapter, norms, t, statistics.average), adapter)
        )
        found = _at(adapter, norms, thresholds[last - 1], statistics.average) if last else None
    if found is None:
        whole = size(adapter).parameters
        least = min(parameters(_at(adapter, norms, t, statistics.average), adapter) for t in thresholds)
        raise InputError(
            f"a budget of {budget:,} parameters is too small for lora-drop: its smallest plan for this adapter "
            f"has {least:,} ({least / whole:.1%})"
        )
    return replace(found, adapter=digest(adapter))


def keep_until(importance: Mapping[str, float], threshold: float) -> list[str]:
    """The modules kept: from the most important down until their sum reaches the threshold's share.

    The crossing module is included; ties go by layer order, the lower layer first. A sum that is
    short of the threshold by rounding alone has reached it; a threshold of 1 keeps every module
    that contributes at all.

    Args:
        importance: of the modules of one type, any unit, none negative.
        threshold: the share of their sum that is to be reached, above 0 and at most 1.
    """
    ranked = sorted(importance, key=lambda module: (-importance[module], order(module)))
    if threshold >= 1:
        return [module for module in ranked if importance[module] > 0]
    aim = threshold * math.fsum(importance.values()) * (1 - ROUNDING)
    reached = itertools.accumulate(importance[module] for module in ranked)
    before = [0.0, *reached]
    return [module for module, sum_before in zip(ranked, before, strict=False) if sum_before < aim]


def by_type(modules: Sequence[str]) -> dict[str, list[str]]:
    types: dict[str, list[str]] = {}
    for module in modules:
        types.setdefault(module_type(module), []).append(module)
    return types


def candidates(adapter: Adapter, norms: Mapping[str, float]) -> list[float]:
    """The thresholds at which the plan changes, rising: one plan lies between two neighbours."""
    found = {1.0}
    for modules in by_type(adapter.linear).values():
        total = math.fsum(norms[m] for m in modules)
        ranked = sorted((norms[m] for m in modules), reverse=True)
        if total > 0:
            found |= {min(1.0, math.fsum(ranked[: n + 1]) / total) for n in range(len(ranked))}
    return sorted(found)


def _at(adapter: Adapter, norms: Mapping[str, float], threshold: float, average: str) -> Plan:
    choices: dict[str, Choice] = {}
    groups: dict[str, int] = {}
    for kind, modules in by_type(adapter.linear).items():
        total = math.fsum(norms[m] for m in modules)
        share = {m: norms[m] / total if total > 0 else 0.0 for m in modules}
        kept = set(keep_until({m: norms[m] for m in modules}, threshold))
        for m in kept:
            choices[m] = Choice(m, "keep", adapter.factors(m).rank, None, share[m], "within the threshold")
        shapes: dict[tuple[int, int], list[str]] = {}
        for m in modules:
            if m not in kept:
                shapes.setdefault(adapter.factors(m).shape, []).append(m)
        for number, (shape, rest) in enumerate(sorted(shapes.items())):
            if len(rest) == 1:
                m = rest[0]
                choices[m] = Choice(m, "keep", adapter.factors(m).rank, None, share[m], "nobody to share with")
                continue
            group = "shared." + kind + (f".{number}" if len(shapes) > 1 else "")
            while group in adapter.pool:  # of an adapter that is compact already
                group += ".again"
            groups[group] = min(max(adapter.factors(m).rank for m in rest), *shape)
            for m in rest:
                choices[m] = Choice(m, "share", None, group, share[m], "beyond the threshold")
    options = {"threshold": threshold, "average": average}
    return Plan("lora-drop", options, tuple(choices[m] for m in adapter.linear), groups)


METHOD = Method(
    plan, lambda options: "output", "keep the modules with the largest outputs, share one adapter among the rest"
)
