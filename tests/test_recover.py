"""The brief fine-tune after packing: what it trains, what it may never make worse, and what it leaves alone."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from support import ADAPTER, BASE, HELDOUT, attached, bert
from transformers import LlamaForCausalLM

from lorapack.core.adapter import Adapter, Factors, digest, size
from lorapack.core.plan import Choice, Plan
from lorapack.data.batches import batches
from lorapack.data.columns import detect, examples
from lorapack.data.encode import Encoded, encode
from lorapack.data.rows import read_rows
from lorapack.evaluate.scores import score
from lorapack.model.load import load
from lorapack.model.point import place
from lorapack.pack import pack_adapter
from lorapack.pack.store import store_adapter
from lorapack.read import read_adapter
from lorapack.recover import Settings, recover
from lorapack.recover.objective import Teacher, measured
from lorapack.recover.recover import pace, surely_worse, usual_rate
from lorapack.recover.refit import refit
from lorapack.write import write_adapter

GROUP = [f"model.layers.{n}.mlp.up_proj" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def case():
    """The fixture adapter cut to rank 2, three layers sharing, one module dropped; rows of three parts."""
    original = read_adapter(ADAPTER)
    loaded = load(original, str(BASE), device="cpu", max_length=40)
    rows = read_rows(str(HELDOUT))[:44]
    encoded = encode(examples(rows, detect(rows, False, {})), loaded.reader.tokenizer, loaded.reader.longest)
    choices = [
        Choice(m, "keep", 2) if m not in GROUP else Choice(m, "share", group="shared.up") for m in original.linear
    ]
    choices[0] = Choice(original.linear[0], "drop")
    packed = pack_adapter(original, Plan("by hand", {}, tuple(choices), {"shared.up": 2}))
    return SimpleNamespace(
        original=original,
        packed=packed,
        loaded=loaded,
        training=encoded[:24],
        selection=encoded[24:34],
        fresh=encoded[34:],
    )


def run(case, packed=None, *, seed=0, **settings):
    how = {name: settings.pop(name) for name in list(settings) if name in Settings.__dataclass_fields__}
    how = Settings(**{"steps": 20, "batch_size": 4, "objective": "kl", **how})
    rows = (case.training, case.selection)
    return recover(case.loaded, case.original, packed or case.packed, *rows, how, seed=seed, **settings)


def divergence(case, adapter, rows):
    """Mean KL(original || adapter) a token, by the code that reports it (see test_evaluate.py)."""
    variants = {"original": place(case.original, case.loaded.device), "other": place(adapter, case.loaded.device)}
    found = score(case.loaded, variants, "original", batches(rows, 4096, case.loaded.pad), len(rows))["other"]
    return found.divergence.sum() / found.predictions.sum()


@pytest.fixture(scope="module")
def recovered(case):
    return run(case)


def test_it_brings_a_truncated_adapter_nearer_to_the_original_on_rows_it_has_not_seen(case, recovered):
    before, after = (divergence(case, adapter, case.fresh) for adapter in (case.packed, recovered[0]))
    assert after < 0.9 * before


def test_what_it_returns_is_the_best_state_it_saw(case, recovered):
    adapter, record = recovered
    curve = dict(record.curve)
    assert record.curve[0][0] == 0 and record.steps == record.curve[-1][0] <= 20
    assert curve[0] == pytest.approx(divergence(case, case.packed, case.selection), rel=1e-5)
    assert curve[record.best] == min(curve.values()) < curve[0]
    assert divergence(case, adapter, case.selection) == pytest.approx(curve[record.best], rel=1e-5)


def test_when_it_surely_gets_worse_from_there_it_stops_and_goes_back_to_the_best(case):
    few = SimpleNamespace(**{**vars(case), "training": case.training[:1]})  # to learn by heart
    adapter, record = run(few, steps=60, batch_size=1, learning_rate=3e-3, objective="task")
    curve = dict(record.curve)
    assert 0 < record.best < record.steps < 60
    assert curve[record.steps] > curve[record.best] == min(curve.values())
    placed = place(adapter, case.loaded.device)
    held = batches(case.selection, 4096, case.loaded.pad)
    now = measured(case.loaded, placed, Teacher(case.loaded, placed), held, "task")
    assert now == pytest.approx(curve[record.best], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 100, 3000])
def test_the_rate_rises_stays_for_half_of_the_steps_and_falls_to_nothing(steps):
    rates = np.array([pace(step, steps) for step in range(1, steps + 1)])
    assert (rates > 0).all() and rates.max() <= 1 and (steps < 10 or (rates == 1).mean() == pytest.approx(0.5, abs=0.1))
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 0).all()
    if steps >= 20:
        assert rates[-1] == pytest.approx(2.5 / steps) and rates[0] == pytest.approx(1 / max(3, steps // 10))
        settling = np.diff(rates[int(0.7 * steps) :])
        assert settling == pytest.approx(-2.5 / steps), "the last part is a line"


def test_what_other_rows_might_change_is_no_reason_to_go_back():
    """As among a classifier's rows, of which few make up most of the distance."""
    counts = torch.ones(64, dtype=torch.float64)
    best = torch.stack([torch.linspace(0, 1, 64).double() ** 8, counts])
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean()
    for higher, worse in ((0.1, False), (0.2, False), (0.3, True), (1.0, True), (-1.0, False)):
        assert surely_worse(best + torch.stack([noise + higher, 0 * counts]), best) == worse
    assert surely_worse(best[:, :1] + 1e-3, best[:, :1]), "of a single row nothing is known but that it is worse"
    assert not surely_worse(best, best)


