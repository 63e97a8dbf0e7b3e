"""Truncating, sharing and packing against the materialised updates in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapack.core.adapter import Adapter, Factors, Pointer, digest, size
from lorapack.core.linalg import orthonormal, singular_values, triangle
from lorapack.core.plan import Choice, Plan, parameters
from lorapack.core.statistics import Moments, Statistics
from lorapack.errors import InputError
from lorapack.pack.pack import group_bases, pack_adapter
from lorapack.pack.share import Member, input_basis, share
from lorapack.pack.truncate import atoms, shares, truncate

METRICS = ("weight", "output", "loss")
seeds = st.integers(0, 10**6)


def close(value, scale):
    return pytest.approx(value, rel=1e-8, abs=1e-10 * scale)


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def product(factors):
    return factors.B.double() @ factors.A.double()


def rewritten(factors, randn):
    """(B R^-1, R A): the same update, written in another basis that is neither orthogonal nor far from it."""
    n = factors.rank
    r = torch.linalg.qr(randn(n, n)).Q * torch.linspace(0.5, 2, n)
    return Factors(r @ factors.A, factors.B @ r.inverse())


# Truncation. A pair, the inputs x it sees and the loss's derivatives g by its outputs, as tables.


@st.composite
def pairs(draw):
    """A pair of any shape, also wider in rank than in and out, and few enough x and g to be singular."""
    rank, d_out, d_in, xs, gs = (draw(st.integers(low, high)) for low, high in ((1, 6), (1, 7), (1, 7), (0, 9), (0, 9)))
    randn = drawing(draw(seeds))
    factors = Factors(randn(rank, d_in), randn(d_out, rank))
    return factors, randn(xs, d_in), randn(gs, d_out)


def moments(factors, x, g):
    """Of h = A x and u = dloss/dh = B^T g, as `lorapack measure` sums them up."""
    h, u = x @ factors.A.T, g @ factors.B
    return Moments(h.T @ h, u.T @ u)


def seen(update, metric, x, g):
    """What an update does as far as the metric looks: all of it, its outputs, or those times every g."""
    return {"weight": update, "output": update @ x.T, "loss": g @ update @ x.T}[metric]


@given(pairs())
def test_the_fisher_metric_is_a_kronecker_product_of_two_means(pair):
    """Its atoms are those of `loss` for the means of the two sides, each in units of its own trace."""
    factors, x, g = pair
    one, two = moments(factors, x, g), moments(factors, x[::2], g[::2])
    both = Moments(one.forward, None, None, one.forward, one.backward, two.forward, two.backward)
    inside = factors.A @ factors.A.T
    first, second = (float((inside * m.backward).sum()) or 1.0 for m in (one, two))
    mean = Moments(
        (one.forward / first + two.forward / second) / 2,
        (one.backward / first + two.backward / second) * (first + second) / 4,
    )
    b, a, wanted = atoms(factors, "loss", mean)
    c, d, found = atoms(factors, "fisher", both)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-12 * float(wanted.sum()))
    assert torch.allclose(b @ a, c @ d, rtol=1e-7, atol=1e-9)


@settings(deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 8), st.floats(0, 16), st.floats(-30, 30))
def test_however_steep_the_columns_their_qr_is_one(seed, height, width, steep, length):
    """Of columns that span a condition of 1 to 10^16, none, and more than there are rows."""
    randn = drawing(seed)
    spectrum = torch.logspace(0, -steep, width, dtype=torch.float64) * 10**length
    tall = randn(height, width) @ torch.linalg.qr(randn(width, width)).Q * spectrum @ randn(width, width)
    q, r = orthonormal(tall)
    unit = torch.eye(q.shape[1], dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, unit, rtol=0, atol=6e-8)  # float32's rounding
    torch.testing.assert_close(q @ r, tall, rtol=0, atol=1e-12 * float(tall.norm()))
    assert torch.equal(triangle(tall), r)
    other = randn(width, 5)
    wanted = torch.linalg.svdvals(tall @ other)[: min(width, height)]
    found = singular_values(tall, other)[: len(wanted)]
    torch.testing.assert_close(found, wanted, rtol=6e-8, atol=1e-13 * float(tall.norm() * other.norm()))


@pytest.mark.parametrize("metric", METRICS)
@given(pairs())
def test_the_shares_alone_are_those_of_the_atoms(metric, pair):
    factors, *_ = pair
    wanted, found = atoms(factors, metric, moments(*pair))[2], shares(factors, metric, moments(*pair))
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-12 * float(wanted.sum()))


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=120)
@given(pairs(), st.integers(1, 6))
def test_truncation_costs_what_it_promises_and_nothing_of_that_rank_costs_less(metric, pair, rank):
    factors, x, g = pair
    rank = min(rank, factors.rank)
    cut, promised = truncate(factors, rank, metric, moments(*pair))
    whole = seen(product(factors), metric, x, g)
    energy = float((whole**2).sum())
    cost = float((seen(product(factors) - product(cut), metric, x, g) ** 2).sum())
    assert promised == close(cost, energy)
    # Eckart and Young: even with all of x and g in sight, no matrix of that rank comes closer
    least = float((torch.linalg.svdvals(whole)[rank:] ** 2).sum()) if whole.numel() else 0.0
    assert cost == close(least, energy)
    assert (cut.A.shape, cut.B.shape) == ((rank, factors.shape[1]), (factors.shape[0], rank))


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=60)
@given(pairs())
def test_truncating_at_full_rank_changes_nothing_that_can_be_seen(metric, pair):
    factors, x, g = pair
    cut, promised = truncate(factors, factors.rank, metric, moments(*pair))
    before, after = (seen(product(f), metric, x, g) for f in (factors, cut))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert promised == 0


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=40)
@given(seeds)
def test_no_small_step_away_from_the_truncation_does_better(metric, seed):
    randn = drawing(seed)
    factors, x, g = Factors(randn(5, 7), randn(6, 5)), randn(20, 7), randn(20, 6)
    cut, promised = truncate(factors, 2, metric, moments(factors, x, g))
    for length in (1e-3, 1e-1, 1.0):
        near = (cut.B + length * randn(6, 2)) @ (cut.A + length * randn(2, 7))
        assert float((seen(product(factors) - near, metric, x, g) ** 2).sum()) > promised


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 5))
def test_truncation_does_not_depend_on_how_the_pair_is_written(metric, seed, rank):
    randn = drawing(seed)
    factors, x, g = Factors(randn(5, 8), randn(7, 5)), randn(30, 8), randn(30, 7)
    (cut, cost), (again, promised) = (
        truncate(f, rank, metric, moments(f, x, g)) for f in (factors, rewritten(factors, randn))
    )
    whole = float((seen(product(factors), metric, x, g) ** 2).sum())
    assert promised == close(cost, whole)
    apart = float((seen(product(again) - product(cut), metric, x, g) ** 2).sum())
    assert apart == pytest.approx(0, abs=1e-10 * whole)


@pytest.mark.parametrize("metric", METRICS)
def test_a_truncated_pair_is_balanced_and_its_atoms_fall(metric):
    randn = drawing(0)
    factors, x, g = Factors(1e-4 * randn(5, 8), 1e4 * randn(7, 5)), randn(30, 8), randn(30, 7)
    cut, _ = truncate(factors, 4, metric, moments(factors, x, g))
    torch.testing.assert_close(cut.A.norm(dim=1), cut.B.norm(dim=0))
    atoms = [float((seen(torch.outer(b, a), metric, x, g) ** 2).sum()) for b, a in zip(cut.B.T, cut.A, strict=True)]
    assert atoms == sorted(atoms, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_truncation_keeps_the_dtype_and_computes_in_float64(metric, dtype):
    randn = drawing(1)
    factors = Factors(randn(4, 6).to(dtype), randn(5, 4).to(dtype))
    exact = Factors(factors.A.double(), factors.B.double())
    seen_by_both = moments(exact, randn(20, 6), randn(20, 5))
    (cut, cost), (reference, promised) = (truncate(f, 2, metric, seen_by_both) for f in (factors, exact))
    assert cut.A.dtype == cut.B.dtype == dtype
    assert cost == promised
    assert torch.equal(cut.A, reference.A.to(dtype)) and torch.equal(cut.B, reference.B.to(dtype))


# One adapter for several layers.


def group(seed, count=3, d_out=4, d_in=5, rank=2, tokens=30, same=True):
    """Layers and the inputs each of them sees: the same, or each its own."""
    randn = drawing(seed)
    layers = [(Factors(randn(rank, d_in), randn(d_out, rank)), float(randn(1))) for _ in range(count)]
    common = randn(tokens, d_in) @ randn(d_in, d_in)
    return layers, [common if same else randn(tokens, d_in) @ randn(d_in, d_in) for _ in range(count)]


def solve(layers, inputs, rank, q=None):
    q = input_basis([f for f, _ in layers]) if q is None else q
    return share([Member(f, s, q @ x.T @ x @ q.T / len(x)) for (f, s), x in zip(layers, inputs, strict=True)], q, rank)


def cost(layers, inputs, common, scales):
    """The sum of E||(W_l - c_l W_s) x||^2 over the layers, token by token."""
    return sum(
        float(((s * product(f) - c * common) @ token).square().sum()) / len(x)
        for (f, s), c, x in zip(layers, scales, inputs, strict=True)
        for token in x
    )


def energy(layers, inputs):
    return cost(layers, inputs, torch.zeros(layers[0][0].shape, dtype=torch.float64), [0.0] * len(layers))


@settings(deadline=None, max_examples=60)
@given(
    seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans()
)
def test_sharing_costs_what_it_says_and_no_sweep_makes_it_worse(seed, count, d_out, d_in, own, rank, same):
    layers, inputs = group(seed, count, d_out, d_in, own, tokens=4, same=same)
    found = solve(layers, inputs, rank)
    whole = energy(layers, inputs)
    assert found.factors.A.shape == (rank, d_in) and found.factors.B.shape == (d_out, rank)
    assert found.errors[-1] == close(cost(layers, inputs, product(found.factors), found.scales), whole)
    assert all(after <= before + 1e-12 * whole for before, after in zip(found.errors, found.errors[1:], strict=False))


def descent(layers, inputs, start):
    """The least cost that L-BFGS finds for the factors and scales, from a start (B, A, scales)."""
    b, a, c = unknowns = [t.clone().requires_grad_() for t in start]
    optimizer = torch.optim.LBFGS(unknowns, max_iter=500, history_size=20, line_search_fn="strong_wolfe")
    each = [x.T / len(x) ** 0.5 for x in inputs]
    wanted = torch.cat([s * product(f) @ x for (f, s), x in zip(layers, each, strict=True)], dim=1)

    def loss():
        optimizer.zero_grad()
        made = torch.cat([scale * (b @ (a @ x)) for scale, x in zip(c, each, strict=True)], dim=1)
        total = ((wanted - made) ** 2).sum()
        total.backward()
        return total.detach()

    optimizer.step(loss)
    return float(loss())


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_where_the_layers_see_the_same_inputs_descent_from_many_starts_finds_nothing_better(count, rank, seed):
    layers, inputs = group(seed, count)
    found, randn = solve(layers, inputs, rank), drawing(seed)
    best = min(descent(layers, inputs, (randn(4, rank), randn(rank, 5), randn(count))) for _ in range(4))
    assert found.errors[-1] <= best + 1e-6 * energy(layers, inputs)


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_where_each_layer_sees_its_own_inputs_descent_from_beside_the_result_finds_nothing_better(count, rank):
    layers, inputs = group(count, count, d_in=4, same=False)  # d_in 4: the A's span everything
    found, randn = solve(layers, inputs, rank), drawing(0)
    exact = found.factors.B, found.factors.A, torch.tensor(found.scales, dtype=torch.float64)
    best = descent(layers, inputs, [t + 1e-3 * randn(*t.shape) for t in exact])
    assert found.errors[-1] <= best + 1e-6 * energy(layers, inputs)


@pytest.mark.parametrize("same", [True, False])
def test_a_layer_alone_is_reproduced(same):
    layers, inputs = group(3, count=1, same=same)
    found = solve(layers, inputs, 2)
    assert found.scales == (1.0,)
    torch.testing.assert_close(product(found.factors), layers[0][1] * product(layers[0][0]))


@pytest.mark.parametrize("times", [(1, 2, 3), (1, -1), (1, -2), (2, 0, 1), (1, -1, 1, -1), (-1, -1)])
@settings(deadline=None, max_examples=10)
@given(seeds)
def test_layers_that_are_multiples_of_each_other_are_reproduced(times, seed):
    (layer, *_), inputs = group(seed, len(times), same=False)
    randn = drawing(seed + 1)
    layers = []
    for factor in times:  # written in different ways
        other = rewritten(layer[0], randn)
        layers.append((Factors(other.A, factor * other.B), layer[1]))
    found = solve(layers, inputs, 2)
    for scale, (factors, s) in zip(found.scales, layers, strict=True):
        torch.testing.assert_close(scale * product(found.factors), s * product(factors), rtol=1e-6, atol=1e-6)
    assert sum(s * s for s in found.scales) == pytest.approx(len(times))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 3))
def test_layers_that_see_the_same_inputs_lose_nothing_by_staying_in_the_span_of_their_as(seed, rank):
    layers, inputs = group(seed, count=2, d_in=8)
    inside, outside = solve(layers, inputs, rank), solve(layers, inputs, rank, torch.eye(8, dtype=torch.float64))
    assert inside.errors[-1] == pytest.approx(outside.errors[-1], rel=1e-6)
    torch.testing.assert_close(product(inside.factors), product(outside.factors), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zero", ["A", "B", "inputs"])
def test_layers_that_do_nothing_share_nothing_that_does_anything(zero):
    layers, inputs = group(4)
    if zero == "inputs":
        inputs = [0 * x for x in inputs]
    else:
        layers = [(replace(f, **{zero: torch.zeros_like(getattr(f, zero))}), s) for f, s in layers]
    found = solve(layers, inputs, 2)
    assert found.errors[-1] == 0
    assert not any(found.scales)
    assert torch.isfinite(product(found.factors)).all()


def test_a_layer_that_does_nothing_gets_the_scale_zero():
    layers, inputs = group(5, count=3)
    layers[1] = (Factors(layers[1][0].A, 0 * layers[1][0].B), layers[1][1])
    assert solve(layers, inputs, 2).scales[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_factors_are_balanced_and_keep_the_dtype(dtype):
    layers, inputs = group(6)
    found = solve([(Factors(f.A.to(dtype), f.B.to(dtype)), s) for f, s in layers], inputs, 2).factors
    assert found.A.dtype == found.B.dtype == dtype
    torch.testing.assert_close(found.A.double().norm(dim=1), found.B.double().norm(dim=0), rtol=0.02, atol=0)


# Packing.

LORAS = {f"layers.{n}.{kind}": shape for n in range(4) for kind, shape in (("q", (4, 5)), ("v", (3, 5)))}


def whole(seed=0, dtype=torch.float32, ranks=(3,)):
    """An adapter with linear pairs, an embedding, a convolution, and tensors that are no pairs."""
    randn = drawing(seed)
    pool = {}
    for n, (m, (d_out, d_in)) in enumerate(LORAS.items()):
        rank = ranks[n % len(ranks)]
        pool[m] = Factors(randn(rank, d_in).to(dtype), randn(d_out, rank).to(dtype))
    pool["embed"] = Factors(randn(3, 11), randn(5, 3), "embedding")
    pool["conv"] = Factors(randn(3, 2, 3, 3), randn(6, 3, 1, 1), "conv")
    carried = {"base_model.model.score.weight": randn(2, 5), "base_model.model.layers.0.q.bias": randn(4)}
    return Adapter({"r": 3}, pool, {m: Pointer(m, 0.5 + n) for n, m in enumerate(pool)}, carried)


def measured(adapter, seed=0, loss=True):
    randn = drawing(seed)
    found = {}
    for m in adapter.linear:
        rank = adapter.factors(m).rank
        h, u = randn(20, rank), randn(20, rank)
        found[m] = Moments(h.T @ h, u.T @ u if loss else None, u.T @ h if loss else None)
    return Statistics(found, 20.0, 20, 2, "token", {})


def inputs_of(adapter, plan, seed=0):
    """For every module that shares the moment of 20 random inputs, in its group's basis, and those inputs."""
    randn = drawing(seed)
    found, tables = {}, {}
    for name, q in group_bases(adapter, plan).items():
        for m in plan.members(name):
            tables[m] = randn(20, q.shape[1])
            found[m] = q @ tables[m].T @ tables[m] @ q.T / 20
    return found, tables


