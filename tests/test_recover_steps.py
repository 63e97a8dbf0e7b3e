"""One step of the recovery against the plain loss on all logits: same gradients, none of the memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import BASE, attached, bert, gpt2, llama
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lorapack.core.adapter import Factors
from lorapack.data.batches import collate, cut
from lorapack.data.encode import IGNORED, Encoded
from lorapack.evaluate.scores import score
from lorapack.model import head
from lorapack.model.head import separable
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.recover import layers
from lorapack.recover.layers import recorded
from lorapack.recover.objective import Teacher, backward, measured

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def capped():
    """Gemma 2, whose logits go through a tanh; low, so that it bends them."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)).eval()


def scaled():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.125)).eval()


def multiplied():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=4.0)).eval()


def experts():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)).eval()


def opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(vocab_size=512, max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, **sizes)
    ).eval()


MODELS = {
    "llama": (lambda: llama(2), ["q_proj", "down_proj"], True),
    "gpt2": (gpt2, ["c_attn", "c_proj"], True),
    "gemma2": (capped, ["q_proj", "down_proj"], True),
    "granite": (scaled, ["q_proj", "down_proj"], True),
    "cohere": (multiplied, ["q_proj", "down_proj"], True),
    "mixtral": (experts, ["q_proj", "o_proj"], True),
    "llama, also the head": (lambda: llama(2), ["q_proj", "lm_head"], True),
    "opt, whose body is not called as a whole": (opt, ["q_proj", "fc1"], False),
}


def rows(count=5, seed=0):
    """Rows of unequal length with a prompt; one token of it in the middle is predicted too."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        length = 12 + 5 * n
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        labels = [IGNORED] * (length - 4 - n) + ids[-4 - n :]
        labels[3] = ids[3]
        made.append(Encoded(n, tuple(ids), tuple(labels)))
    return made


def times(adapter, factor):
    """The same adapter with every update multiplied; the random one alone changes next to nothing."""
    return replace(adapter, pool={n: Factors(f.A, f.B * factor) for n, f in adapter.pool.items()})


def pair(adapter, loaded):
    """Teacher and student, all in float64, so that what is compared is the mathematics."""
    loaded.base.double()
    if loaded.base.config.model_type == "mixtral":
        loaded.base.set_experts_implementation("eager")  # the grouped one knows no float64
    teacher, student = place(times(adapter, 20), loaded.device), place(times(adapter, 10), loaded.device)
    for placed, trained in ((teacher, False), (student, True)):
        for factors in placed.pairs.values():
            for p in factors:
                p.data = p.data.double()
                p.requires_grad_(trained)
    return Teacher(loaded, teacher), student


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    make, targets, apart = MODELS[request.param]
    adapter, loaded = attached(make(), tmp_path_factory.mktemp("model"), target_modules=targets)
    teacher, student = pair(adapter, loaded)
    batch = collate(list(enumerate(rows())), loaded.pad)
    return SimpleNamespace(adapter=adapter, loaded=loaded, teacher=teacher, student=student, batch=batch, apart=apart)


def plain(case, objective):
    """The sum of the loss with the model's own logits of all tokens, by autograd."""
    wanted = case.batch.labels[:, 1:] != IGNORED
    given = {"input_ids": case.batch.input_ids, "attention_mask": case.batch.attention_mask}
    point(case.loaded, case.teacher.placed)
    with torch.no_grad():
        target = case.loaded.base(**given).logits[:, :-1][wanted]
    point(case.loaded, case.student)
    seen = case.loaded.base(**given).logits[:, :-1][wanted]
    logs = [functional.log_softmax(found, -1) for found in (seen, target)]
    divergence = functional.kl_div(*logs, log_target=True, reduction="sum")
    task = functional.cross_entropy(seen, case.batch.labels[:, 1:][wanted], reduction="sum")
    return {"kl": divergence, "task": task, "both": (divergence + task) / 2}[objective]


