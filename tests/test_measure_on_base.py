"""An adapter measured where the model computes without it, or with another: added up token by token in float64."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import attached, bert, gpt2, llama, lora

from lorapack.core.statistics import add, both
from lorapack.data.batches import batches
from lorapack.data.encode import IGNORED, Encoded
from lorapack.errors import InputError
from lorapack.measure.elsewhere import measure_moments_elsewhere
from lorapack.measure.moments import measure_moments
from lorapack.measure.on_base import measure_moments_on_base
from lorapack.measure.sums import HELD
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.pack.truncate import shares, truncate
from lorapack.read import read_adapter

LENGTHS = (9, 4, 1, 6, 12)
SETTINGS = {
    "llama": (
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "r": 3, "lora_alpha": 30},
        {"target_modules": ["gate_proj", "q_proj"], "rank_pattern": {"q_proj": 7}, "use_rslora": True},
        {"target_modules": ["q_proj"]},  # of the first one's rank on the same modules, but with factors of its own
    ),
    "gpt2": (
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 6},
    ),
}


@pytest.fixture(scope="module", autouse=True, params=[0, 300], ids=["one by one", "held back"])
def held(request):
    """All of this on a CPU's way of adding up and on a GPU's, that holds modules back and adds them up together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HELD, "cpu", request.param)
        yield


def texts():
    """Rows of random tokens; of every other row the first third is a prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n, length in enumerate(LENGTHS):
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        prompt = length // 3 if n % 2 else 0
        found.append(Encoded(n, tuple(ids), (*[IGNORED] * prompt, *ids[prompt:])))
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request, tmp_path_factory):
    """A base in float64, several adapters of it of different modules, ranks and scales."""
    make = {"llama": lambda: llama(2), "gpt2": gpt2}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    first, *others = SETTINGS[request.param]
    adapter, loaded = attached(make(), folder, **first)
    loaded.model.double()
    adapters = {"0": adapter}
    for n, settings in enumerate(others, 1):
        other = read_adapter(lora(make(), folder / str(n), seed=n, **settings))
        adapters[str(n)] = replace(other, carried={})  # PEFT copies the base's head beside an adapter on it
    return SimpleNamespace(
        name=request.param,
        base=make().double(),
        adapters=adapters,
        loaded=loaded,
        batches=batches(texts(), 20, loaded.pad),
    )


def seen(case, modules):
    """Of the base alone, for every module its inputs x and its outputs' derivatives, one pair of tables a row."""
    found = {m: [] for m in modules}
    for batch in case.batches:
        kept, handles = {}, []
        for m in modules:

            def see(_, given, y, m=m, kept=kept):
                y.retain_grad()
                kept[m] = given[0], y

            handles.append(case.base.get_submodule(m).register_forward_hook(see))
        logits = case.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for handle in handles:
            handle.remove()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
        )
        loss.backward()
        for m, (x, y) in kept.items():
            for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
                found[m].append((x[row, :length].detach(), y.grad[row, :length]))
    return found


def naive(adapter, module, tables, average):
    """Every part of the moments, token by token."""
    factors, scale = adapter.factors(module), adapter.scale(module)
    a, b = factors.A.double(), factors.B.double()
    parts = dict.fromkeys(
        ("forward", "backward", "cross", "row_forward", "row_backward", "token_forward", "token_backward"), 0
    )
    for xs, slopes in tables:
        weight = 1 if average == "token" else 1 / len(xs)
        whole = 0
        for x, slope in zip(xs, slopes, strict=True):
            h, u = a @ x, scale * b.T @ slope
            d = torch.outer(u, h)
            whole = whole + d
            parts["forward"] += weight * torch.outer(h, h)
            parts["backward"] += weight * torch.outer(u, u)
            parts["cross"] += weight * d
            parts["token_forward"] += weight * d.T @ a @ a.T @ d
            parts["token_backward"] += weight * d @ b.T @ b @ d.T
        parts["row_forward"] += weight * whole.T @ a @ a.T @ whole
        parts["row_backward"] += weight * whole @ b.T @ b @ whole.T
    return parts


