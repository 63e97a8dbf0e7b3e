"""Moments against the inputs and derivatives of a plain run, materialised and added up token by token in float64."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import attached, bert, gpt2, llama
from torch.utils._python_dispatch import TorchDispatchMode

from lorapack.core.statistics import Moments, Statistics, add, from_tensors, output_norms, to_tensors
from lorapack.data.batches import batches, collate
from lorapack.data.encode import IGNORED, Encoded
from lorapack.errors import InputError
from lorapack.measure.moments import measure_inputs, measure_moments
from lorapack.measure.sums import HELD
from lorapack.model.head import separable
from lorapack.pack.share import input_basis
from lorapack.read.files import read_safetensors

LENGTHS = (9, 4, 1, 6, 12)
TYPES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "output.dense"]}


@pytest.fixture(scope="module", autouse=True, params=[0, 300], ids=["one by one", "held back"])
def held(request):
    """All of this on a CPU's way of adding up and on a GPU's, that holds modules back and adds them up together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HELD, "cpu", request.param)
        yield


def texts(lengths=LENGTHS, seed=0):
    """Rows of random tokens; of every other row the first third is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, length in enumerate(lengths):
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        prompt = length // 3 if n % 2 else 0
        found.append(Encoded(n, tuple(ids), (*[IGNORED] * prompt, *ids[prompt:])))
    return found


def sentences(lengths=LENGTHS):
    """The same with a label instead, and two sentences told apart."""
    return [
        replace(
            row,
            labels=row.row % 2,
            token_types=tuple(int(2 * i > len(row.input_ids)) for i in range(len(row.input_ids))),
        )
        for row in texts(lengths)
    ]


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def case(request, tmp_path_factory):
    """A model in float64 with an adapter, rows, and the rows in padded batches of two."""
    name = request.param
    kind = {"llama": {}, "gpt2": {"fan_in_fan_out": True}, "bert": {"task_type": "SEQ_CLS"}}[name]
    model = {"llama": lambda: llama(2), "gpt2": gpt2, "bert": lambda: bert(2)}[name]()
    adapter, loaded = attached(
        model, tmp_path_factory.mktemp(name), target_modules=TYPES[name], lora_dropout=0.3, **kind
    )
    loaded.model.double()  # so that the last bits of the activations are not what is compared
    rows = sentences() if name == "bert" else texts()
    pairs = [[(n, rows[n]) for n in places] for places in ((0, 1), (2, 3), (4,))]
    return SimpleNamespace(
        name=name, adapter=adapter, loaded=loaded, rows=rows, batches=[collate(pair, loaded.pad) for pair in pairs]
    )


@contextmanager
def watched(loaded, modules, see):
    """Call `see(module, x, h)` with every LoRA layer's input and its h = A x."""
    handles = []
    for m in modules:
        first = loaded.layers[m].lora_A["default"]
        handles.append(first.register_forward_hook(lambda _, given, h, m=m: see(m, given[0], h)))
    yield
    for handle in handles:
        handle.remove()


def run(loaded, batch):
    extra = {"token_type_ids": batch.token_types} if batch.token_types is not None else {}
    return loaded.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits


def inputs_seen(case, modules):
    """For every module its inputs, one (length, d_in) table a row, padding left out; no lorapack."""
    found = {m: [] for m in modules}
    for batch in case.batches:
        lengths = batch.attention_mask.sum(dim=1).tolist()

        def see(m, x, _, lengths=lengths):
            found[m] += [row[:length].clone() for row, length in zip(x, lengths, strict=True)]

        with torch.no_grad(), watched(case.loaded, modules, see):
            run(case.loaded, batch)
    return found