def gradients(case):
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for pair in case.student.pairs.values() for p in pair
    ]
    for pair in case.student.pairs.values():
        for p in pair:
            p.grad = None
    return found


@pytest.mark.parametrize("objective", ["kl", "task", "both"])
def test_the_gradient_is_that_of_the_plain_loss(case, objective, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 512 * 3)  # three positions at a time
    gradients(case)
    loss = plain(case, objective)
    loss.backward()
    loss = float(loss.detach())
    wanted = gradients(case)
    total, count = backward(case.loaded, case.student, case.teacher, case.batch, objective)
    assert separable(case.loaded) == case.apart
    assert total == pytest.approx(loss, rel=1e-6)
    assert count == int((case.batch.labels[:, 1:] != IGNORED).sum())
    biggest = max(float(g.abs().max()) for g in wanted)
    for one, other in zip(gradients(case), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * biggest)
    mean = measured(case.loaded, case.student, case.teacher, [case.batch], objective)
    assert mean == pytest.approx(loss / count, rel=1e-6)


def test_a_batch_in_pieces_has_the_same_gradient(case):
    backward(case.loaded, case.student, case.teacher, case.batch, "kl")
    wanted = gradients(case)
    pieces = list(cut(case.batch, 40))
    assert len(pieces) > 1 and sum(len(p.places) for p in pieces) == len(case.batch.places)
    assert all(int(p.attention_mask.sum(0)[-1]) > 0 for p in pieces)  # no column of padding alone
    for piece in pieces:
        backward(case.loaded, case.student, case.teacher, piece, "kl")
    biggest = max(float(g.abs().max()) for g in wanted)
    for one, other in zip(gradients(case), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * biggest)


def test_figures_do_not_depend_on_the_size_of_a_chunk(case, monkeypatch):
    variants = {"original": case.teacher.placed, "other": case.student}
    whole = score(case.loaded, variants, "original", [case.batch], 5)
    monkeypatch.setattr(head, "CHUNK", 512 * 2)
    parts = score(case.loaded, variants, "original", [case.batch], 5)
    for name, found in whole.items():
        for field, values in vars(found).items():
            assert vars(parts[name])[field] == pytest.approx(values, rel=1e-6, abs=1e-9)


def test_no_tensor_of_the_step_holds_the_vocabulary_for_all_positions(case, monkeypatch):
    if not case.apart:
        pytest.skip("the model's own head makes them")
    monkeypatch.setattr(head, "CHUNK", 512 * 3)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), options=None):
            nonlocal largest
            found = function(*given, **(options or {}))
            for t in found if isinstance(found, tuple | list) else [found]:
                if isinstance(t, torch.Tensor) and t.shape[-1:] == (512,) and t.shape not in {(32, 512), (4, 512)}:
                    largest = max(largest, t.numel())
            return found

    with Watch():
        backward(case.loaded, case.student, case.teacher, case.batch, "kl")
    gradients(case)
    assert 0 < largest <= 512 * 3


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("objective", ["kl", "task", "both"])
def test_regression_is_by_squared_error_and_classification_as_usual(tmp_path, labels, objective):
    adapter, loaded = attached(bert(2, labels), tmp_path, target_modules=["query"], task_type="SEQ_CLS")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 512, (6, 8), generator=generator).tolist()
    label = (lambda n: n / 2) if labels == 1 else (lambda n: n % 3)
    batch = collate([(n, Encoded(n, tuple(ids), label(n), (0,) * 8)) for n, ids in enumerate(tokens)], loaded.pad)
    teacher, student = pair(adapter, loaded)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "token_type_ids": batch.token_types}
    point(loaded, teacher.placed)
    with torch.no_grad():
        target = loaded.base(**given).logits
    point(loaded, student)
    seen = loaded.base(**given).logits
    if labels == 1:
        divergence = ((seen - target) ** 2).sum()
        task = ((seen[:, 0] - batch.labels.float()) ** 2).sum()
    else:
        logs = [functional.log_softmax(found, -1) for found in (seen, target)]
        divergence = functional.kl_div(*logs, log_target=True, reduction="sum")
        task = functional.cross_entropy(seen, batch.labels, reduction="sum")
    loss = {"kl": divergence, "task": task, "both": (divergence + task) / 2}[objective]
    loss.backward()
    case = SimpleNamespace(student=student)
    wanted = gradients(case)
    for _ in range(2):  # the second time with what the teacher kept
        total, count = backward(loaded, student, teacher, batch, objective)
        assert count == 6 and total == pytest.approx(float(loss.detach()), rel=1e-6)
        biggest = max(float(g.abs().max()) for g in wanted)
        for one, other in zip(gradients(case), wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * biggest)


