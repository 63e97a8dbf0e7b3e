"""LoRA-drop: keep the layers whose low-rank output is large, let the others share one adapter.

Source: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation" (arXiv 2402.07721).
"""

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lorapack.core.adapter import Adapter, digest, size
from lorapack.core.names import by_type, order
from lorapack.core.plan import Choice, Plan, parameters
from lorapack.core.statistics import Statistics, check_fits, importances, output_norms
from lorapack.errors import InputError
from lorapack.plan.method import Method

ROUNDING = 1e-12  # relative


Select = Literal["importance", "inverse", "random", "top", "bottom"]
Pruned = Literal["share", "drop"]


def plan(
    adapter: Adapter,
    statistics: Statistics,
    *,
    budget: int | None = None,
    threshold: float = 0.9,
    select: Select = "importance",
    pruned: Pruned = "share",
    groups: int = 1,
    draw: int = 0,
) -> Plan:
    """Plan as the paper does: importance by output norm, per module type, kept from the top.

    Importance of a module is E||scale * B A x||^2 divided by the sum over its type. The modules of
    a type are kept in falling order until their importance reaches `threshold`; the rest, by
    shape, point to one shared adapter of the largest rank among them. A module that would share
    with nobody keeps its own.

    Args:
        adapter: to plan for.
        statistics: measured on it (only the forward moments are used).
        threshold: the paper's T, above 0 and at most 1; the module that crosses it is kept.
        select: which modules are kept: the most important, or, as many of each type, what the paper
            compares with: the least important (``inverse``), any (``random``, seeded with `draw`), the
            upper layers (``top``) or the lower ones (``bottom``).
        pruned: whether the others ``share`` or are given up (``drop``).
        groups: at most so many shared adapters a type and shape, for layers that are alike.
        budget: instead of a threshold, the parameters allowed: the largest threshold that fits.

    Raises:
        InputError: a threshold outside (0, 1], a budget no threshold fits, or foreign statistics.
    """
    check_fits(statistics, adapter)
    if groups < 1:
        raise InputError(f"--groups {groups} must be 1 or more")
    norms = output_norms(adapter, statistics)
    options = {"average": statistics.average, "select": select, "pruned": pruned, "groups": groups, "draw": draw}
    if budget is None:
        if not 0 < threshold <= 1:
            raise InputError(f"threshold {threshold} is outside (0, 1]")
        return replace(_at(adapter, norms, threshold, options), adapter=digest(adapter))
    thresholds = candidates(adapter, norms)
    if adapter.groups:  # what is shared already is not freed by giving up one of its users: look at every plan
        plans = (_at(adapter, norms, t, options) for t in reversed(thresholds))
        found = next((p for p in plans if parameters(p, adapter) <= budget), None)
    else:  # the size never falls as the threshold rises
        last = bisect.bisect_right(
            thresholds, budget, key=lambda t: parameters(_at(adapter, norms, t, options), adapter)
        )
        found = _at(adapter, norms, thresholds[last - 1], options) if last else None
    if found is None:
        whole = size(adapter).parameters
        least = min(parameters(_at(adapter, norms, t, options), adapter) for t in thresholds)
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


def candidates(adapter: Adapter, norms: Mapping[str, float]) -> list[float]:
    """The thresholds at which the plan changes, rising: one plan lies between two neighbours."""
    found = {1.0}
    for modules in by_type(adapter.linear).values():
        total = math.fsum(norms[m] for m in modules)
        ranked = sorted((norms[m] for m in modules), reverse=True)
        if total > 0:
            found |= {min(1.0, math.fsum(ranked[: n + 1]) / total) for n in range(len(ranked))}
    return sorted(found)