MIXED = Plan(
    "by hand",
    {},
    (
        Choice("layers.0.q", "keep", 3),
        Choice("layers.0.v", "keep", 2),
        Choice("layers.1.q", "share", group="qs"),
        Choice("layers.1.v", "drop"),
        Choice("layers.2.q", "share", group="qs"),
        Choice("layers.2.v", "share", group="vs", score=0.1),
        Choice("layers.3.q", "keep", 3),
        Choice("layers.3.v", "share", group="vs", score=0.2),
    ),
    {"qs": 2, "vs": 3},
)


@pytest.mark.parametrize("start", ["closed", "copy", "fresh"])
def test_packing_does_to_every_module_what_the_plan_says(start):
    adapter = whole()
    packed = pack_adapter(adapter, MIXED, measured(adapter), inputs_of(adapter, MIXED)[0], start)
    for m in ("layers.0.q", "layers.3.q"):
        assert packed.modules[m] == adapter.modules[m]
        assert torch.equal(packed.factors(m).A, adapter.factors(m).A)
        assert torch.equal(packed.factors(m).B, adapter.factors(m).B)
    assert packed.factors("layers.0.v").rank == 2
    assert "layers.1.v" not in packed.modules and "layers.1.v" not in packed.pool
    assert packed.groups == {"qs": ["layers.1.q", "layers.2.q"], "vs": ["layers.2.v", "layers.3.v"]}
    assert packed.factors("layers.1.q") is packed.factors("layers.2.q")
    assert packed.factors("layers.1.q").rank == 2


