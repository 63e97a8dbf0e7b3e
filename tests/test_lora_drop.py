"""LoRA-drop's rule against cases worked by hand and against exact arithmetic; the plan and its checks."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapack.core.adapter import Adapter, Factors, Pointer, digest
from lorapack.core.plan import Choice, Plan, check, from_json, parameters, to_json
from lorapack.core.statistics import Moments, Statistics
from lorapack.errors import InputError
from lorapack.plan.methods import lora_drop

quick = settings(deadline=None, max_examples=100)


def with_norms(norms, shapes=None, ranks=None):
    """An adapter and statistics in which each module's output norm E||scale B A x||^2 is the one given.

    B has orthonormal columns (unit ones where the rank exceeds the width) and only h's first number lives.
    """
    pool, moments = {}, {}
    for module, norm in norms.items():
        d_out, d_in = (shapes or {}).get(module, (6, 5))
        rank = (ranks or {}).get(module, 2)
        forward = torch.zeros(rank, rank, dtype=torch.float64)
        forward[0, 0] = norm / 4  # the scale is 2
        pool[module] = Factors(torch.ones(rank, d_in), torch.eye(d_out, rank))
        moments[module] = Moments(forward)
    adapter = Adapter({}, pool, {m: Pointer(m, 2.0) for m in norms}, {})
    return adapter, Statistics(moments, 1.0, 1, 1, "token", {})


def planned(norms, threshold=0.9, **of_modules):
    adapter, statistics = with_norms(norms, **of_modules)
    return lora_drop.plan(adapter, statistics, threshold=threshold)


def kept(plan):
    return [c.module for c in plan.choices if c.action == "keep"]


def shared(plan):
    return {group: plan.members(group) for group in plan.groups}


def layers(*norms, kind="q"):
    return {f"layers.{n}.{kind}": float(norm) for n, norm in enumerate(norms)}


# The rule, on numbers a reader can add up.


def test_modules_are_kept_from_the_top_until_the_threshold_is_reached():
    # sum 20; in falling order 8 (8), 6 (14), 3 (17), 2 (19), 1 (20)
    norms = layers(2, 8, 1, 6, 3)
    assert kept(planned(norms, 0.70)) == ["layers.1.q", "layers.3.q"]  # 14 of 20 is exactly 0.7
    assert kept(planned(norms, 0.71)) == ["layers.1.q", "layers.3.q", "layers.4.q"]  # the crossing one is kept
    assert shared(planned(norms, 0.71)) == {"shared.layers.q": ["layers.0.q", "layers.2.q"]}


def test_the_score_is_the_share_of_the_types_sum():
    plan = planned(layers(2, 8, 1, 6, 3))
    assert [c.score for c in plan.choices] == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15], rel=1e-12)


def test_among_equals_the_lower_layer_is_kept_and_layer_9_comes_before_layer_10():
    norms = {f"layers.{n}.q": 1.0 for n in (11, 10, 9, 2)}
    assert kept(planned(norms, 0.5)) == ["layers.2.q", "layers.9.q"]


def test_one_dominant_layer_is_enough():
    assert kept(planned(layers(1, 95, 2, 2), 0.9)) == ["layers.1.q"]


def test_a_threshold_of_one_keeps_all_that_contribute_at_all():
    plan = planned(layers(5, 0, 1e-30, 3, 0), 1.0)
    assert kept(plan) == ["layers.0.q", "layers.2.q", "layers.3.q"]
    assert shared(plan) == {"shared.layers.q": ["layers.1.q", "layers.4.q"]}


def test_a_tiny_threshold_keeps_the_top_one_of_every_type():
    assert kept(planned(layers(1, 2, 3) | layers(7, 5, 6, kind="v"), 1e-9)) == ["layers.0.v", "layers.2.q"]


def test_a_sum_that_falls_short_by_rounding_alone_has_reached_the_threshold():
    assert 0.6 + 0.3 < 0.9  # in binary
    assert kept(planned(layers(0.6, 0.3, 0.06, 0.04), 0.9)) == ["layers.0.q", "layers.1.q"]


def test_a_sum_that_truly_falls_short_has_not():
    assert len(kept(planned(layers(0.6, 0.3 - 1e-9, 0.05 + 1e-9, 0.05), 0.9))) == 4  # the last would be alone


def test_a_module_that_would_share_with_nobody_keeps_its_own():
    plan = planned(layers(90, 9, 1) | {"score": 0.001}, 0.95)
    assert kept(plan) == ["layers.0.q", "layers.1.q", "layers.2.q", "score"]
    assert not plan.groups


def test_types_are_normalised_separately():
    # the largest v is below the smallest q: pooled, no v would be kept
    plan = planned(layers(500, 300, 100, 100) | layers(1, 2, 6, 1, kind="v"), 0.8)
    assert kept(plan) == ["layers.0.q", "layers.1.q", "layers.1.v", "layers.2.v"]
    assert shared(plan) == {
        "shared.layers.q": ["layers.2.q", "layers.3.q"],
        "shared.layers.v": ["layers.0.v", "layers.3.v"],
    }


def test_one_type_in_two_shapes_shares_in_two_groups():
    norms = layers(100, 1, 1, 1, 1, 1)
    shapes = {f"layers.{n}.q": (4, 5) if n % 2 else (6, 5) for n in range(6)}
    plan = planned(norms, 0.5, shapes=shapes)
    assert kept(plan) == ["layers.0.q"]
    assert sorted(shared(plan).values()) == [["layers.1.q", "layers.3.q", "layers.5.q"], ["layers.2.q", "layers.4.q"]]


def test_a_group_gets_the_largest_rank_among_its_members_but_no_more_than_their_shape_holds():
    ranks = {"layers.0.q": 7, "layers.1.q": 1, "layers.2.q": 3, "layers.3.q": 2}
    assert planned(layers(97, 1, 1, 1), 0.9, ranks=ranks).groups == {"shared.layers.q": 3}
    narrow = with_norms(layers(97, 1, 1), dict.fromkeys(layers(1, 1, 1), (2, 5)), dict.fromkeys(layers(1, 1, 1), 4))
    plan = lora_drop.plan(*narrow)
    assert plan.groups == {"shared.layers.q": 2}
    check(plan, narrow[0])


def test_where_nothing_contributes_all_share():
    plan = planned(layers(0, 0, 0), 0.9)
    assert kept(plan) == []
    assert shared(plan) == {"shared.layers.q": ["layers.0.q", "layers.1.q", "layers.2.q"]}
    assert [c.score for c in plan.choices] == [0, 0, 0]


def test_a_group_of_an_adapter_that_already_has_one_gets_a_new_name():
    old = Factors(torch.ones(2, 5), torch.ones(6, 2))
    modules = {f"layers.{n}.q": Pointer("shared.layers.q", 2.0) for n in range(4)}
    adapter = Adapter({}, {"shared.layers.q": old}, modules, {})
    moments = {m: Moments(torch.eye(2).double() * (n == 0)) for n, m in enumerate(modules)}
    plan = lora_drop.plan(adapter, Statistics(moments, 1.0, 1, 1, "token", {}))
    assert shared(plan) == {"shared.layers.q.again": ["layers.1.q", "layers.2.q", "layers.3.q"]}


@pytest.mark.parametrize("threshold", [0, -0.1, 1.0001, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(InputError, match=f"threshold {threshold}"):
        planned(layers(1, 2), threshold)


def test_statistics_of_another_adapter_are_refused_by_the_modules_name():
    adapter, statistics = with_norms(layers(1, 2, 3))
    without = replace(statistics, modules={m: v for m, v in statistics.modules.items() if m != "layers.1.q"})
    with pytest.raises(InputError, match=r"layers\.1\.q"):
        lora_drop.plan(adapter, without)
    other = replace(statistics, modules=dict(statistics.modules) | {"layers.2.q": Moments(torch.eye(3).double())})
    with pytest.raises(InputError, match=r"layers\.2\.q are of rank 3, the adapter's is 2"):
        lora_drop.plan(adapter, other)


# The rule, against exact arithmetic.

importances = st.lists(st.integers(0, 60), min_size=1, max_size=9).map(lambda values: layers(*values))
thresholds = st.builds(Fraction, st.integers(1, 40), st.just(40))


@quick
@given(importances, thresholds)
def test_the_kept_modules_are_the_shortest_prefix_that_reaches_the_threshold(importance, threshold):
    exact = {m: Fraction(int(v)) for m, v in importance.items()}
    ranked = sorted(exact, key=lambda m: (-exact[m], int(m.split(".")[1])))
    length = next(
        n for n in range(len(ranked) + 1) if sum(exact[m] for m in ranked[:n]) >= threshold * sum(exact.values())
    )
    assert lora_drop.keep_until(importance, float(threshold)) == ranked[:length]


@quick
@given(importances, st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_raising_the_threshold_never_removes_a_module(importance, one, other):
    low, high = sorted((one, other))
    assert set(lora_drop.keep_until(importance, low)) <= set(lora_drop.keep_until(importance, high))
    assert set(kept(planned(importance, low))) <= set(kept(planned(importance, high)))


@quick
@given(importances, st.integers(-12, 12), st.floats(0.01, 1))
def test_the_unit_of_the_norms_does_not_matter(importance, power, threshold):
    scaled = {m: v * 2.0 ** (10 * power) for m, v in importance.items()}
    assert kept(planned(scaled, threshold)) == kept(planned(importance, threshold))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 1))
def test_the_plan_does_not_depend_on_how_a_pair_is_written(seed, threshold):
    """(B, A) and (B R^-1, R A) are the same update, whatever R is."""
    g = torch.Generator().manual_seed(seed)
    first, second, before, after = {}, {}, {}, {}
    for n in range(6):
        a, b, r = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 5), (6, 3), (3, 3)))
        r = torch.linalg.qr(r).Q * torch.tensor([0.5, 1.0, 2.0])  # far from singular
        h = torch.randn(20, 3, generator=g, dtype=torch.float64)
        name = f"layers.{n}.q"
        first[name], before[name] = Factors(a, b), Moments(h.T @ h)
        second[name], after[name] = Factors(r @ a, b @ r.inverse()), Moments(r @ h.T @ h @ r.T)
    one, other = (
        lora_drop.plan(
            Adapter({}, pool, {m: Pointer(m, 0.5) for m in pool}, {}),
            Statistics(moments, 20.0, 20, 1, "token", {}),
            threshold=threshold,
        )
        for pool, moments in ((first, before), (second, after))
    )
    assert [c.score for c in one.choices] == pytest.approx([c.score for c in other.choices], rel=1e-9)
    assert [replace(c, score=None) for c in one.choices] == [replace(c, score=None) for c in other.choices]
    assert one.groups == other.groups


# The budget.


@st.composite
def mixed(draw):
    """Two types of different shapes, ranks and norms at random."""
    modules = [f"layers.{n}.{kind}" for kind in "qv" for n in range(draw(st.integers(1, 5)))]
    norms = {m: float(draw(st.integers(0, 30))) for m in modules}
    ranks = {m: draw(st.integers(1, 4)) for m in modules}
    shapes = {m: (6, 5) if m.endswith("q") else (3, 5) for m in modules}
    return with_norms(norms, shapes, ranks), norms


def thresholds_that_matter(norms):
    """Every share of a type's sum that some prefix reaches, worked out again."""
    found = {1.0}
    for kind in "qv":
        values = sorted((v for m, v in norms.items() if m.endswith(kind)), reverse=True)
        found |= {sum(values[: n + 1]) / sum(values) for n in range(len(values)) if sum(values)}
    return sorted(found)