@pytest.mark.parametrize("rate", [1e-4, 3e-2])
def test_the_selection_rows_never_get_worse_whatever_the_learning_rate(case, rate):
    adapter, _ = run(case, learning_rate=rate, steps=8)
    assert divergence(case, adapter, case.selection) <= divergence(case, case.packed, case.selection)


@pytest.mark.parametrize("objective", ["kl", "task", "both"])
def test_with_an_absurd_learning_rate_the_start_comes_back_bit_by_bit(case, objective):
    adapter, record = run(case, learning_rate=30.0, objective=objective, steps=10)
    assert record.best == 0 and len(record.curve) > 1
    assert all(value > record.curve[0][1] for _, value in record.curve[1:])
    assert digest(adapter) == digest(case.packed)


def test_the_layers_of_a_group_train_one_pair_and_write_one_pair(case, recovered, tmp_path):
    seen = []

    def watch(items, total):
        for batch in items:
            yield batch
            firsts = [case.loaded.layers[m].lora_A["default"].weight for m in GROUP]
            seconds = [case.loaded.layers[m].lora_B["default"].weight for m in GROUP]
            seen.append(all(w is firsts[0] for w in firsts) and all(w is seconds[0] for w in seconds))
            assert firsts[0].requires_grad and seconds[0].requires_grad

    adapter, _ = run(case, watch=watch)
    assert seen == [True] * 20
    assert digest(adapter) == digest(recovered[0])
    assert adapter.groups == {"shared.up": GROUP}
    assert not torch.equal(adapter.pool["shared.up"].A, case.packed.pool["shared.up"].A)
    write_adapter(adapter, tmp_path / "out")
    back = read_adapter(tmp_path / "out")
    assert back.groups == {"shared.up": GROUP}
    assert torch.equal(back.pool["shared.up"].A, adapter.pool["shared.up"].A)
    assert torch.equal(back.pool["shared.up"].B, adapter.pool["shared.up"].B)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), str(tmp_path / "out"))
    modules = dict(model.base_model.model.named_modules())
    for first in ("lora_A", "lora_B"):
        weights = [getattr(modules[m], first)["default"].weight for m in GROUP]
        assert all(w is weights[0] for w in weights)


def test_it_trains_every_factor_and_nothing_else(case, recovered):
    adapter = recovered[0]
    assert adapter.modules == case.packed.modules and adapter.config == case.packed.config
    for name, factors in case.packed.pool.items():
        assert not torch.equal(adapter.pool[name].A, factors.A) and not torch.equal(adapter.pool[name].B, factors.B)
        assert adapter.pool[name].A.shape == factors.A.shape


def test_neither_teacher_nor_start_nor_base_is_touched(case):
    adapters = [digest(a) for a in (case.original, case.packed)]
    base = {n: p.clone() for n, p in case.loaded.base.named_parameters() if "lora_" not in n}
    run(case, steps=4)
    assert [digest(a) for a in (case.original, case.packed)] == adapters
    for name, parameter in case.loaded.base.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name]) and parameter.grad is None


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(case, recovered):
    assert digest(run(case)[0]) == digest(recovered[0])
    assert digest(run(case, seed=1)[0]) != digest(recovered[0])


def test_the_original_is_at_no_distance_from_itself_and_stays_as_it_is(case):
    adapter, record = run(case, case.original, steps=2)
    assert record.curve[0] == (0, 0.0)
    assert record.best == 0 and digest(adapter) == digest(case.original)


def test_the_task_objective_is_the_loss_on_the_rows_own_labels(case):
    adapter, record = run(case, objective="task")
    with torch.no_grad():
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), str(ADAPTER)).eval()
        losses, tokens = 0.0, 0
        for row in case.selection:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
            losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.input_ids[1:]), reduction="sum"))
            tokens += len(row.input_ids) - 1
    _, whole = run(case, case.original, objective="task", steps=1)
    assert whole.curve[0][1] == pytest.approx(losses / tokens, rel=1e-5)
    assert dict(record.curve)[record.best] < record.curve[0][1]
    assert digest(adapter) != digest(case.packed)


def in_bf16(adapter: Adapter) -> Adapter:
    return replace(adapter, pool={n: Factors(f.A.bfloat16(), f.B.bfloat16()) for n, f in adapter.pool.items()})