@pytest.mark.parametrize("start", ["closed", "copy", "fresh"])
def test_packing_leaves_the_source_and_all_that_is_no_linear_pair_alone(start):
    adapter = whole()
    before = digest(adapter), copy.deepcopy(dict(adapter.config))
    packed = pack_adapter(adapter, MIXED, measured(adapter), None, start)
    assert (digest(adapter), dict(adapter.config)) == before
    assert packed.carried.keys() == adapter.carried.keys() and packed.config == adapter.config
    for name, tensor in whole().carried.items():
        assert torch.equal(packed.carried[name], tensor)
    for m in ("embed", "conv"):
        assert packed.modules[m] == adapter.modules[m] and packed.factors(m).kind == m.replace("embed", "embedding")
        assert torch.equal(packed.factors(m).A, whole().factors(m).A)
        assert torch.equal(packed.factors(m).B, whole().factors(m).B)


@st.composite
def plans(draw, adapter):
    """Any sound plan: per module keep at some rank, drop, or one of two groups of its shape."""
    choices, members = [], {}
    for m in adapter.linear:
        what = draw(st.sampled_from(["keep", "drop", "first", "second"]))
        if what == "keep":
            choices.append(Choice(m, "keep", draw(st.integers(1, adapter.factors(m).rank))))
        elif what == "drop":
            choices.append(Choice(m, "drop"))
        else:
            name = f"{what}.{m.split('.')[-1]}"
            members.setdefault(name, []).append(m)
            choices.append(Choice(m, "share", group=name, score=draw(st.floats(0, 1))))
    groups = {name: draw(st.integers(1, most(adapter, modules))) for name, modules in members.items()}
    return Plan("by hand", {}, tuple(choices), groups)


