"""What holds for every method, and what the learnt and first-order ones are made of."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import FIXTURES, attached, llama

from lorapack.core.adapter import Factors, Pointer, digest, size
from lorapack.core.plan import Choice, Plan, check, parameters
from lorapack.core.statistics import PARTS, add, from_tensors, to_tensors
from lorapack.data.batches import training_batches
from lorapack.data.encode import Encoded
from lorapack.data.prepare import Prepared
from lorapack.errors import InputError
from lorapack.job import plan_adapter
from lorapack.measure.gradients import measure_gradients
from lorapack.measure.measure import measure_rows
from lorapack.measure.omega import learn_omega, project, stages
from lorapack.model.forward import losses, predict
from lorapack.model.point import place, point
from lorapack.pack import pack_adapter
from lorapack.pack.truncate import canonical
from lorapack.plan import METHODS
from lorapack.plan.methods import lora_drop

NEEDS = ("backward", "gradients", "omega")
OPTIONS = {"lora-drop": {"pruned": "drop"}}


def rows(count=16, seed=0):
    draw = random.Random(seed)
    texts = [tuple(draw.randrange(3, 500) for _ in range(draw.randrange(6, 16))) for _ in range(count)]
    return [Encoded(n, ids, ids) for n, ids in enumerate(texts)]


def rotated(adapter, seed=1):
    """The same updates in other bases: A -> R A, B -> B R^-1."""
    torch.manual_seed(seed)
    pool = {}
    for name, f in adapter.pool.items():
        r = torch.linalg.qr(torch.randn(f.rank, f.rank, dtype=torch.float64))[0] @ torch.diag(
            torch.linspace(0.5, 2, f.rank, dtype=torch.float64)
        )
        pool[name] = Factors((r @ f.A.double()).float(), (f.B.double() @ r.inverse()).float())
    return dataclasses.replace(adapter, pool=pool)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    adapter, loaded = attached(
        llama(3), tmp_path_factory.mktemp("small"), target_modules=["q_proj", "v_proj", "up_proj"]
    )
    return adapter, loaded


@pytest.fixture(scope="module")
def measured(small):
    adapter, loaded = small
    prepared = Prepared(rows(), [], [], [], {})
    turned = rotated(adapter)
    return (adapter, measure_rows(loaded, adapter, prepared, NEEDS)), (
        turned,
        measure_rows(loaded, turned, prepared, NEEDS),
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["60%", "35%"])
def test_the_plan_depends_on_the_updates_alone_not_on_the_basis_they_are_kept_in(measured, name, budget):
    plans = [plan_adapter(a, s, name, budget=budget, **OPTIONS.get(name, {})) for a, s in measured]
    one, two = plans
    assert [(c.module, c.action, c.rank, c.group) for c in one.choices] == [
        (c.module, c.action, c.rank, c.group) for c in two.choices
    ]
    assert one.groups == two.groups
    assert one.groups or len({c.action for c in one.choices} | {c.rank for c in one.choices}) > 1
    for c, d in zip(one.choices, two.choices, strict=True):
        assert (c.score or 0.0) == pytest.approx(d.score or 0.0, rel=2e-3, abs=1e-9)
        assert c.scale == pytest.approx(d.scale, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["60%", "30%", "12%"])
def test_a_plan_keeps_to_its_budget_and_its_size_is_the_packed_adapters(measured, name, budget):
    adapter, statistics = measured[0]
    try:
        plan = plan_adapter(adapter, statistics, name, budget=budget, **OPTIONS.get(name, {}))
    except InputError as error:
        assert "too small" in str(error)
        return
    packed = pack_adapter(adapter, plan, statistics)
    assert parameters(plan, adapter) == size(packed).parameters <= float(budget[:-1]) / 100 * size(adapter).parameters


@pytest.mark.parametrize("budget", ["60%", "12%"])
def test_of_all_elements_those_stay_to_which_the_loss_is_most_sensitive_and_the_mask_is_paid_for(measured, budget):
    (adapter, statistics), (_, of_turned) = measured
    plan = plan_adapter(adapter, statistics, "snip", budget=budget, unit="element")
    assert [c.elements for c in plan.choices] == [
        c.elements for c in plan_adapter(measured[1][0], of_turned, "snip", budget=budget, unit="element").choices
    ]
    packed = pack_adapter(adapter, plan, statistics)
    limit = int(float(budget[:-1]) / 100 * size(adapter).parameters)
    masks = sum(-(-adapter.factors(m).parameters // 32) for m in packed.modules)
    left, thrown, kept = [], [], 0
    for m in adapter.linear:
        whole = canonical(adapter.factors(m))
        moments = statistics.modules[m]
        found = packed.factors(m) if m in packed.modules else Factors(whole.A * 0, whole.B * 0)
        for old, new, score in ((whole.A, found.A, moments.taylor_a), (whole.B, found.B, moments.taylor_b)):
            assert torch.equal(new[new != 0], old[new != 0])
            left += score.abs()[new != 0].tolist()
            thrown += score.abs()[new == 0].tolist()
        kept += int((found.A != 0).sum() + (found.B != 0).sum())
    assert min(left) >= max(thrown)
    assert limit - max(f.parameters for f in adapter.pool.values()) / 32 - 2 <= kept + masks <= limit
    assert kept + masks == size(packed).parameters == parameters(plan, adapter)
    assert size(packed).bytes <= 4 * (kept + masks) < size(packed).bytes + 4 * len(packed.modules)


def test_the_keep_rate_is_of_the_elements(measured):
    adapter, statistics = measured[0]
    plan = plan_adapter(adapter, statistics, "snip", unit="element", keep="0.5")
    assert sum(c.elements or 0 for c in plan.choices) == round(size(adapter).parameters / 2)
    for options in (
        {"keep": "0.5"},
        {"keep": "0", "unit": "element"},
        {"keep": "0.5", "unit": "element", "budget": "9%"},
    ):
        with pytest.raises(InputError, match="--keep is a share"):
            plan_adapter(adapter, statistics, "snip", **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_lacks(measured, name):
    adapter, statistics = measured[0]
    if METHODS[name].needs({}) == "nothing":
        pytest.skip("it needs nothing")
    with pytest.raises(InputError, match=f"{name} needs measurements"):
        plan_adapter(adapter, None, name, budget="50%")
    nothing = dict.fromkeys(PARTS[1:])
    modules = {m: dataclasses.replace(s, **nothing) for m, s in statistics.modules.items()}
    poor = dataclasses.replace(statistics, modules=modules)
    if METHODS[name].needs({}) != "forward":
        with pytest.raises(InputError, match=f"lorapack measure --method {name}|lorapack measure --method rank"):
            plan_adapter(adapter, poor, name, budget="50%")


def test_statistics_of_every_kind_survive_the_file_and_learnt_ones_do_not_add(measured):
    _, statistics = measured[0]
    again = from_tensors(*to_tensors(statistics))
    both = add(statistics, again)
    for m, one in statistics.modules.items():
        for part in dataclasses.fields(one):
            assert torch.equal(getattr(one, part.name), getattr(again.modules[m], part.name))
        assert torch.equal(both.modules[m].taylor_b, 2 * one.taylor_b)
        assert both.modules[m].omega is None and both.modules[m].triplets is None
    assert again.provenance["omega"] == stages(9)


def test_gradients_are_those_of_autograd_and_the_importance_is_adaloras(small):
    """All elements apart, batch by batch, as the paper writes it: P, Lambda and Q of the update's SVD."""
    adapter, loaded = small
    batches = list(training_batches(rows(), 4, 3, loaded.pad, 0))
    found = measure_gradients(loaded, adapter, batches)
    module = adapter.linear[1]
    f = canonical(adapter.factors(module))
    u, s, vt = torch.linalg.svd(f.B.double() @ f.A.double())
    r = f.rank
    p, lam, q = u[:, :r], s[:r], vt[:r]
    mean, spread = {}, {}
    total = torch.zeros_like(f.B, dtype=torch.float64)
    for batch in batches:
        placed = place(adapter, loaded.device, trainable=True)
        point(loaded, placed)
        each = losses(loaded, predict(loaded, batch))
        each.mean().backward()
        a, b = placed.pairs[adapter.modules[module].factors]
        # the derivative by W = B A, from that by B: dB = dW A^T; only its part in the span of A matters
        dw = b.grad.double() @ torch.linalg.pinv(a.detach().double().T)
        dw_left = torch.linalg.pinv(b.detach().double().T) @ a.grad.double()
        parts = {
            "P": p * (dw @ q.T * lam),
            "L": lam * torch.diag(p.T @ dw @ q.T),
            "Q": q * (lam[:, None] * p.T @ dw_left),
        }
        total += p * (dw @ q.T * lam) * len(each)
        for name, value in parts.items():
            mean[name] = 0.85 * mean.get(name, 0) + 0.15 * value.abs()
            spread[name] = 0.85 * spread.get(name, 0) + 0.15 * (value.abs() - mean[name]).abs()
    score = {name: mean[name] * spread[name] for name in mean}
    wanted = score["L"] + score["P"].mean(dim=0) + score["Q"].mean(dim=1)
    assert torch.allclose(found[module][2], wanted, rtol=2e-3)
    assert torch.allclose(found[module][1], total, rtol=1e-2, atol=1e-3 * float(total.abs().max()))