def derivatives_seen(case, modules):
    """For every module h and u = dloss/dh, one table a row; the loss is the plain sum of cross entropies."""
    found = {m: [] for m in modules}
    for batch in case.batches:
        hs = {}

        def see(m, _, h, hs=hs):
            hs[m] = h.requires_grad_() if not h.requires_grad else h
            h.retain_grad()

        with watched(case.loaded, modules, see):
            logits = run(case.loaded, batch)
        loss = torch.zeros((), dtype=torch.float64)
        for row, labels in enumerate(batch.labels):
            if labels.ndim == 0:
                loss = loss - logits[row].double().log_softmax(-1)[labels]
                continue
            for at in range(1, len(labels)):
                if labels[at] != -100:
                    loss = loss - logits[row, at - 1].double().log_softmax(-1)[labels[at]]
        if loss.requires_grad:
            loss.backward()
        for m, h in hs.items():
            u = h.grad if h.grad is not None else torch.zeros_like(h)
            for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
                found[m].append((h[row, :length].detach(), u[row, :length]))
    return found


def same(found, expected, rel=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= rel * expected.norm(), (found, expected)


def naive_norm(adapter, module, tables, average):
    """The mean of ||dW x||^2 over the tokens, or over the rows of their mean."""
    factors = adapter.factors(module)
    update = adapter.scale(module) * factors.B.double() @ factors.A.double()
    rows = [[float((update @ x.double()).square().sum()) for x in table] for table in tables]
    if average == "sample":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / sum(len(row) for row in rows)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_the_output_norm_is_the_mean_of_what_the_materialised_update_gives_on_every_token(case, average):
    found = measure_moments(case.loaded, case.adapter.linear, case.batches, average=average)
    norms = output_norms(case.adapter, found)
    seen = inputs_seen(case, case.adapter.linear)
    assert len(norms) == len(case.adapter.linear) > 2
    for m, norm in norms.items():
        assert norm == pytest.approx(naive_norm(case.adapter, m, seen[m], average), rel=1e-9)
    assert (found.tokens, found.samples) == (sum(LENGTHS), len(LENGTHS))
    assert found.weight == pytest.approx(sum(LENGTHS) if average == "token" else len(LENGTHS), rel=1e-12)


def test_in_float32_the_output_norm_is_right_up_to_float32(tmp_path):
    adapter, loaded = attached(llama(2), tmp_path, target_modules=TYPES["llama"])
    small = SimpleNamespace(loaded=loaded, batches=batches(texts(), 20, loaded.pad))
    seen = inputs_seen(small, adapter.linear)
    for m, norm in output_norms(adapter, measure_moments(loaded, adapter.linear, small.batches)).items():
        assert norm == pytest.approx(naive_norm(adapter, m, seen[m], "token"), rel=1e-6)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_backward_and_cross_moments_are_the_products_of_plain_derivatives(case, average):
    found = measure_moments(case.loaded, case.adapter.linear, case.batches, loss=True, average=average)
    seen = derivatives_seen(case, case.adapter.linear)
    for m, moments in found.modules.items():
        parts = {"forward": 0, "backward": 0, "cross": 0}
        for h, u in seen[m]:
            weight = 1 if average == "token" else 1 / len(h)
            for x, d in zip(h, u, strict=True):
                parts["forward"] += weight * torch.outer(x, x)
                parts["backward"] += weight * torch.outer(d, d)
                parts["cross"] += weight * torch.outer(d, x)
        same(moments.forward, parts["forward"])
        same(moments.backward, parts["backward"], 1e-6)  # lorapack's cross entropy is in float32
        same(moments.cross, parts["cross"], 1e-6)
        assert moments.backward.any()


@pytest.mark.parametrize("average", ["token", "sample"])
def test_the_fisher_sides_are_sums_over_rows_and_over_tokens(case, average):
    """With D = u h^T: sums of D^T A A^T D and D B^T B D^T, for each token alone and for each row's sum."""
    found = measure_moments(case.loaded, case.adapter.linear, case.batches, loss=True, average=average)
    seen = derivatives_seen(case, case.adapter.linear)
    for m, moments in found.modules.items():
        a, b = (t.double() for t in (case.adapter.factors(m).A, case.adapter.factors(m).B))
        sums = dict.fromkeys(("row_forward", "row_backward", "token_forward", "token_backward"), 0)
        for h, u in seen[m]:
            weight = 1 if average == "token" or len(h) == 1 else 1 / len(h)
            each = [torch.outer(d, x) for x, d in zip(h, u, strict=True)]
            for kind, products in (("token", each), ("row", [sum(each)])):
                for product in products:
                    sums[f"{kind}_forward"] += weight * product.T @ a @ a.T @ product
                    sums[f"{kind}_backward"] += weight * product @ b.T @ b @ product.T
        for part, value in sums.items():
            same(getattr(moments, part), value, 1e-5)
            assert value.any()


def test_measuring_with_the_loss_gives_the_same_forward_moments_and_leaves_no_gradient(case):
    plain = measure_moments(case.loaded, case.adapter.linear, case.batches)
    both = measure_moments(case.loaded, case.adapter.linear, case.batches, loss=True)
    for m in case.adapter.linear:
        same(both.modules[m].forward, plain.modules[m].forward, 1e-12)
        assert plain.modules[m].backward is None and plain.modules[m].cross is None
    assert all(p.grad is None and not p.requires_grad for p in case.loaded.model.parameters())
    assert all(not layer.lora_A["default"]._forward_hooks for layer in case.loaded.layers.values())


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """GPT-2 in float64 throughout (Llama's norms are in float32): nothing but the batching can differ."""
    folder = tmp_path_factory.mktemp("even")
    adapter, loaded = attached(gpt2(), folder, target_modules=TYPES["gpt2"], fan_in_fan_out=True)
    loaded.model.double()
    return adapter, loaded


@pytest.mark.parametrize("loss", [False, True])
def test_held_back_the_sums_start_few_kernels_however_many_modules_there_are(even, monkeypatch, loss):
    class Count(TorchDispatchMode):
        computed = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            views = any(returned.alias_info is not None for returned in function._schema.returns)
            self.computed += not views
            return function(*args, **(kwargs or {}))

    adapter, loaded = even
    modules = adapter.linear
    separable(loaded)  # which runs the model once to find out

    def computed(measured):
        with Count() as seen:
            measure_moments(loaded, measured, batches(texts((9,) * 8), 18, loaded.pad), loss=loss)
        return seen.computed

    of_a_module = {}
    for held in (0, 2**22):
        monkeypatch.setitem(HELD, "cpu", held)
        of_a_module[held] = (computed(modules) - computed(modules[:1])) / (len(modules) - 1)
    assert of_a_module[2**22] < of_a_module[0] / 5


def test_the_trace_of_the_cross_moment_is_the_losss_derivative_by_the_modules_scale(even):
    """What Taylor scores are made of; by a difference quotient, without any derivative."""
    adapter, loaded = even
    each = batches(texts(), 30, loaded.pad)
    found = measure_moments(loaded, adapter.linear, each, loss=True)

    def loss(module, factor):
        scaling = loaded.layers[module].scaling
        before = scaling["default"]
        scaling["default"] = before * factor
        with torch.no_grad():
            logits = torch.cat([run(loaded, b)[:, :-1].flatten(0, 1) for b in each])
        scaling["default"] = before
        labels = torch.cat([b.labels[:, 1:].flatten() for b in each])
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))

    for m in adapter.linear:
        slope = (loss(m, 1.001) - loss(m, 0.999)) / 0.002
        assert float(found.modules[m].cross.trace()) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.integers(2, 14), min_size=1, max_size=7),
    st.lists(st.integers(1, 60), min_size=2, max_size=2),
    st.integers(0, 500),
    st.sampled_from(["token", "sample"]),
)
def test_moments_depend_neither_on_the_batching_nor_on_the_padding(even, lengths, tokens, pad, average):
    adapter, loaded = even
    rows = texts(lengths)
    one, other = (
        measure_moments(loaded, adapter.linear, batches(rows, most, token), loss=True, average=average)
        for most, token in zip(tokens, (loaded.pad, pad), strict=True)
    )
    for m in adapter.linear:
        same(other.modules[m].forward, one.modules[m].forward, 1e-9)
        same(other.modules[m].backward, one.modules[m].backward, 1e-6)  # the cross entropy is in float32
        same(other.modules[m].cross, one.modules[m].cross, 1e-6)
    assert (one.tokens, one.samples) == (other.tokens, other.samples) == (sum(lengths), len(lengths))
    assert one.weight == pytest.approx(other.weight, rel=1e-12)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_two_shards_add_up_to_the_whole(even, average):
    adapter, loaded = even
    facts = {"adapter": "one", "base_model": "two"}
    rows = texts()

    def measured(part):
        each = batches(part, 30, loaded.pad)
        return measure_moments(loaded, adapter.linear, each, loss=True, average=average, provenance=facts)

    whole, total = measured(rows), add(measured(rows[:2]), measured(rows[2:]))
    for m in adapter.linear:
        for part in ("forward", "backward", "cross"):
            same(getattr(total.modules[m], part), getattr(whole.modules[m], part), 1e-6)
        same(total.mean(m), whole.mean(m))
    norms = output_norms(adapter, whole)
    assert output_norms(adapter, total) == pytest.approx(norms, rel=1e-9)
    assert (total.tokens, total.samples, total.provenance) == (whole.tokens, whole.samples, facts)
    assert total.weight == pytest.approx(whole.weight, rel=1e-12)


