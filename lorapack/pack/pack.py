"""Carry out a plan on an adapter."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lorapack.core.adapter import Adapter, Factors, Pointer, decoded
from lorapack.core.codes import Sparse
from lorapack.core.plan import Choice, Metric, Plan, check, cuts_ranks
from lorapack.core.seeded import SEEDS, seeded
from lorapack.core.sharing import Sharing
from lorapack.core.statistics import Statistics, check_fits
from lorapack.errors import InputError
from lorapack.pack.fit import fit, fit_frozen
from lorapack.pack.share import Member, input_basis, share
from lorapack.pack.truncate import canonical, truncate

ShareInit = Literal["closed", "copy", "fresh"]


def group_bases(adapter: Adapter, plan: Plan) -> dict[str, Tensor]:
    """For every group of the plan the basis Q, (q, d_in), in which its inputs are to be measured."""
    return {
        group: input_basis([adapter.factors(m) for m in plan.members(group)])
        for group in plan.groups
        if plan.way(group) != "vera"
    }


def module_bases(adapter: Adapter, plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    """For every module that shares the basis in which its inputs are to be measured, (q, d_in).

    It is its group's; with seeded factors (`vera`) one of its own, of its A and the seeded A.
    """
    bases = group_bases(adapter, plan)
    found = {module: q for group, q in bases.items() for module in plan.members(group)}
    for group in plan.groups.keys() - bases.keys():
        frozen = _seeded(adapter, plan, group, seed)
        found |= {m: input_basis([adapter.factors(m), frozen]) for m in plan.members(group)}
    return found


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
    metric that the statistics allow; or they keep single elements. Those that grow get rows of A like a
    new LoRA's, and columns of B that are zero. Dropped modules are gone. The modules of a group point to
    one pair of factors: the closed form of `share`, a copy of the most important member's (``copy``;
    by score), or a new start (``fresh``: A random, B zero, as LoRA is initialised).

    Args:
        adapter: to be packed; unchanged.
        plan: checked against it.
        statistics: of this adapter; without them truncation uses the ``weight`` metric.
        inputs: for each module that shares, E[y y^T] in its basis (`module_bases`), (q, q);
            without them the inputs are taken as white.
        share_init: where shared factors come from; only ``closed`` where layers have more than a scale.
        seed: of ``fresh``, of rows that are new, and of seeded factors.

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
        pointer = adapter.modules[choice.module]
        if choice.elements is not None:
            pool[choice.module] = _thinned(adapter.factors(choice.module), choice, statistics)
            pointer = Pointer(choice.module, pointer.scale)
        elif choice.rank == adapter.pool[pointer.factors].rank:  # as it is, and shared if it was
            pool[pointer.factors] = adapter.pool[pointer.factors]
        else:
            name = choice.module
            pool[name] = (
                _cut(adapter, name, choice.rank, statistics, metric)
                if choice.action == "keep"
                else _grown(adapter.factors(name), choice.rank, seed + number)
            )
            pointer = Pointer(name, pointer.scale)
        modules[choice.module] = replace(pointer, scale=pointer.scale * choice.scale)
    bases = module_bases(adapter, plan, seed) if share_init == "closed" else {}
    for number, (group, rank) in enumerate(sorted(plan.groups.items())):
        members = plan.members(group)
        if group in pool:
            raise InputError(f"plan: the group name {group!r} is taken; choose another")
        way = plan.way(group)
        if way != "scale" and share_init != "closed":
            raise InputError(f"plan: the group {group!r} shares by {way}, which needs --share-init closed")
        if share_init == "closed":
            given = {m: _member(adapter, m, bases[m], inputs) for m in members}
            frozen = _seeded(adapter, plan, group, seed) if way == "vera" else None
            pool[group], pointers = _closed(group, given, bases, rank, way, frozen)
            modules |= pointers
        else:
            scores = {c.module: c.score or 0.0 for c in plan.choices}
            source = max(members, key=lambda m: (scores[m], -members.index(m)))
            pool[group] = (
                _cut(adapter, source, min(rank, adapter.factors(source).rank), statistics, metric)
                if share_init == "copy"
                else _fresh(adapter.factors(source), rank, seed + number)
            )
            modules |= {m: Pointer(group, adapter.scale(source)) for m in members}
    return adapter.with_pool(pool, modules)


def best_metric(statistics: Statistics | None) -> Metric:
    """The metric that the statistics allow: ``fisher``, else ``loss``, ``output``, ``weight``."""
    if statistics is None:
        return "weight"
    if all(m.row_backward is not None for m in statistics.modules.values()):
        return "fisher"
    return "loss" if all(m.backward is not None for m in statistics.modules.values()) else "output"


def _member(adapter: Adapter, module: str, q: Tensor, inputs: Mapping[str, Tensor] | None) -> Member:
    white = torch.eye(q.shape[0], dtype=torch.float64)
    return Member(adapter.factors(module), adapter.scale(module), white if inputs is None else inputs[module])


def _closed(
    group: str,
    members: Mapping[str, Member],
    bases: Mapping[str, Tensor],
    rank: int,
    way: Sharing,
    frozen: Factors | None,
) -> tuple[Factors, dict[str, Pointer]]:
    """The least-squares factors of a group, and what each of its modules points to them with."""
    q, layers = next(bases[m] for m in members), list(members.values())
    if frozen is not None:
        alone = {m: fit_frozen(member, bases[m], frozen) for m, member in members.items()}
        return frozen, {m: f.pointer(group, 0) for m, f in alone.items()}
    if way == "scale":
        shared = share(layers, q, rank)
        return shared.factors, {m: Pointer(group, s) for m, s in zip(members, shared.scales, strict=True)}
    fitted = fit(layers, q, rank, way)
    return fitted.factors, {m: fitted.pointer(group, number) for number, m in enumerate(members)}


def _seeded(adapter: Adapter, plan: Plan, group: str, seed: int) -> Factors:
    like = adapter.factors(plan.members(group)[0])
    seed %= SEEDS  # a negative one too
    a, b = seeded(seed, plan.groups[group], like.shape, like.A.dtype)
    return Factors(a, b, seed=seed)


def _cut(adapter: Adapter, module: str, rank: int, statistics: Statistics | None, metric: Metric) -> Factors:
    factors = adapter.factors(module)
    if rank == factors.rank:
        return factors
    moments = statistics.modules[module] if statistics is not None else None
    return truncate(factors, rank, metric, moments)[0]


def _thinned(factors: Factors, choice: Choice, statistics: Statistics | None) -> Factors:
    """The elements of the canonical factors to which the loss is most sensitive; zeros for the rest."""
    if statistics is None:
        raise InputError(f"plan: which elements {choice.module} keeps needs statistics that were measured for it")
    plain = canonical(factors)
    whole = torch.cat([plain.A.reshape(-1), plain.B.reshape(-1)]).float()
    mask = torch.zeros(whole.numel(), dtype=torch.bool)
    mask[statistics.modules[choice.module].saliency.topk(choice.elements or 0).indices] = True
    return decoded(Sparse((plain.rank, *plain.shape), mask, whole[mask]))


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