def test_omega_has_no_more_weights_than_each_stage_allows_and_finds_the_only_module_that_helps(tmp_path):
    """One module writes a vector that makes the (repeated) target more likely; the others write noise."""
    adapter, loaded = attached(llama(2), tmp_path, target_modules=["o_proj", "down_proj"])
    good = "model.layers.1.mlp.down_proj"
    torch.manual_seed(0)
    head = loaded.base.lm_head.weight[7].detach()
    pool = {}
    for m, f in adapter.pool.items():
        if m == good:
            pool[m] = Factors(f.A, torch.zeros_like(f.B))
            continue
        pool[m] = Factors(f.A * 1e-2, f.B * 1e-2)
    text = tuple([7] * 12)
    batches = list(training_batches([Encoded(n, text, text) for n in range(8)], 4, 2, loaded.pad, 0))
    seen = []
    handle = loaded.layers[good].register_forward_hook(lambda _, given, __: seen.append(given[0][0, -1].detach()))
    point(loaded, place(None, loaded.device))
    predict(loaded, batches[0])
    handle.remove()
    x = seen[0]
    pool[good] = Factors(
        torch.cat([x[None] / x.norm() ** 2, torch.zeros(3, len(x))]),
        torch.cat([5 * (head / head.norm())[:, None], torch.zeros(len(head), 3)], dim=1),
    )
    adapter = dataclasses.replace(adapter, pool=pool, modules={m: Pointer(m, 1.0) for m in adapter.modules})
    omega, allowed = learn_omega(loaded, adapter, batches)
    assert allowed == [4, 2, 1]
    assert [sum(float(w[k]) != 0 for w in omega.values()) <= most for k, most in enumerate(allowed)] == [True] * 3
    assert {m for m, w in omega.items() if float(w[-1])} == {good}
    assert all(isinstance(layer.scaling["default"], float) for layer in loaded.layers.values())