@pytest.mark.parametrize("what", ["modules", "average", "adapter", "base_model"])
def test_shards_of_different_things_are_not_added(what):
    first = Statistics({"q": Moments(torch.eye(2).double())}, 1.0, 1, 1, "token", {"adapter": "a", "base_model": "b"})
    second = {
        "modules": replace(first, modules={"v": first.modules["q"]}),
        "average": replace(first, average="sample"),
        "adapter": replace(first, provenance={"adapter": "x", "base_model": "b"}),
        "base_model": replace(first, provenance={"adapter": "a", "base_model": "x"}),
    }[what]
    with pytest.raises(InputError, match=what):
        add(first, second)


@pytest.mark.parametrize("loss", [True, False])
def test_the_file_gives_back_every_bit(even, tmp_path, loss):
    adapter, loaded = even
    facts = {"adapter": "a", "data": {"rows": [1, 2], "name": "ä"}, "loss": loss}
    each = batches(texts(), 30, loaded.pad)
    measured = measure_moments(loaded, adapter.linear, each, loss=loss, average="sample", provenance=facts)
    tensors, metadata = to_tensors(measured)
    save_file(tensors, tmp_path / "statistics.safetensors", metadata=metadata)
    found = from_tensors(*read_safetensors(tmp_path / "statistics.safetensors"))
    for fact in ("weight", "tokens", "samples", "average", "provenance"):
        assert getattr(found, fact) == getattr(measured, fact)
    assert found.modules.keys() == measured.modules.keys()
    for m, moments in measured.modules.items():
        for part in ("forward", "backward", "cross"):
            one, other = getattr(moments, part), getattr(found.modules[m], part)
            assert (one is None and other is None) or (torch.equal(one, other) and other.dtype == torch.float64)


