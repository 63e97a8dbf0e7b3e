"""Around the steps of a recovery: stop and go on, rank masks, checkpointing, the refit, the command."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from support import ADAPTER, BASE, CALIBRATION, HELDOUT, attached, refused
from support import run as command
from transformers import LlamaConfig, LlamaForCausalLM

from lorapack.core.adapter import Factors, digest
from lorapack.core.plan import Choice, Plan
from lorapack.core.report import from_json
from lorapack.data.batches import batches, collate
from lorapack.data.columns import detect, examples
from lorapack.data.encode import encode
from lorapack.data.rows import read_rows
from lorapack.errors import InputError
from lorapack.model.load import NAME, load
from lorapack.model.point import place, point
from lorapack.pack import pack_adapter
from lorapack.read import read_adapter
from lorapack.read.files import read_safetensors
from lorapack.recover import Settings, recover
from lorapack.recover.mask import Masks
from lorapack.recover.objective import Teacher, backward, measured
from lorapack.recover.recover import _checkpointing, _optimizer
from lorapack.recover.refit import fitted, refit
from lorapack.recovery import recover_adapter
from lorapack.write import write_adapter

GROUP = [f"model.layers.{n}.mlp.up_proj" for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def case():
    original = read_adapter(ADAPTER)
    loaded = load(original, str(BASE), device="cpu", max_length=24)
    rows = read_rows(str(HELDOUT))[:26]
    encoded = encode(examples(rows, detect(rows, False, {})), loaded.reader.tokenizer, loaded.reader.longest)
    choices = [
        Choice(m, "keep", 2) if m not in GROUP else Choice(m, "share", group="shared.up") for m in original.linear
    ]
    packed = pack_adapter(original, Plan("by hand", {}, tuple(choices), {"shared.up": 2}))
    return SimpleNamespace(
        original=original, packed=packed, loaded=loaded, training=encoded[:16], selection=encoded[16:20], rows=encoded
    )


def run(case, how=None, **given):
    how = Settings(**{"steps": 12, "batch_size": 4, "objective": "kl", **(how or {})})
    return recover(case.loaded, case.original, case.packed, case.training, case.selection, how, **given)


def after(steps):
    """A `stop` that is asked for in that step."""

    @contextmanager
    def stop():
        stop.left = steps

        def asked():
            return stop.left <= 0

        yield asked

    def watch(items, total):
        for item in items:
            stop.left -= 1
            yield item

    return {"stop": stop, "watch": watch}


@pytest.mark.parametrize("how", [{}, {"rank_dropout": 0.5}, {"rank_dropout": 0.5, "rank_mask": "step"}])
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path, how):
    state = tmp_path / "state"
    whole, record = run(case, how)
    _, first = run(case, how, state=state, **after(6))
    assert first.stopped and first.steps == 6 and state.exists()
    again, second = run(case, how, state=state, resume=True)
    assert [s for s, _ in second.curve] == [s for s, _ in record.curve]
    assert [v for _, v in second.curve] == pytest.approx([v for _, v in record.curve], rel=1e-6)
    assert second.best == record.best and not second.stopped
    for name, factors in whole.pool.items():
        assert torch.allclose(again.pool[name].A, factors.A, rtol=1e-5, atol=1e-6)
        assert torch.allclose(again.pool[name].B, factors.B, rtol=1e-5, atol=1e-6)
    assert not state.exists()  # it came to its end


def test_a_run_that_is_stopped_keeps_the_best_so_far(case):
    adapter, record = run(case, **after(5))
    assert record.stopped and record.steps == 5 and record.curve[-1][0] == 5
    held = batches(case.selection, 4096, case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    now = measured(case.loaded, place(adapter, case.loaded.device), teacher, held, "kl")
    assert now == pytest.approx(min(v for _, v in record.curve), rel=1e-5)
    assert now < record.curve[0][1]


def test_shared_factors_stay_one_through_accumulation_stopping_resuming_and_saving(case, tmp_path):
    state, out = tmp_path / "state", tmp_path / "out"
    run(case, {"steps": 20}, state=state, batch_tokens=30, **after(10))  # a row at a time, whose gradients add up
    adapter, record = run(case, {"steps": 20}, state=state, batch_tokens=30, resume=True)
    assert record.steps == 20 and record.best > 10 and adapter.groups == {"shared.up": GROUP}
    assert not torch.equal(adapter.pool["shared.up"].A, case.packed.pool["shared.up"].A)
    write_adapter(adapter, out)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), str(out), is_trainable=True)
    modules = dict(model.base_model.model.named_modules())
    for first, wanted in (("lora_A", adapter.pool["shared.up"].A), ("lora_B", adapter.pool["shared.up"].B)):
        assert all(torch.equal(getattr(modules[m], first)["default"].weight, wanted) for m in GROUP)
    whole, _ = run(case, {"steps": 20})
    for name, factors in whole.pool.items():
        assert torch.allclose(adapter.pool[name].B, factors.B, rtol=1e-3, atol=1e-4)  # as with the rows at once


@pytest.mark.parametrize("change", [{"seed": 1}, {"how": {"learning_rate": 1e-2}}])
def test_the_state_of_another_recovery_is_refused_and_says_where_it_differs(case, tmp_path, change):
    run(case, state=tmp_path / "state", **after(2))
    with pytest.raises(InputError, match=r"another recovery: it differs in (seed|learning_rate)"):
        run(case, state=tmp_path / "state", resume=True, **change)
    (tmp_path / "state").write_bytes(b"no such file")
    with pytest.raises(InputError, match="state"):
        run(case, state=tmp_path / "state", resume=True)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("now.0", lambda t: t[:-1]),
        ("kept.1", lambda t: t.long()),
        ("judged", lambda t: t[:, 1:]),
        ("moments.0.exp_avg", lambda t: t.T),
        ("moments.99.step", lambda t: t),
        ("moments.0.exp_avg_sq", lambda t: None),
        ("moments.0.step", lambda t: t[None]),
    ],
)
def test_a_state_whose_tensors_do_not_fit_is_refused_by_name(case, tmp_path, name, broken):
    state = tmp_path / "state"
    run(case, state=state, **after(2))
    tensors, metadata = read_safetensors(state)
    changed = broken(tensors.get(name, torch.zeros(1)))
    kept = {n: t for n, t in tensors.items() if n != name}
    save_file(kept if changed is None else kept | {name: changed.contiguous()}, state, metadata)
    with pytest.raises(InputError, match=re.escape(name)):
        run(case, state=state, resume=True)


def test_shared_factors_learn_at_the_rate_over_the_root_of_their_layers(case):
    student = place(case.packed, case.loaded.device, trainable=True)
    rates = {id(g["params"][0]): g["share"] for g in _optimizer(student, 1.0).param_groups}
    assert rates[id(student.pairs["shared.up"][0])] == pytest.approx(1 / 2)
    assert sorted(set(rates.values())) == pytest.approx([0.5, 1.0])


# Rank masks.


def seen_by(case, masks, batch, module):
    """What B gets in the masked student, and A's output."""
    student = place(case.original, case.loaded.device, trainable=True)
    point(case.loaded, student)
    found = []
    layer = case.loaded.layers[module]
    with masks.on(case.loaded, student), torch.no_grad():
        handle = layer.lora_B[NAME].register_forward_pre_hook(lambda _, given: found.append(given[0].clone()))
        case.loaded.base(batch.input_ids)
        handle.remove()
        handle = layer.lora_B[NAME].register_forward_pre_hook(lambda _, given: found.append(given[0].clone()))
    case.loaded.base(batch.input_ids)
    handle.remove()
    return found


