"""Carry out a plan on an adapter."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.core.plan import Metric, Plan, check, cuts_ranks
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.pack.share import Member, input_basis, share
from lorapack.pack.truncate import truncate

ShareInit = Literal["closed", "copy", "fresh"]


def group_bases(adapter: Adapter, plan: Plan) -> dict[str, Tensor]:
    """For every group of the plan the basis Q, (q, d_in), in which its inputs are to be measured."""
    return {group: input_basis([adapter.factors(m) for m in plan.members(group)]) for group in plan.groups}


def pack_adapter(
    adapter: Adapter,
    plan: Plan,
    statistics: Statistics | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    share_init: ShareInit = "closed",
    seed: int = 0,
) -> Adapter:
    """The adapter that the plan describes.

    Kept modules keep their factors bit by bit at full rank and are truncated below it, in the best
    metric that the statistics allow. Those that grow get rows of A like a new LoRA's, and columns of
    B that are zero. Dropped modules are gone. The modules of a group point to one
    pair of factors: the closed form of `share`, a copy of the most important member's (``copy``;
    by score), or a new start (``fresh``: A random, B zero, as LoRA is initialised).

    Args:
        adapter: to be packed; unchanged.
        plan: checked against it.
        statistics: of this adapter; without them truncation uses the ``weight`` metric.
        inputs: for each module that shares, E[y y^T] in its group's basis (`group_bases`), (q, q);
            without them the inputs are taken as white.
        share_init: where shared factors come from.
        seed: of ``fresh``, and of rows that are new.

    Raises:
        InputError: a plan or statistics that do not fit the adapter.
    """
    check(plan, adapter)
    if statistics is not None:
        check_fits(statistics, adapter)
    metric = plan.metric or best_metric(statistics)
    poorer_first = get_args(Metric)
    if poorer_first.index(metric) > poorer_first.index(best_metric(statistics)) and cuts_ranks(plan, adapter):
        raise InputError(f"plan: cutting ranks in the metric {metric!r} needs statistics that were measured for it")
    carried = {m: p for m, p in adapter.modules.items() if adapter.factors(m).kind != "linear"}
    pool: dict[str, Factors] = {p.factors: adapter.pool[p.factors] for p in carried.values()}
    modules: dict[str, Pointer] = dict(carried)
    for number, choice in enumerate(plan.choices):
        if choice.action not in ("keep", "grow") or choice.rank is None:
            continue
        name, scale = adapter.modules[choice.module].factors, adapter.scale(choice.module) * choice.scale
        present = adapter.pool[name].rank
        if choice.rank == present:  # as it is, and shared if it was
            pool[name] = adapter.pool[name]
        else:
            name = choice.module
            pool[name] = (
                _cut(adapter, name, choice.rank, statistics, metric)
                if choice.action == "keep"
                else _grown(adapter.factors(name), choice.rank, seed + number)
            )
        modules[choice.module] = Pointer(name, scale)
    bases = group_bases(adapter, plan) if share_init == "closed" else {}
    for number, (group, rank) in enumerate(sorted(plan.groups.items())):
        members = plan.members(group)
        if group in pool:
            raise InputError(f"plan: the group name {group!r} is taken; choose another")
        if share_init == "closed":
            q = bases[group]
            white = torch.eye(q.shape[0], dtype=torch.float64)
            shared = share(
                [Member(adapter.factors(m), adapter.scale(m), white if inputs is None else inputs[m]) for m in members],
                q,
                rank,
            )
            pool[group], scales = shared.factors, dict(zip(members, shared.scales, strict=True))
        else:
            scores = {c.module: c.score or 0.0 for c in plan.choices}
            source = max(members, key=lambda m: (scores[m], -members.index(m)))
            pool[group] = (
                _cut(adapter, source, min(rank, adapter.factors(source).rank), statistics, metric)
                if share_init == "copy"
                else _fresh(adapter.factors(source), rank, seed + number)
            )
            scales = {m: adapter.scale(source) for m in members}
        modules |= {m: Pointer(group, scales[m]) for m in members}
    return adapter.with_pool(pool, modules)


def best_metric(statistics: Statistics | None) -> Metric:
    """The metric that the statistics allow: ``fisher``, else ``loss``, ``output``, ``weight``."""
    if statistics is None:
        return "weight"
    if all(m.row_backward is not None for m in statistics.modules.values()):
        return "fisher"
    return "loss" if all(m.backward is not None for m in statistics.modules.values()) else "output"


def _cut(adapter: Adapter, module: str, rank: int, statistics: Statistics | None, metric: Metric) -> Factors:
    factors = adapter.factors(module)
    if rank == factors.rank:
        return factors
    moments = statistics.modules[module] if statistics is not None else None
    return truncate(factors, rank, metric, moments)[0]


def _grown(factors: Factors, rank: int, seed: int) -> Factors:
    """The same update with room to learn."""
    new = _fresh(factors, rank - factors.rank, seed)
    return Factors(torch.cat([factors.A, new.A]), torch.cat([factors.B, new.B], dim=1))


def _fresh(like: Factors, rank: int, seed: int) -> Factors:
    d_out, d_in = like.shape
    generator = torch.Generator().manual_seed(seed)
    bound = d_in**-0.5  # kaiming_uniform with a = sqrt(5), as PEFT starts lora_A
    a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) * bound
    return Factors(a.to(like.A.dtype), torch.zeros(d_out, rank, dtype=like.B.dtype))