def most(adapter, modules):
    """The highest rank that a group of these modules may ask for."""
    return min(sum(adapter.factors(m).rank for m in modules), *adapter.factors(modules[0]).shape)


UNEVEN = whole(ranks=(3, 1, 2))


@settings(deadline=None, max_examples=80)
@given(plans(UNEVEN), st.sampled_from(["closed", "copy", "fresh"]), st.booleans())
def test_the_packed_adapter_has_the_size_the_plan_promised(plan, start, with_statistics):
    packed = pack_adapter(UNEVEN, plan, measured(UNEVEN) if with_statistics else None, None, start)
    if start == "copy":  # of a member whose rank may be below the group's
        assert size(packed).parameters <= parameters(plan, UNEVEN)
    else:
        assert size(packed).parameters == parameters(plan, UNEVEN)
    assert set(packed.linear) == {c.module for c in plan.choices if c.action != "drop"}
    for name in plan.groups:
        assert {packed.modules[m].factors for m in plan.members(name)} == {name}


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_packing_an_adapter_that_is_compact_already_with_everything_kept_changes_nothing(seed):
    compact = pack_adapter(whole(seed), MIXED)
    everything = Plan("by hand", {}, tuple(Choice(m, "keep", compact.factors(m).rank) for m in compact.linear))
    assert digest(pack_adapter(compact, everything)) == digest(compact)
    assert parameters(everything, compact) == size(compact).parameters