def test_with_a_base_in_bf16_the_factors_are_multiplied_in_bf16_and_trained_in_float32(tmp_path):
    adapter, loaded = attached(llama(2), tmp_path, target_modules=["q_proj", "down_proj"])
    half = load(adapter, str(tmp_path / "base"), device="cpu", dtype="bfloat16")
    batch = collate(list(enumerate(rows())), loaded.pad)
    found = []
    for model in (loaded, half):
        teacher, student = (
            Teacher(model, place(times(adapter, 20), model.device)),
            place(times(adapter, 10), model.device, True),
        )
        total, count = backward(model, student, teacher, batch, "task")
        seen = gradients(SimpleNamespace(student=student))
        assert all(g.dtype == torch.float32 for g in seen)
        found.append((total / count, torch.cat([g.flatten() for g in seen])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


def test_the_stories_model_is_taken_apart():
    from lorapack.read import read_adapter

    loaded = load(read_adapter(BASE.parent / "adapter"), str(BASE), device="cpu")
    assert separable(loaded)


def between(case, batch, placed):
    """The states after every layer at the positions that predict, by transformers' own `output_hidden_states`."""
    point(case.loaded, placed)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    wanted = batch.labels[:, 1:] != IGNORED
    found = []
    body = case.loaded.base.base_model
    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    handles = [m.register_forward_hook(lambda *seen: found.append(seen[2])) for m in layers]
    body(**given)
    for handle in handles:
        handle.remove()
    return [(h if isinstance(h, torch.Tensor) else h[0])[:, :-1][wanted] for h in found]


def test_the_gradient_of_the_states_between_the_layers_is_the_plain_one_too(case):
    gradients(case)
    teacher = Teacher(case.loaded, case.teacher.placed, layers=True)
    with torch.no_grad():
        theirs = between(case, case.batch, case.teacher.placed)
    ours = between(case, case.batch, case.student)
    assert len(ours) == 2
    off = sum(
        ((mine - their) ** 2).sum(-1).div((their**2).sum(-1)).sum() for mine, their in zip(ours, theirs, strict=True)
    )
    (plain(case, "kl") + 3 * off).backward()
    wanted = gradients(case)
    backward(case.loaded, case.student, case.teacher, case.batch, "kl")
    without = gradients(case)
    for pieces in (False, True):  # the second time with what the teacher kept
        for piece in cut(case.batch, 40) if pieces else [case.batch]:
            backward(case.loaded, case.student, teacher, piece, "kl", 3.0)
        biggest = max(float(g.abs().max()) for g in wanted)
        found = gradients(case)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6 * biggest) for a, b in zip(found, wanted, strict=True))
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(without, wanted, strict=True))


def test_at_most_so_many_layers_are_compared_evenly_spaced_and_the_last(case, monkeypatch):
    monkeypatch.setattr(layers, "MOST", 1)
    with recorded(case.loaded, case.batch, True) as found, torch.no_grad():
        point(case.loaded, case.student)
        case.loaded.base.base_model(input_ids=case.batch.input_ids, attention_mask=case.batch.attention_mask)
    with torch.no_grad():
        expected = between(case, case.batch, case.student)[-1]
    assert len(found) == 1 and torch.allclose(found[0], expected)