@quick
@given(mixed(), st.integers(0, 400))
def test_a_budget_takes_the_largest_threshold_that_fits_it(case, budget):
    (adapter, statistics), norms = case
    plans = [lora_drop.plan(adapter, statistics, threshold=t) for t in thresholds_that_matter(norms)]
    sizes = [parameters(plan, adapter) for plan in plans]
    fitting = [plan for plan, size in zip(plans, sizes, strict=True) if size <= budget]
    if not fitting:
        with pytest.raises(InputError, match=f"has {min(sizes):,} "):
            lora_drop.plan(adapter, statistics, budget=budget)
        return
    found = lora_drop.plan(adapter, statistics, budget=budget)
    assert parameters(found, adapter) <= budget
    assert found.choices == fitting[-1].choices and found.groups == fitting[-1].groups
    again = lora_drop.plan(adapter, statistics, threshold=found.options["threshold"])
    assert again == found  # the threshold it names is the one that makes this plan


def test_the_next_threshold_would_exceed_the_budget():
    # five modules of 22 parameters: one kept and a group 44, two kept 66, three kept 88, all five 110
    adapter, statistics = with_norms(layers(16, 8, 4, 2, 1))
    sizes = {b: parameters(lora_drop.plan(adapter, statistics, budget=b), adapter) for b in range(44, 115)}
    assert {b: s for b, s in sizes.items() if s != sizes.get(b - 1)} == {44: 44, 66: 66, 88: 88, 110: 110}