def test_one_user_of_a_shared_pair_can_be_cut_without_the_others():
    compact = pack_adapter(whole(), MIXED)
    ranks = {m: compact.factors(m).rank for m in compact.linear} | {"layers.1.q": 1}
    plan = Plan("by hand", {}, tuple(Choice(m, "keep", rank) for m, rank in ranks.items()))
    packed = pack_adapter(compact, plan)
    assert packed.factors("layers.1.q").rank == 1
    assert torch.equal(packed.factors("layers.2.q").A, compact.factors("layers.2.q").A)
    assert size(packed).parameters == parameters(plan, compact)


@pytest.mark.parametrize("loss", [True, False, None])
def test_a_module_is_cut_in_the_best_metric_there_is(loss):
    adapter = whole(dtype=torch.float64)
    statistics = measured(adapter, loss=bool(loss)) if loss is not None else None
    plan = Plan("by hand", {}, tuple(Choice(m, "keep", 2) for m in adapter.linear))
    packed = pack_adapter(adapter, plan, statistics)
    metric = {True: "loss", False: "output", None: "weight"}[loss]
    for m in adapter.linear:
        best, _ = truncate(adapter.factors(m), 2, metric, statistics.modules[m] if statistics else None)
        assert torch.equal(packed.factors(m).A, best.A) and torch.equal(packed.factors(m).B, best.B)
        assert packed.scale(m) == adapter.scale(m)