def same(found, expected, rel):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= rel * expected.norm(), (found, expected)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_each_adapters_moments_are_the_sums_over_what_its_modules_see_in_the_base_alone(case, average):
    found = measure_moments_on_base(case.loaded, case.adapters, case.batches, loss=True, average=average)
    tables = seen(case, {m: 0 for adapter in case.adapters.values() for m in adapter.linear})
    assert found.keys() == case.adapters.keys()
    for name, adapter in case.adapters.items():
        statistics = found[name]
        assert list(statistics.modules) == adapter.linear
        assert (statistics.tokens, statistics.samples) == (sum(LENGTHS), len(LENGTHS))
        for m in adapter.linear:
            for part, expected in naive(adapter, m, tables[m], average).items():
                # lorapack's cross entropy and Llama's norms are in float32
                same(getattr(statistics.modules[m], part), expected, 1e-9 if part == "forward" else 1e-5)
                assert expected.any()


@pytest.mark.parametrize("loss", [False, True])
def test_in_company_an_adapter_measures_what_it_measures_alone(case, loss):
    together = measure_moments_on_base(case.loaded, case.adapters, case.batches, loss=loss)
    for name, adapter in case.adapters.items():
        alone = measure_moments_on_base(case.loaded, {name: adapter}, case.batches, loss=loss)[name]
        assert alone.provenance == together[name].provenance
        for m in adapter.linear:
            same(together[name].modules[m].forward, alone.modules[m].forward, 1e-12)
            assert (alone.modules[m].cross is not None) == loss
            if loss:
                same(together[name].modules[m].cross, alone.modules[m].cross, 1e-9)


def test_an_adapter_that_adds_nothing_is_measured_exactly(case):
    """With B = 0 the base alone is the model with the adapter on it, so both ways of measuring agree."""
    adapter = case.adapters["0"]
    zero = adapter.with_pool(
        {name: type(f)(f.A, torch.zeros_like(f.B)) for name, f in adapter.pool.items()}, dict(adapter.modules)
    )
    point(case.loaded, place(zero, case.loaded.device))
    with_it = measure_moments(case.loaded, zero.linear, case.batches)
    on_base = measure_moments_on_base(case.loaded, {"zero": zero}, case.batches)["zero"]
    for m in zero.linear:
        same(on_base.modules[m].forward, with_it.modules[m].forward, 1e-6)  # `place` makes factors of float32


def cut(adapter):
    """The adapter at rank one, and without its last module."""
    *kept, _ = adapter.linear
    pool = {name: truncate(adapter.pool[name], 1, "weight")[0] for name in kept}
    return adapter.with_pool(pool, {m: adapter.modules[m] for m in kept})


@pytest.mark.parametrize("average", ["token", "sample"])
def test_elsewhere_the_moments_are_the_sums_over_what_the_modules_see_with_the_other_adapter_merged(case, average):
    adapter, at = case.adapters["0"], cut(case.adapters["0"])
    found = measure_moments_elsewhere(case.loaded, adapter, at, case.batches, average=average)
    merged = copy.deepcopy(case.base)
    with torch.no_grad():
        for m in at.linear:
            update = at.scale(m) * at.factors(m).B.double() @ at.factors(m).A.double()
            weight = merged.get_submodule(m).weight
            weight += update.T if case.name == "gpt2" else update
    tables = seen(SimpleNamespace(base=merged, batches=case.batches), adapter.linear)
    alone = seen(case, adapter.linear)
    assert list(found.modules) == adapter.linear
    for m in adapter.linear:
        for part, expected in naive(adapter, m, tables[m], average).items():
            same(getattr(found.modules[m], part), expected, 1e-5)
    last = adapter.linear[-1]
    with pytest.raises(AssertionError):  # the other adapter matters
        same(found.modules[last].forward, naive(adapter, last, alone[last], average)["forward"], 1e-3)


