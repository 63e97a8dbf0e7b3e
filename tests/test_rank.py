"""Allocation of ranks, and the methods made of it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapack.core.adapter import Adapter, Factors, Pointer, size
from lorapack.core.plan import check, parameters
from lorapack.core.statistics import Moments, Statistics
from lorapack.errors import InputError
from lorapack.pack import pack_adapter
from lorapack.plan import METHODS
from lorapack.plan.allocate import by_cutoff, by_value, uniformly

METRICS = ("weight", "output", "loss")
falling = st.lists(st.floats(0, 100), min_size=1, max_size=3).map(lambda v: sorted(v, reverse=True))


def gained(values, ranks):
    return sum(sum(found[: ranks[module]]) for module, found in values.items())


def exhaustive(values, costs, budget):
    """The best total value over all possible ranks."""
    modules = list(values)
    return max(
        gained(values, dict(zip(modules, ranks, strict=True)))
        for ranks in itertools.product(*(range(len(values[m]) + 1) for m in modules))
        if sum(costs[m] * r for m, r in zip(modules, ranks, strict=True)) <= budget
    )


@given(st.lists(falling, min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 60))
def test_with_equal_costs_no_other_ranks_are_better(lists, cost, budget):
    values = {str(n): found for n, found in enumerate(lists)}
    costs = dict.fromkeys(values, cost)
    ranks = by_value(values, costs, budget)
    assert sum(costs[m] * r for m, r in ranks.items()) <= budget
    assert gained(values, ranks) == pytest.approx(exhaustive(values, costs, budget))


@given(st.lists(st.tuples(falling, st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 60))
def test_with_unequal_costs_at_most_one_atom_is_lost(pairs, budget):
    values = {str(n): found for n, (found, _) in enumerate(pairs)}
    costs = {str(n): cost for n, (_, cost) in enumerate(pairs)}
    ranks = by_value(values, costs, budget)
    assert sum(costs[m] * r for m, r in ranks.items()) <= budget
    largest = max(value for found in values.values() for value in found)
    assert gained(values, ranks) >= exhaustive(values, costs, budget) - largest - 1e-9


def test_uniform_ranks_differ_by_one_at_most_and_the_lower_layers_come_first():
    most, costs = {"a": 4, "b": 4, "c": 2}, {"a": 10, "b": 10, "c": 10}
    assert uniformly(most, costs, 50) == {"a": 2, "b": 2, "c": 1}
    assert uniformly(most, costs, 1000) == most
    assert uniformly(most, costs, 9) == {"a": 0, "b": 0, "c": 0}


def test_a_share_keeps_the_crossing_atom_and_nothing_of_an_empty_module():
    assert by_cutoff({"a": [6.0, 3.0, 1.0], "b": [0.0, 0.0]}, "energy", 0.9) == {"a": 2, "b": 0}
    assert by_cutoff({"a": [6.0, 3.0, 1.0]}, "energy", 1.0) == {"a": 3}


def test_the_cutoffs_of_the_resize_tools():
    """Singular values 4, 2, 1: sums 7, squares 16 + 4 + 1 = 21."""
    squares = {"a": [16.0, 4.0, 1.0], "none": [0.0, 0.0, 0.0]}
    for cutoff, share, rank in (
        *(("cumulative", 4 / 7, 1), ("cumulative", 4.1 / 7, 2), ("cumulative", 1.0, 3)),
        *(("energy", 16 / 21, 1), ("energy", 16.1 / 21, 2), ("energy", 20.1 / 21, 3)),
        *(("frobenius", (16 / 21) ** 0.5, 1), ("frobenius", (20 / 21) ** 0.5, 2), ("frobenius", 0.99, 3)),
        *(("ratio", 0.5, 2), ("ratio", 0.51, 1), ("ratio", 0.25, 3), ("ratio", 1.0, 1)),
    ):
        assert by_cutoff(squares, cutoff, share) == {"a": rank, "none": 0}, (cutoff, share)


def example(seed: int, layers: int = 4, rank: int = 3):
    """An adapter of two types with different shapes, and statistics of it."""
    generator = torch.Generator().manual_seed(seed)
    pool, moments = {}, {}
    for layer, (kind, d_out, d_in) in itertools.product(range(layers), (("q", 6, 8), ("up", 12, 8))):
        name = f"layers.{layer}.{kind}"
        a = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
        b = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
        h, u = (torch.randn(50, rank, generator=generator, dtype=torch.float64) * (1 + layer) for _ in range(2))
        pool[name] = Factors(a, b)
        moments[name] = Moments(h.T @ h, u.T @ u, u.T @ h)
    adapter = Adapter({"peft_type": "LORA"}, pool, {m: Pointer(m, 2.0) for m in pool}, {})
    return adapter, Statistics(moments, 50.0, 50, 5, "token", {})


def rewritten(adapter, statistics, seed):
    """The same updates by other factors: A -> R A, B -> B R^-1, and the moments that would be measured."""
    generator = torch.Generator().manual_seed(seed)
    pool, moments = {}, {}
    for module in adapter.linear:
        f, m = adapter.factors(module), statistics.modules[module]
        r = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64) + 3 * torch.eye(f.rank).double()
        inverse = torch.linalg.inv(r)
        pool[module] = Factors(r @ f.A, f.B @ inverse)
        moments[module] = Moments(r @ m.forward @ r.T, inverse.T @ m.backward @ inverse, inverse.T @ m.cross @ r.T)
    return adapter.with_pool(pool, adapter.modules), Statistics(moments, 50.0, 50, 5, "token", {})


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("allocation", ["global", "uniform", "per-module"])
def test_the_plan_does_not_depend_on_how_the_updates_are_factored(metric, allocation):
    adapter, statistics = example(0)
    options = {"metric": metric, "allocation": allocation, "share": 0.8}
    budget = size(adapter).parameters // 3
    plan = METHODS["rank"].run(adapter, statistics, budget, options)
    other = METHODS["rank"].run(*rewritten(adapter, statistics, 1), budget, options)
    assert [(c.action, c.rank) for c in plan.choices] == [(c.action, c.rank) for c in other.choices]
    check(plan, adapter)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0.05, 1.0), metric=st.sampled_from(METRICS))
def test_a_budget_is_used_up_to_less_than_the_dearest_atom_and_never_exceeded(allocation, seed, share, metric):
    adapter, statistics = example(seed)
    whole = size(adapter).parameters
    budget = max(20, int(share * whole))
    plan = METHODS["rank"].run(adapter, statistics, budget, {"metric": metric, "allocation": allocation})
    assert budget - 20 < parameters(plan, adapter) <= budget
    assert size(pack_adapter(adapter, plan, statistics)).parameters == parameters(plan, adapter)


def test_the_metric_of_the_plan_decides_how_ranks_are_cut():
    adapter, statistics = example(3)
    budget = size(adapter).parameters // 3
    updates = {}
    for metric in METRICS:
        plan = METHODS["rank"].run(adapter, statistics, budget, {"metric": metric, "allocation": "uniform"})
        packed = pack_adapter(adapter, plan, statistics)
        f = packed.factors("layers.0.q")
        updates[metric] = f.B @ f.A
    exact = adapter.factors("layers.0.q").B @ adapter.factors("layers.0.q").A
    errors = {metric: float((exact - update).norm()) for metric, update in updates.items()}
    assert errors["weight"] < errors["output"] and errors["weight"] < errors["loss"]


def test_an_adapter_of_zeros_has_nothing_to_keep():
    adapter, _ = example(0)
    zeros = {n: Factors(f.A, torch.zeros_like(f.B)) for n, f in adapter.pool.items()}
    with pytest.raises(InputError, match="every update of the adapter is zero"):
        METHODS["rank"].run(
            adapter.with_pool(zeros, adapter.modules), None, None, {"metric": "weight", "allocation": "per-module"}
        )


def test_what_a_method_lacks_is_said():
    adapter, statistics = example(0)
    with pytest.raises(InputError, match="needs a --budget"):
        METHODS["rank"].run(adapter, statistics, None, {})
    with pytest.raises(InputError, match="too small: one rank of one module takes 14"):
        METHODS["rank"].run(adapter, statistics, 13, {})
    with pytest.raises(InputError, match="lora-drop has no --metric; it has --threshold"):
        METHODS["lora-drop"].parse("lora-drop", {"metric": "loss"})
    forward = Statistics({m: Moments(s.forward) for m, s in statistics.modules.items()}, 50.0, 50, 5, "token", {})
    with pytest.raises(InputError, match="measure --method rank"):
        METHODS["rank"].run(adapter, forward, 1000, {"metric": "loss"})