def test_a_budget_of_a_compact_adapter_sees_that_giving_up_one_user_of_a_shared_pair_frees_nothing():
    adapter, statistics = with_norms(layers(6, 5, 4, 3, 2, 1))
    together = adapter.with_pool({"one": adapter.pool["layers.0.q"]}, {m: Pointer("one", 2.0) for m in adapter.modules})
    found = lora_drop.plan(together, statistics, budget=22)  # one pair: 2 * (6 + 5)
    assert parameters(found, together) == 22 and kept(found) == together.linear


def test_a_budget_that_is_too_small_says_what_the_smallest_plan_needs():
    adapter, statistics = with_norms(layers(16, 8, 4, 2, 1))
    with pytest.raises(InputError, match=r"a budget of 43 parameters .* has 44 \(40\.0%\)"):
        lora_drop.plan(adapter, statistics, budget=43)


# The file, and edits by hand.


@quick
@given(mixed(), st.floats(0.01, 1))
def test_a_plan_survives_its_file(case, threshold):
    plan = lora_drop.plan(*case[0], threshold=threshold)
    assert from_json(to_json(plan)) == plan
    check(plan, case[0][0])
    assert plan.adapter == digest(case[0][0])


def edited(change):
    """The file of a sound plan (keeps layer 0 at rank 2, layers 1 to 3 share, score is kept), edited by hand."""
    norms = layers(97, 1, 1, 1) | {"score": 1.0}
    adapter, statistics = with_norms(norms, {"score": (3, 5)})
    value = json.loads(to_json(lora_drop.plan(adapter, statistics)))
    change(value, {c["module"]: c for c in value["choices"]})
    return adapter, json.dumps(value)