@pytest.mark.parametrize("metric", METRICS)
def test_a_plan_that_names_a_metric_is_cut_in_that_one(metric):
    adapter = whole(dtype=torch.float64)
    statistics = measured(adapter)
    plan = Plan("by hand", {}, tuple(Choice(m, "keep", 2) for m in adapter.linear), metric=metric)
    packed = pack_adapter(adapter, plan, statistics)
    for m in adapter.linear:
        best, _ = truncate(adapter.factors(m), 2, metric, statistics.modules[m])
        assert torch.equal(packed.factors(m).A, best.A) and torch.equal(packed.factors(m).B, best.B)


@pytest.mark.parametrize(("metric", "loss"), [("loss", False), ("loss", None), ("output", None)])
def test_a_metric_that_the_statistics_do_not_hold_is_refused_where_a_rank_is_cut(metric, loss):
    adapter = whole()
    statistics = measured(adapter, loss=loss) if loss is not None else None
    with pytest.raises(InputError, match=f"'{metric}' needs statistics"):
        pack_adapter(adapter, replace(MIXED, metric=metric), statistics)
    uncut = Plan("by hand", {}, tuple(Choice(m, "keep", 3) for m in adapter.linear), metric=metric)
    assert digest(pack_adapter(adapter, uncut, statistics)) == digest(adapter)