def test_elsewhere_with_the_adapter_itself_nothing_is_new(case):
    adapter = case.adapters["0"]
    point(case.loaded, place(adapter, case.loaded.device))
    usual = measure_moments(case.loaded, adapter.linear, case.batches, loss=True)
    found = measure_moments_elsewhere(case.loaded, adapter, adapter, case.batches)
    for m in adapter.linear:
        for part in ("forward", "backward", "cross", "row_forward", "row_backward", "token_forward", "token_backward"):
            same(getattr(found.modules[m], part), getattr(usual.modules[m], part), 1e-5)
    assert all(not module._forward_hooks for module in case.loaded.model.modules())


def test_two_measurements_have_an_equal_say_however_large_the_slopes_of_the_second_are(case):
    """Slopes c times as large: what plans look at, the values of atoms, stays what it was."""
    adapter = case.adapters["0"]
    first = measure_moments_on_base(case.loaded, {"": adapter}, case.batches, loss=True)[""]
    second = measure_moments_elsewhere(case.loaded, adapter, cut(adapter), case.batches)
    powers = {"backward": 2, "cross": 1, "row_forward": 2, "row_backward": 2, "token_forward": 2, "token_backward": 2}
    steeper = {
        m: replace(moments, **{part: 7.0**power * getattr(moments, part) for part, power in powers.items()})
        for m, moments in second.modules.items()
    }
    one, other, twice = both(first, second), both(first, replace(second, modules=steeper)), both(first, first)
    for m in adapter.linear:
        torch.testing.assert_close(one.modules[m].cross, other.modules[m].cross, rtol=1e-9, atol=1e-15)
        for metric in ("loss", "fisher"):
            values = [shares(adapter.factors(m), metric, s.modules[m]) for s in (one, other, twice, first)]
            torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
            assert not torch.allclose(values[0], values[2], rtol=1e-3)
            torch.testing.assert_close(values[2] / values[2].sum(), values[3] / values[3].sum(), rtol=1e-9, atol=1e-15)


def test_the_model_is_left_frozen_without_hooks_and_measures_as_before(case):
    adapter = case.adapters["0"]

    def alone():
        point(case.loaded, place(adapter, case.loaded.device))
        return measure_moments(case.loaded, adapter.linear, case.batches, loss=True)

    before = alone()
    measure_moments_on_base(case.loaded, case.adapters, case.batches, loss=True)
    assert all(p.grad is None and not p.requires_grad for p in case.loaded.model.parameters())
    assert all(not module._forward_hooks for module in case.loaded.model.modules())
    after = alone()
    for m in adapter.linear:
        assert torch.equal(before.modules[m].cross, after.modules[m].cross)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_what_the_base_was_loaded_with_plays_no_part(case, tmp_path):
    """Not even a head of its own."""
    with_head = read_adapter(lora(llama(2), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with_head = replace(with_head, carried={name: -tensor for name, tensor in with_head.carried.items()})
    assert with_head.carried
    loaded = load(with_head, case.loaded.base_model, device="cpu")
    loaded.model.double()
    found, expected = (
        measure_moments_on_base(of, {"0": case.adapters["0"]}, case.batches, loss=True)["0"]
        for of in (loaded, case.loaded)
    )
    for m in expected.modules:
        same(found.modules[m].cross, expected.modules[m].cross, 1e-9)


def test_statistics_on_the_base_say_so_and_are_not_added_to_others(case):
    adapter = case.adapters["0"]
    on_base = measure_moments_on_base(case.loaded, {"0": adapter}, case.batches)["0"]
    assert on_base.provenance["activations"] == "base"
    point(case.loaded, place(adapter, case.loaded.device))
    facts = {k: v for k, v in on_base.provenance.items() if k != "activations"}
    with pytest.raises(InputError, match="activations"):
        add(on_base, measure_moments(case.loaded, adapter.linear, case.batches, provenance=facts))


def test_an_adapter_without_which_the_base_is_another_model_is_refused(tmp_path):
    adapter, loaded = attached(bert(1), tmp_path, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(
        InputError, match=r"mine changes more of the base than linear modules \(base_model.model.classifier"
    ):
        measure_moments_on_base(loaded, {"mine": adapter}, [])


def test_an_adapter_of_another_base_is_refused(case, tmp_path):
    other = read_adapter(lora(bert(1), tmp_path, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="not the one this adapter was trained on"):
        measure_moments_on_base(case.loaded, {"other": other}, case.batches)