def test_a_file_that_holds_no_statistics_is_refused_with_what_is_wrong():
    good = Statistics({"q.proj": Moments(torch.eye(2).double())}, 1.0, 1, 1, "token", {})
    tensors, metadata = to_tensors(good)
    header = metadata["lorapack_statistics"]
    bad = {
        "lorapack measure": (tensors, {}),
        "version 7": (tensors, {"lorapack_statistics": header.replace('"version": 1', '"version": 7')}),
        "no moment": (tensors | {"q.proj.sideways": torch.eye(2)}, metadata),
        "square": (tensors | {"q.proj.forward": torch.ones(2, 3)}, metadata),
        "finite": (tensors | {"q.proj.forward": torch.eye(2) * float("nan")}, metadata),
        "v has no forward": ({"v.cross": torch.eye(2)}, metadata),
    }
    for words, given_ in bad.items():
        with pytest.raises(InputError) as refused:
            from_tensors(*given_)
        assert all(word in str(refused.value) for word in words.split(" has ")), str(refused.value)


# The head.


@contextmanager
def calls(module):
    count = [0]

    def hook(*_):
        count[0] += 1

    handle = module.register_forward_hook(hook)
    yield count
    handle.remove()


def test_without_a_loss_the_head_is_never_computed(tmp_path):
    adapter, loaded = attached(llama(1), tmp_path, target_modules=["q_proj"])
    each = batches(texts(), 20, loaded.pad)
    assert separable(loaded)  # which is tried once a model, with the head
    with calls(loaded.base.lm_head) as count:
        measure_moments(loaded, adapter.linear, each)
        assert count == [0]
        measure_moments(loaded, adapter.linear, each, loss=True)
        assert count == [len(each)]


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    adapter, loaded = attached(llama(1), tmp_path_factory.mktemp("headed"), target_modules=["q_proj", "lm_head"])
    loaded.model.double()
    found = SimpleNamespace(adapter=adapter, loaded=loaded, batches=batches(texts(), 20, loaded.pad))
    assert "lm_head" in adapter.linear
    return found