def test_projecting_keeps_the_largest_and_the_earlier_of_equals():
    omega = torch.tensor([0.5, -2.0, 0.5, 0.1])
    project(omega, 2)
    assert omega.tolist() == [0.5, -2.0, 0.0, 0.0]


def test_weightlora_multiplies_the_kept_outputs_with_their_weights(measured):
    adapter, statistics = measured[0]
    plan = plan_adapter(adapter, statistics, "weightlora", keep="3")
    packed = pack_adapter(adapter, plan, statistics)
    assert len(packed.linear) == 3
    stage = max(i for i, count in enumerate(stages(9)) if count >= 3)
    for m in packed.linear:
        assert packed.scale(m) == pytest.approx(adapter.scale(m) * float(statistics.modules[m].omega[stage]))


def test_an_expanded_rank_fills_the_budget_and_changes_nothing_before_recovery(measured):
    adapter, statistics = measured[0]
    plain = pack_adapter(adapter, plan_adapter(adapter, statistics, "weightlora", keep=3), statistics)
    budget = int(size(adapter).parameters * 0.9)
    plan = plan_adapter(adapter, statistics, "weightlora", budget=str(budget), keep=3, expand_rank="true")
    grown = pack_adapter(adapter, plan, statistics, seed=4)
    assert 0.75 * budget < size(grown).parameters <= budget
    for m in plain.linear:
        f, g = plain.factors(m), grown.factors(m)
        assert g.rank > f.rank
        assert torch.equal(g.B @ g.A, torch.cat([f.B, torch.zeros(len(f.B), g.rank - f.rank)], 1) @ g.A)
        assert torch.allclose(g.B @ g.A, f.B @ f.A, atol=1e-6) and g.A[f.rank :].abs().min() > 0
    assert digest(pack_adapter(adapter, plan, statistics, seed=4)) == digest(grown)