def alike(adapter: Adapter, modules: Sequence[str], most: int) -> list[list[str]]:
    """Modules of one shape in at most `most` clusters, by the cosine of their updates.

    The two clusters with the largest mean |cosine| are joined until so many are left; opposite
    updates are alike, since each member has a scale. Each |cosine| is
    <B1 A1, B2 A2> / (|B1 A1| |B2 A2|), from r x r products.
    """
    if most == 1:
        return [list(modules)]
    pairs = {m: (adapter.factors(m).A.double(), adapter.factors(m).B.double()) for m in modules}

    def product(one: str, two: str) -> float:
        (a1, b1), (a2, b2) = pairs[one], pairs[two]
        return float(((b1.T @ b2) * (a1 @ a2.T)).sum())

    length = {m: math.sqrt(max(product(m, m), 0.0)) for m in modules}
    cosine = {
        frozenset((one, two)): abs(product(one, two)) / (length[one] * length[two] or 1.0)
        for one, two in itertools.combinations(modules, 2)
    }

    def nearness(one: list[str], two: list[str]) -> float:
        return sum(cosine[frozenset((a, b))] for a in one for b in two) / (len(one) * len(two))

    clusters = [[module] for module in modules]
    while len(clusters) > most:
        one, two = max(
            itertools.combinations(range(len(clusters)), 2), key=lambda p: nearness(*(clusters[i] for i in p))
        )
        clusters[one] += clusters.pop(two)
    return [sorted(cluster, key=order) for cluster in clusters]


def _kept(modules: Sequence[str], norms: Mapping[str, float], threshold: float, select: Select, draw: int) -> set[str]:
    """As many modules of a type as the threshold asks for, in the order of `select`."""
    kept = keep_until({m: norms[m] for m in modules}, threshold)
    if select == "importance":
        return set(kept)
    lower_first = sorted(modules, key=order)
    ranked = {
        "inverse": sorted(lower_first, key=lambda m: norms[m]),
        "random": random.Random(draw).sample(lower_first, len(lower_first)),
        "top": lower_first[::-1],
        "bottom": lower_first,
    }[select]
    return set(ranked[: len(kept)])


def _at(adapter: Adapter, norms: Mapping[str, float], threshold: float, settings: Mapping[str, Any]) -> Plan:
    choices: dict[str, Choice] = {}
    groups: dict[str, int] = {}
    share = importances({m: norms[m] for m in adapter.linear})
    for kind, modules in by_type(adapter.linear).items():
        kept = _kept(modules, norms, threshold, settings["select"], settings["draw"])
        why, why_not = (
            ("within the threshold", "beyond the threshold")
            if settings["select"] == "importance"
            else (f"among the {settings['select']}", f"not among the {settings['select']}")
        )
        for m in kept:
            choices[m] = Choice(m, "keep", adapter.factors(m).rank, None, share[m], why)
        if settings["pruned"] == "drop":
            for m in modules:
                if m not in kept:
                    choices[m] = Choice(m, "drop", None, None, share[m], why_not)
            continue
        shapes: dict[tuple[int, int], list[str]] = {}
        for m in modules:
            if m not in kept:
                shapes.setdefault(adapter.factors(m).shape, []).append(m)
        clusters = [
            (shape, cluster)
            for shape, found in sorted(shapes.items())
            for cluster in alike(adapter, found, settings["groups"])
        ]
        for number, (shape, rest) in enumerate(clusters):
            if len(rest) == 1:
                m = rest[0]
                choices[m] = Choice(m, "keep", adapter.factors(m).rank, None, share[m], "nobody to share with")
                continue
            group = adapter.free_name("shared." + kind + (f".{number}" if len(clusters) > 1 else ""))
            groups[group] = min(max(adapter.factors(m).rank for m in rest), *shape)
            for m in rest:
                choices[m] = Choice(m, "share", None, group, share[m], why_not)
    options = {"threshold": threshold, **settings}
    return Plan("lora-drop", options, tuple(choices[m] for m in adapter.linear), groups)


METHOD = Method(
    plan, lambda options: "forward", "keep the modules with the largest outputs, share one adapter among the rest"
)