def test_factors_in_bf16_stay_in_bf16_and_do_not_get_worse_by_rounding(case):
    packed = in_bf16(case.packed)
    adapter, record = run(case, packed)
    assert {t.dtype for f in adapter.pool.values() for t in (f.A, f.B)} == {torch.bfloat16}
    assert record.best > 0
    kept = divergence(case, adapter, case.selection)
    assert kept < divergence(case, packed, case.selection)
    assert kept == pytest.approx(dict(record.curve)[record.best], rel=1e-6)  # what was judged is what is returned


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_factors_in_few_bits_stay_in_few_bits_and_are_judged_as_rounded(case, store):
    packed = store_adapter(case.packed, store)
    adapter, record = run(case, packed)
    assert {f.codes.store for f in adapter.pool.values()} == {store} and size(adapter) == size(packed)
    assert record.best > 0
    kept = divergence(case, adapter, case.selection)
    assert kept < divergence(case, packed, case.selection)
    assert kept == pytest.approx(dict(record.curve)[record.best], rel=1e-6)  # what was judged is what is returned
    fitted, found = refit(case.loaded, case.original, packed, case.training, case.selection)
    assert found.kept != "before" and size(fitted) == size(packed)
    assert divergence(case, fitted, case.selection) == pytest.approx(getattr(found, found.kept), rel=1e-6)


def scaled(adapter, a, b):
    """Every A times one number, every B times another."""
    pool = {n: replace(f, A=f.A * a, B=f.B * b) for n, f in adapter.pool.items()}
    return replace(adapter, pool=pool)


def rate_of(adapter):
    return usual_rate(place(adapter, torch.device("cpu"), trainable=True))


def test_the_usual_rate_follows_the_factors_elements_and_no_scale_between_a_and_b(case):
    at = 0.04 / (20 * rate_of(scaled(case.packed, 0.2, 0.2)))  # away from both bounds, elements of a size of 0.04
    middle = scaled(case.packed, 0.2 * at, 0.2 * at)
    assert rate_of(middle) == pytest.approx(0.002, rel=0.03)
    assert rate_of(scaled(middle, 2, 2)) == pytest.approx(0.004, rel=0.03)
    assert rate_of(scaled(middle, 64, 1 / 64)) == rate_of(middle)
    assert rate_of(scaled(middle, 1e-6, 1)) == 1e-3 and rate_of(scaled(middle, 1e6, 1)) == 1e-2
    assert rate_of(scaled(middle, 0, 1)) == 1e-3


def test_a_recovery_without_a_rate_is_one_with_the_usual_rate(case):
    adapter, record = run(case, steps=4)
    again, same = run(case, steps=4, learning_rate=rate_of(case.packed))
    assert record == same and digest(adapter) == digest(again)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier with a head of its own, one module cut to rank 1, and rows whose labels are random."""
    folder = tmp_path_factory.mktemp("classifier")
    original, _ = attached(bert(2), folder, target_modules=["query", "value"], task_type="SEQ_CLS", lora_alpha=64)
    generator = torch.Generator().manual_seed(0)
    saved = {n: torch.randn(t.shape, generator=generator) for n, t in original.carried.items()}
    original = replace(original, carried=saved)
    loaded = load(original, str(folder / "base"), device="cpu")
    tokens = torch.randint(3, 512, (40, 8), generator=generator).tolist()
    rows = [Encoded(n, tuple(ids), n % 2, (0,) * 8) for n, ids in enumerate(tokens)]
    cut = Plan("by hand", {}, tuple(Choice(m, "keep", 1) for m in original.linear))
    packed = pack_adapter(original, cut)
    return SimpleNamespace(original=original, packed=packed, loaded=loaded, training=rows[:32], selection=rows[32:])


def test_a_classifiers_saved_head_is_the_teachers_and_stays(classifier):
    loaded, saved = classifier.loaded, classifier.original.carried
    head = {n: p.clone() for n, p in loaded.model.named_parameters() if "classifier" in n}
    adapter, record = run(classifier, steps=12, batch_size=8, objective="both")
    assert dict(record.curve)[record.best] < record.curve[0][1]
    assert head and all(torch.equal(p, head[n]) for n, p in loaded.model.named_parameters() if n in head)
    assert adapter.carried.keys() == saved.keys()
    assert all(torch.equal(adapter.carried[n], t) for n, t in saved.items())
    assert all(math.isfinite(value) for _, value in record.curve)


@pytest.mark.parametrize(
    "model, asked, rows", [("case", None, 8), ("classifier", None, 32), ("classifier", 4, 4), ("case", 4, 4)]
)
def test_a_step_on_a_classifier_is_of_more_rows_unless_their_number_is_given(request, model, asked, rows):
    seen = []

    def watch(items, total):
        for item in items:
            seen.append(len(item.input_ids))
            yield item

    _, record = run(request.getfixturevalue(model), steps=1, batch_size=asked, watch=watch)
    assert seen == [rows] and record.batch_size == rows