def test_no_rank_grows_beyond_its_shape(measured):
    adapter, _ = measured[0]
    module = adapter.linear[0]
    choices = tuple(Choice(m, "keep", adapter.factors(m).rank) for m in adapter.linear if m != module)
    most = min(adapter.factors(module).shape)
    check(Plan("by hand", {}, (*choices, Choice(module, "grow", most))), adapter)
    for rank in (4, most + 1):
        with pytest.raises(InputError, match=f"grows to rank {rank}, possible are 5 to {most}"):
            check(Plan("by hand", {}, (*choices, Choice(module, "grow", rank))), adapter)


def test_lora_drops_ablations_keep_as_many_and_others(measured):
    adapter, statistics = measured[0]

    def kept(**options):
        plan = plan_adapter(adapter, statistics, "lora-drop", threshold=0.6, **options)
        return {c.module for c in plan.choices if c.action == "keep" and "nobody" not in c.reason}

    found = {select: kept(select=select) for select in ("importance", "inverse", "random", "top", "bottom")}
    for kind in ("q_proj", "v_proj", "up_proj"):
        assert len({sum(m.endswith(kind) for m in each) for each in found.values()}) == 1
    assert "model.layers.2.self_attn.q_proj" in found["top"] and "model.layers.0.self_attn.q_proj" in found["bottom"]
    norms = {c.module: c.score for c in plan_adapter(adapter, statistics, "lora-drop").choices}
    for kind in ("q_proj", "v_proj", "up_proj"):
        ranked = sorted((m for m in norms if m.endswith(kind)), key=norms.get)
        assert ranked[0] in found["inverse"] and ranked[-1] in found["importance"]
    assert kept(select="random", draw=1) == kept(select="random", draw="1")
    dropped = plan_adapter(adapter, statistics, "lora-drop", threshold=0.6, pruned="drop")
    assert not dropped.groups and {c.action for c in dropped.choices} == {"keep", "drop"}


def test_layers_that_are_alike_share_with_each_other(measured):
    adapter, _ = measured[0]
    q = [m for m in adapter.linear if m.endswith("q_proj")]
    first, other = adapter.factors(q[0]), adapter.factors(q[1])
    pool = {**adapter.pool, q[2]: Factors(-2 * rotated(adapter).factors(q[0]).A, rotated(adapter).factors(q[0]).B)}
    twin = dataclasses.replace(adapter, pool=pool)
    assert lora_drop.alike(twin, q, 2) == [[q[0], q[2]], [q[1]]]
    assert lora_drop.alike(twin, q, 1) == [q] and lora_drop.alike(twin, q, 3) == [[m] for m in q]
    assert first.shape == other.shape


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"select": "best"}, "--select 'best' is none of importance, inverse, random, top, bottom"),
        ({"threshold": "much"}, "--threshold 'much' is not a number"),
        ({"groups": "1.5"}, "--groups '1.5' is not a whole number"),
        ({"groups": 0}, "--groups 0 must be 1 or more"),
        ({"expand_rank": "true"}, "lora-drop has no --expand-rank; it has --threshold"),
    ],
)
def test_an_option_that_cannot_be_is_named(measured, options, what):
    with pytest.raises(InputError, match=what):
        plan_adapter(*measured[0], "lora-drop", **options)


def test_a_new_method_is_one_file_and_one_line(tmp_path):
    """The page's example, put into a copy of the package: every command knows it, its options too."""
    page = (FIXTURES.parent / "docs" / "methods" / "adding.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    package = tmp_path / "lorapack"
    source = Path(__file__).parent.parent / "lorapack"
    subprocess.run(["cp", "-r", str(source), str(package)], check=True)
    (package / "plan" / "methods" / "half_rank.py").write_text(code)
    names = package / "plan" / "methods" / "__init__.py"
    names.write_text(names.read_text().replace("NAMES = (\n", 'NAMES = (\n    "half-rank",\n'))

    def lorapack(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "lorapack", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )

    assert "half-rank" in lorapack("methods").stdout
    done = lorapack("plan", FIXTURES / "adapter", "--method", "half-rank", "--share", "0.25", "-o", "plan.json")
    assert done.returncode == 0, done.stderr
    assert '"rank": 4' in (tmp_path / "plan.json").read_text()
    wrong = lorapack("plan", FIXTURES / "adapter", "--method", "half-rank", "--part", "0.25", "-o", "other.json")
    assert wrong.returncode == 2 and "half-rank has no --part; it has --share" in wrong.stderr