def refuse(change, *words):
    adapter, text = edited(change)
    with pytest.raises(InputError) as refused:
        check(from_json(text), adapter)
    for word in words:
        assert word in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_plan_that_the_edits_start_from_is_accepted():
    adapter, text = edited(lambda plan, of: None)
    check(from_json(text), adapter)


def put(key, name, value):
    return lambda plan, of: of[name].update({key: value})


GROUP = "shared.layers.q"
EDITS = {
    "an unknown module": (put("module", "score", "layers.9.q"), "layers.9.q"),
    "a missing module": (lambda plan, of: plan["choices"].remove(of["layers.2.q"]), "layers.2.q"),
    "a module named twice": (lambda plan, of: plan["choices"].append(of["layers.2.q"]), "layers.2.q", "2 times"),
    "rank 0": (put("rank", "layers.0.q", 0), "layers.0.q", "1 to 2"),
    "a rank above the module's": (put("rank", "layers.0.q", 3), "layers.0.q", "1 to 2"),
    "no rank": (put("rank", "layers.0.q", None), "layers.0.q"),
    "kept and in a group": (put("group", "layers.0.q", GROUP), "layers.0.q", "group"),
    "dropped and in a group": (put("action", "layers.1.q", "drop"), "layers.1.q", "group"),
    "an unknown group": (put("group", "layers.1.q", "elsewhere"), "layers.1.q", "elsewhere"),
    "no group": (put("group", "layers.1.q", None), "layers.1.q"),
    "a group of two shapes": (
        lambda plan, of: of["score"].update(action="share", group=GROUP),
        GROUP,
        "(3, 5)",
        "(6, 5)",
    ),
    "an empty group": (lambda plan, of: plan["groups"].update(nobody=1), "nobody"),
    "a group of rank 0": (lambda plan, of: plan["groups"].update({GROUP: 0}), GROUP, "rank 0"),
    "a group of too high a rank": (lambda plan, of: plan["groups"].update({GROUP: 6}), GROUP, "rank 6"),
    "a group whose name is a path": (
        lambda plan, of: (
            plan["groups"].update({"../x": plan["groups"].pop(GROUP)}),
            [of[f"layers.{n}.q"].update(group="../x") for n in (1, 2, 3)],
        ),
        "../x",
    ),
    "an unknown field": (lambda plan, of: plan.update(colour="red"), "colour"),
    "an unknown field of a choice": (put("colour", "layers.1.q", "red"), "choices.1.colour"),
    "a missing field": (lambda plan, of: plan.pop("choices"), "choices"),
    "a number in words": (put("rank", "layers.0.q", "four"), "choices.0.rank"),
    "half a rank": (put("rank", "layers.0.q", 1.5), "choices.0.rank"),
    "an unknown action": (put("action", "layers.0.q", "burn"), "choices.0.action"),
    "a list for an object": (lambda plan, of: plan.update(groups=[1]), "groups"),
    "another version": (lambda plan, of: plan.update(version=2), "version 2"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_bad_edit_is_refused_by_name(what):
    refuse(*EDITS[what])


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"method": "x"}'])
def test_a_file_that_is_no_plan_is_refused_in_one_line(text):
    with pytest.raises(InputError, match=r"^plan\.json[^\n]*$"):
        from_json(text)


def test_a_plan_written_by_hand_needs_no_digest_and_no_score():
    adapter, _ = with_norms(layers(1, 2))
    plan = from_json(
        '{"method": "by hand", "options": {}, "choices": ['
        '{"module": "layers.0.q", "action": "drop"}, {"module": "layers.1.q", "action": "keep", "rank": 1}]}'
    )
    assert plan == Plan("by hand", {}, (Choice("layers.0.q", "drop"), Choice("layers.1.q", "keep", 1)))
    check(plan, adapter)
    assert parameters(plan, adapter) == 1 * (6 + 5)