@pytest.mark.parametrize("kind", ["token", "step"])
def test_a_mask_lets_ranks_through_scaled_up_or_not_at_all(case, kind):
    batch = collate(list(enumerate(case.rows[:4])), case.loaded.pad)
    module = "model.layers.0.self_attn.q_proj"  # the first, whose inputs no mask has changed
    masked, plain = seen_by(case, Masks(0.25, kind, 0), batch, module)
    through = (masked / plain).reshape(-1, plain.shape[-1])
    assert torch.allclose(through[through != 0], torch.tensor(4 / 3), rtol=1e-4)
    off = through == 0
    assert bool((off == off[0]).all()) == (kind == "step")
    if kind == "token":
        assert float((through == 0).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_masks_touch_neither_the_teacher_nor_what_comes_after(case):
    held = batches(case.selection, 4096, case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    student = place(case.packed, case.loaded.device, trainable=True)
    plain = measured(case.loaded, student, teacher, held, "kl")
    masks = Masks(0.5, "token", 0)
    with masks.on(case.loaded, student):
        fresh = Teacher(case.loaded, teacher.placed)
        for batch in held:
            assert torch.equal(fresh.values(batch), teacher.values(batch))
        one, two = (measured(case.loaded, student, teacher, masks.fixed(held), "kl") for _ in range(2))
    assert one == two != pytest.approx(plain, rel=1e-3)  # the checks see the same masks each time
    assert measured(case.loaded, student, teacher, held, "kl") == plain


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(case, p):
    batch = collate(list(enumerate(case.rows[:4])), case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    found = []
    for wanted in (False, True):
        student = place(case.packed, case.loaded.device, trainable=True)
        masks = Masks(p, "token", 0)
        runs = []
        layer = case.loaded.base.model.layers[0].self_attn
        handle = layer.register_forward_hook(lambda *_, runs=runs: runs.append(torch.is_grad_enabled()))
        with masks.on(case.loaded, student) if p else nullcontext(), _checkpointing(case.loaded, wanted):
            teacher.values(batch)
            runs.clear()
            backward(case.loaded, student, teacher, batch, "kl")
        handle.remove()
        assert len(runs) == (2 if wanted else 1)
        found.append([t.grad for pair in student.pairs.values() for t in pair])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))
    assert not case.loaded.base.training and not any(m.training for m in case.loaded.base.modules())


def test_training_with_masks_makes_the_whole_adapter_lose_less_when_ranks_are_off(case):
    whole = SimpleNamespace(**{**vars(case), "packed": case.original})
    adapter, record = run(whole, {"rank_dropout": 0.5, "steps": 18})
    curve = dict(record.curve)
    assert record.rank_dropout == 0.5 and record.masked and curve[record.best] < 0.9 * curve[0]
    assert digest(adapter) != digest(case.original)


@pytest.mark.parametrize("objective", ["kl", "task", "both"])
def test_with_masks_the_whole_adapter_does_not_get_worse_on_the_selection_rows(case, objective):
    held = batches(case.selection, 4096, case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    adapter, record = run(case, {"rank_dropout": 0.9, "objective": objective, "learning_rate": 3e-2})
    assert not record.masked
    before, now = (
        measured(case.loaded, place(a, case.loaded.device), teacher, held, objective) for a in (case.packed, adapter)
    )
    assert record.curve[0][1] == pytest.approx(before, rel=1e-5)
    assert now == pytest.approx(dict(record.curve)[record.best], rel=1e-5) and now <= before
    itself = SimpleNamespace(**{**vars(case), "packed": case.original})
    if objective == "task":  # without a teacher: what the rows say
        adapter, record = run(itself, {"rank_dropout": 0.9, "objective": "task", "learning_rate": 3e-2})
        before, now = (
            measured(case.loaded, place(a, case.loaded.device), teacher, held, "task") for a in (case.original, adapter)
        )
        assert not record.masked and now <= before


# The refit.


def noisy(adapter, size):
    generator = torch.Generator().manual_seed(0)

    def off(b):
        return b + size * b.std() * torch.randn(b.shape, generator=generator)

    return replace(adapter, pool={n: Factors(f.A, off(f.B)) for n, f in adapter.pool.items()})


@pytest.mark.parametrize("whole", [False, True])
def test_a_refit_brings_back_what_least_squares_can_bring_back(case, whole):
    packed = noisy(case.original, 1.0)
    held = batches(case.selection, 4096, case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    made = fitted(case.loaded, case.original, packed, case.training, whole)
    before, now = (measured(case.loaded, place(a, case.loaded.device), teacher, held, "kl") for a in (packed, made))
    assert now < 0.02 * before
    assert all(torch.equal(made.pool[n].A, f.A) for n, f in case.original.pool.items())


def test_a_refit_fits_the_scale_of_every_layer_that_shares(case):
    scales = {m: p if m not in GROUP else replace(p, scale=3 * p.scale) for m, p in case.packed.modules.items()}
    made = fitted(case.loaded, case.original, replace(case.packed, modules=scales), case.training, False)
    assert made.groups == case.packed.groups
    assert torch.equal(made.pool["shared.up"].B, case.packed.pool["shared.up"].B)
    for module in GROUP[:2]:  # the closed form had found nearly the best scale
        assert made.scale(module) == pytest.approx(case.packed.scale(module), rel=0.5)


def test_a_refit_that_does_not_help_is_not_kept(case):
    made, record = refit(case.loaded, case.original, case.original, case.training, case.selection)
    assert record.kept == "before" and digest(made) == digest(case.original)
    made, record = refit(case.loaded, case.original, case.packed, case.training, case.selection)
    values = {"before": record.before, "own": record.own, "whole": record.whole}
    assert values[record.kept] == min(values.values())
    held = batches(case.selection, 4096, case.loaded.pad)
    teacher = Teacher(case.loaded, place(case.original, case.loaded.device))
    now = measured(case.loaded, place(made, case.loaded.device), teacher, held, "kl")
    assert now == pytest.approx(min(values.values()), rel=1e-5)


# The command.

DATA = ("--base", BASE, "--data", CALIBRATION, "--max-length", 24)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "smaller"
    given = ("--method", "rank", "--budget", "12.5%", "--recover-steps", 0, "--no-refit")
    done = command("compress", ADAPTER, *DATA, *given, "-o", out)
    assert done.returncode == 0, done.stderr
    return out


def test_recover_improves_a_smaller_adapter_and_reports_it(smaller, tmp_path):
    given = ("--teacher", ADAPTER, "--steps", 6, "--objective", "both")
    done = command("recover", smaller, *DATA, *given, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    before, now = (from_json((p / "report.json").read_text()) for p in (smaller, tmp_path / "out"))
    assert now.quality.retained.value > before.quality.retained.value
    assert now.used_rows() >= before.used_rows() and now.after == before.after and now.before == before.before
    assert not now.used_rows() & set(now.data["parts"]["evaluation"]["fingerprints"])
    assert len(now.recovery["curve"]) == 7 and now.recovery["objective"] == "both"
    assert now.adapter["compressed"] == digest(read_adapter(tmp_path / "out"))


def test_recover_refuses_what_cannot_be_meant(smaller, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "--teacher is needed" in refused(command("recover", smaller, *DATA, *out))
    teacher = ("--teacher", ADAPTER)
    assert "evaluation rows were used" in refused(command("recover", smaller, *DATA, *teacher, "--seed", 1, *out))
    assert "--resume needs --state" in refused(command("recover", smaller, *DATA, *teacher, "--resume", *out))
    assert "not a probability" in refused(command("recover", smaller, *DATA, *teacher, "--rank-dropout", 1, *out))
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_a_module_or_with_other_saved_modules_is_refused(case):
    modules = dict(case.original.modules)
    gone = modules.pop(case.original.linear[0])
    fewer = case.original.with_pool({n: f for n, f in case.original.pool.items() if n != gone.factors}, modules)
    other = replace(case.original, carried={"head": torch.ones(1)})
    for teacher in (fewer, other):
        with pytest.raises(InputError, match="do not belong together"):
            recover_adapter(case.original, str(CALIBRATION), teacher=teacher)


def test_a_tokenizer_that_does_not_fit_the_base_is_refused(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    adapter, _ = attached(model, tmp_path, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"the base model knows 100: they do not belong together"):
        recover_adapter(adapter, str(CALIBRATION), str(tmp_path / "base"), teacher=adapter)


def test_a_loss_that_is_no_number_ends_in_one_line_and_nothing_is_written(smaller, tmp_path):
    given = ("--teacher", ADAPTER, "--steps", 12, "--learning-rate", 1e30, "-o", tmp_path / "out")
    said = refused(command("recover", smaller, *DATA, *given))
    assert "recovery: the loss is nan at step" in said and "lower --learning-rate" in said
    assert not list(tmp_path.iterdir())


def test_rows_that_are_too_long_are_counted_in_the_report(case, smaller):
    data = from_json((smaller / "report.json").read_text()).data
    assert data["longest"] == 24 and data["rows_cut"] > 100 and data["tokens_cut"] > 100 * data["rows_cut"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_and_writes_the_best_so_far(smaller, tmp_path, sent):
    out, state = tmp_path / "out", tmp_path / "state"
    given = ("--teacher", ADAPTER, "--learning-rate", 1e-4, "--state", state, "--json")
    given += ("--steps", 120, "--max-length", 64)
    running = subprocess.Popen(
        [sys.executable, "-m", "lorapack", "recover", *map(str, (smaller, *DATA, *given, "-o", out))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not state.exists() and running.poll() is None:  # written with the first look, after 20 steps
        time.sleep(0.02)
    running.send_signal(sent)
    found, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "stopping after this step" in said
    report = json.loads(found)
    assert report["recovery"]["stopped"] and 0 < report["recovery"]["steps"] < 120
    assert digest(read_adapter(out)) == report["adapter"]["compressed"] and state.exists()