def test_a_group_is_fitted_to_what_its_modules_do_on_their_inputs():
    """The module's own scale is in, the factors' order of members is the moments' order."""
    adapter = whole(dtype=torch.float64)
    found, tables = inputs_of(adapter, MIXED)
    packed = pack_adapter(adapter, MIXED, None, found)
    for members in packed.groups.values():
        layers = [(adapter.factors(m), adapter.scale(m)) for m in members]
        inputs = [tables[m] for m in members]
        expected = solve(layers, inputs, packed.factors(members[0]).rank)
        scales = [packed.scale(m) for m in members]
        reached = cost(layers, inputs, product(packed.factors(members[0])), scales)
        assert reached == pytest.approx(expected.errors[-1], rel=1e-9)


def test_without_inputs_a_group_is_fitted_to_white_ones():
    adapter = whole(dtype=torch.float64)
    packed = pack_adapter(adapter, MIXED)
    for members in packed.groups.values():
        layers = [(adapter.factors(m), adapter.scale(m)) for m in members]
        white = [5**0.5 * torch.eye(5, dtype=torch.float64)] * len(members)
        expected = solve(layers, white, packed.factors(members[0]).rank)
        reached = cost(layers, white, product(packed.factors(members[0])), [packed.scale(m) for m in members])
        assert reached == pytest.approx(expected.errors[-1], rel=1e-9)


def test_a_copy_is_of_the_member_that_matters_most():
    adapter = whole()
    packed = pack_adapter(adapter, MIXED, share_init="copy")
    assert torch.equal(packed.factors("layers.2.v").A, adapter.factors("layers.3.v").A)
    assert packed.scale("layers.2.v") == adapter.scale("layers.3.v")


def test_a_fresh_start_does_nothing_yet_and_depends_on_the_seed_alone():
    adapter = whole()
    one, same, other = (pack_adapter(adapter, MIXED, share_init="fresh", seed=seed) for seed in (1, 1, 2))
    assert digest(one) == digest(same) != digest(other)
    assert not one.factors("layers.1.q").B.any() and one.factors("layers.1.q").A.any()
    assert one.factors("layers.1.q").B.dtype == adapter.factors("layers.1.q").B.dtype


def test_a_group_named_like_factors_that_stay_is_refused():
    named = {c.module: replace(c, group="layers.0.q" if c.group == "qs" else c.group) for c in MIXED.choices}
    plan = replace(MIXED, choices=tuple(named.values()), groups={"layers.0.q": 2, "vs": 3})
    with pytest.raises(InputError, match=r"layers\.0\.q"):
        pack_adapter(whole(), plan)


def test_statistics_of_another_rank_are_refused():
    adapter = whole()
    statistics = measured(adapter)
    wrong = replace(statistics, modules=dict(statistics.modules) | {"layers.0.v": Moments(torch.eye(2).double())})
    with pytest.raises(InputError, match=r"layers\.0\.v"):
        pack_adapter(adapter, MIXED, wrong)