def test_an_adapter_on_the_head_has_it_computed_and_measured(headed):
    with calls(headed.loaded.base.lm_head) as count:
        measured = measure_moments(headed.loaded, headed.adapter.linear, headed.batches)
    assert count == [len(headed.batches)]
    seen = inputs_seen(headed, headed.adapter.linear)
    for m, norm in output_norms(headed.adapter, measured).items():
        assert norm == pytest.approx(naive_norm(headed.adapter, m, seen[m], "token"), rel=1e-9)


def test_an_adapter_on_the_head_is_measured_with_the_loss_too(headed):
    measured = measure_moments(headed.loaded, headed.adapter.linear, headed.batches, loss=True)
    for m, tables in derivatives_seen(headed, headed.adapter.linear).items():
        same(measured.modules[m].forward, sum(h.T @ h for h, _ in tables))
        same(measured.modules[m].backward, sum(u.T @ u for _, u in tables), 1e-6)


@pytest.mark.parametrize("average", ["token", "sample"])
@pytest.mark.parametrize("length", [7, 4])
def test_a_pooler_that_sees_one_vector_a_row_has_each_counted_once(tmp_path, length, average):
    """Also where the rank is the row's length by chance (4)."""
    adapter, loaded = attached(bert(1), tmp_path, target_modules=["query", "pooler.dense"], task_type="SEQ_CLS")
    each = batches(sentences([length] * 3), 100, loaded.pad)
    seen = []
    with loaded.layers["bert.pooler.dense"].register_forward_pre_hook(lambda _, given: seen.append(given[0].double())):
        found = measure_moments(loaded, adapter.linear, each, average=average)
    h = torch.cat(seen) @ adapter.factors("bert.pooler.dense").A.double().T
    assert h.shape == (3, 4)
    same(found.modules["bert.pooler.dense"].forward, h.T @ h, 1e-6)


# The inputs of shared adapters.


@pytest.mark.parametrize("average", ["token", "sample"])
def test_inputs_in_a_groups_basis_are_q_c_qt_of_all_that_the_layers_see(case, average):
    group = [m for m in case.adapter.linear if m.endswith(TYPES[case.name][0])]
    assert len(group) == 2
    q = input_basis([case.adapter.factors(m) for m in group])
    found = measure_inputs(case.loaded, dict.fromkeys(group, q), case.batches, average)
    for m, tables in inputs_seen(case, group).items():
        if average == "sample":
            c = sum(x.T @ x / len(x) for x in tables) / len(tables)
        else:
            c = sum(x.T @ x for x in tables) / sum(len(x) for x in tables)
        same(found[m], q @ c @ q.T)


def test_a_module_that_the_data_never_reach_is_named(even):
    adapter, loaded = even
    with pytest.raises(InputError, match="c_attn was never reached"):
        measure_moments(loaded, adapter.linear[:1], [])
