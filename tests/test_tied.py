"""Layers that share A and B and have a core or an output vector of their own: Tied-LoRA, VeRA and between."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import BASE, bert, gpt2, llama, lora, refused, run

from lorapack import Adapter, Factors, InputError, Pointer, pack_adapter, read_adapter, write_adapter
from lorapack.core.adapter import digest, size
from lorapack.core.plan import from_json, parameters, to_json
from lorapack.core.seeded import seeded
from lorapack.describe import describe_adapter
from lorapack.job import plan_adapter
from lorapack.model.load import load
from lorapack.model.point import place, point, taken
from lorapack.pack.fit import fit, fit_frozen
from lorapack.pack.pack import module_bases
from lorapack.pack.share import Member, input_basis, share
from lorapack.pack.store import store_adapter

IDS = torch.arange(2, 42).reshape(2, 20)
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = [("tied", "scale"), ("tied", "diagonal"), ("tied", "core"), ("tied", "tied"), ("vera", None)]
seeds = st.integers(0, 10**6)


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def adapter_of(seed=0, layers=3, d_out=6, d_in=7, rank=2, other=(5, 6), dtype=torch.float64):
    """Two module types of different shapes, each layer with its own scale."""
    randn = drawing(seed)
    pool = {}
    for n in range(layers):
        for kind, (o, i) in (("q", (d_out, d_in)), ("up", other)):
            pool[f"layers.{n}.{kind}"] = Factors(randn(rank, i).to(dtype), randn(o, rank).to(dtype))
    return Adapter({"peft_type": "LORA"}, pool, {m: Pointer(m, 0.5 + n) for n, m in enumerate(pool)}, {})


def rewritten(adapter, seed=1):
    """The same updates from other factors: A -> R A, B -> B R^-1."""
    randn = drawing(seed)
    pool = {}
    for name, f in adapter.pool.items():
        r = torch.linalg.qr(randn(f.rank, f.rank)).Q * torch.linspace(0.5, 2, f.rank)
        pool[name] = Factors(r @ f.A, f.B @ r.inverse())
    return replace(adapter, pool=pool)


def update(adapter, module):
    """scale * diag(output) B K A, written out."""
    pointer = adapter.modules[module]
    factors = adapter.pool[pointer.factors]
    a, b = factors.A.double(), factors.B.double()
    if pointer.core is not None:
        a = (torch.diag(pointer.core.double()) if pointer.core.ndim == 1 else pointer.core.double()) @ a
    if pointer.output is not None:
        b = torch.diag(pointer.output.double()) @ b
    return pointer.scale * b @ a


def planned(adapter, method, sharing, **settings):
    return plan_adapter(adapter, None, method, **({"sharing": sharing} if sharing else {}), **settings)


# The seeded factors.


def entry(seed, matrix, row, column):
    """The recipe of docs/format.md in whole numbers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    z = seed
    for step in (matrix, row, column):
        z = mix((z + (step + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return (2 * (z >> 56) - 255) / 256


def test_seeded_factors_are_these_numbers_for_ever():
    a, b = seeded(42, 2, (2, 3))
    assert (a * 256).tolist() == [[-57.0, 215.0, -213.0], [-239.0, 139.0, 33.0]]
    assert (b * 256).tolist() == [[123.0, 141.0], [-115.0, 25.0]]
    a, b = seeded(2**63 - 1, 3, (4, 5))
    assert a.tolist() == [[entry(2**63 - 1, 0, i, j) for j in range(5)] for i in range(3)]
    assert b.tolist() == [[entry(2**63 - 1, 1, i, o) for i in range(3)] for o in range(4)]


@given(st.integers(0, 2**63 - 1), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_a_smaller_pair_of_the_same_seed_is_a_slice_of_the_larger(seed, rank, d_out, d_in):
    a, b = seeded(seed, rank, (d_out, d_in))
    whole_a, whole_b = seeded(seed, 5, (9, 9))
    assert torch.equal(a, whole_a[:rank, :d_in]) and torch.equal(b, whole_b[:d_out, :rank])


def test_seeded_factors_are_exact_in_half_precision_and_look_random():
    a, b = seeded(1, 200, (300, 400))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(a.to(dtype).float(), a)
    for table in (a, b):
        assert abs(table.mean()) < 0.01 and table.std() == pytest.approx(3**-0.5, rel=0.01)
    assert torch.linalg.matrix_rank(a) == 200
    unlike = seeded(2, 200, (300, 400))[0]
    assert abs((a * unlike).mean()) < 0.01 and abs((a[:, :300] * b.T).mean()) < 0.01


# The fit.


def members_of(seed, count, d_out, d_in, rank, same):
    randn = drawing(seed)
    factors = [Factors(randn(rank, d_in), randn(d_out, rank)) for _ in range(count)]
    scales = [float(s) for s in randn(count)]
    common = randn(30, d_in) @ randn(d_in, d_in)
    xs = [common if same else randn(30, d_in) @ randn(d_in, d_in) for _ in range(count)]
    q = input_basis(factors)
    return [Member(f, s, q @ x.T @ x @ q.T / 30) for f, s, x in zip(factors, scales, xs, strict=True)], q, xs


def costs(members, xs, fitted):
    """E||(W_l - fitted W_l) x||^2 a layer, token by token."""
    adapter = Adapter(
        {}, {"g": fitted.factors}, {f"layers.{n}": fitted.pointer("g", n) for n in range(len(members))}, {}
    )
    found = []
    for n, (m, x) in enumerate(zip(members, xs, strict=True)):
        rest = m.scale * m.factors.B @ m.factors.A - update(adapter, f"layers.{n}")
        found.append(float((rest @ x.T).square().sum()) / len(x))
    return found


@pytest.mark.parametrize("way", ["diagonal", "core", "tied"])
@settings(deadline=None, max_examples=25)
@given(
    seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans()
)
def test_a_fit_costs_what_it_says_never_goes_up_and_is_no_worse_than_a_scale(
    way, seed, count, d_out, d_in, own, rank, same
):
    members, q, xs = members_of(seed, count, d_out, d_in, own, same)
    rank = min(rank, d_out, d_in)
    fitted = fit(members, q, rank, way)
    whole = sum(
        float((m.scale * m.factors.B @ m.factors.A @ x.T).square().sum()) / len(x)
        for m, x in zip(members, xs, strict=True)
    )
    assert fitted.errors[-1] == pytest.approx(sum(costs(members, xs, fitted)), rel=1e-5, abs=1e-7 * whole)
    assert all(after <= before + 1e-8 * whole for before, after in zip(fitted.errors, fitted.errors[1:], strict=False))
    assert fitted.errors[-1] <= share(members, q, rank).errors[-1] + 1e-8 * whole


@pytest.mark.parametrize("way", ["diagonal", "core", "tied"])
def test_no_small_step_away_from_a_fit_does_much_better(way):
    """A local minimum: L-BFGS on everything at once, from the fit, finds next to nothing."""
    members, q, xs = members_of(3, 3, 5, 6, 3, same=False)
    fitted = fit(members, q, 2, way)
    parts = [fitted.factors.B, fitted.factors.A, torch.stack(fitted.cores)]
    parts += [torch.stack(fitted.outputs)] if fitted.outputs else []
    unknowns = [t.clone().requires_grad_() for t in parts]
    optimizer = torch.optim.LBFGS(unknowns, max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        b, a, cores, *outputs = unknowns
        total = 0
        for n, (m, x) in enumerate(zip(members, xs, strict=True)):
            core = torch.diag(cores[n]) if cores[n].ndim == 1 else cores[n]
            made = b @ core @ a @ q.T @ q  # rows of A outside the span are not the fit's to choose
            made = outputs[0][n][:, None] * made if outputs else made
            total = total + ((m.scale * m.factors.B @ m.factors.A - made) @ x.T).square().sum() / len(x)
        total.backward()
        return total

    optimizer.step(loss)
    assert float(loss().detach()) >= 0.97 * fitted.errors[-1]


def test_layers_that_have_such_a_form_are_met_exactly():
    randn = drawing(0)
    a, b = randn(2, 8), randn(7, 2)
    for way, cores in (("diagonal", randn(4, 2)), ("core", randn(4, 2, 2))):
        made = [Factors((torch.diag(k) if k.ndim == 1 else k) @ a, b) for k in cores]
        q = input_basis(made)
        white = torch.eye(len(q), dtype=torch.float64)
        fitted = fit([Member(f, 1.5, white) for f in made], q, 2, way)
        assert fitted.errors[-1] < 1e-3 * fitted.errors[0] + 1e-9 or fitted.errors[-1] < 1e-6, way


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 6), st.booleans())
def test_vectors_on_given_factors_cost_what_they_say_and_never_go_up(seed, rank, white):
    randn = drawing(seed)
    own, (a, b) = Factors(randn(2, 7), randn(6, 2)), seeded(seed, rank, (6, 7), torch.float64)
    frozen = Factors(a, b, seed=seed)
    q = input_basis([own, frozen])
    x = torch.eye(7, dtype=torch.float64) * 7**0.5 if white else randn(40, 7) @ randn(7, 7)
    member = Member(own, 1.5, q @ x.T @ x @ q.T / len(x))
    fitted = fit_frozen(member, q, frozen)
    whole = float((1.5 * own.B @ own.A @ x.T).square().sum()) / len(x)
    assert fitted.factors is frozen
    assert fitted.errors[-1] == pytest.approx(sum(costs([member], [x], fitted)), rel=1e-5, abs=1e-7 * whole)
    assert all(after <= before + 1e-8 * whole for before, after in zip(fitted.errors, fitted.errors[1:], strict=False))
    assert fitted.errors[-1] < whole


# Plans and packing.


@pytest.mark.parametrize(("method", "sharing"), WAYS)
def test_plan_and_updates_do_not_depend_on_how_the_adapter_is_written(method, sharing):
    adapter = adapter_of()
    again = rewritten(adapter)
    one, two = (planned(a, method, sharing, rank=2) for a in (adapter, again))
    assert replace(one, adapter="") == replace(two, adapter="")
    inputs = {}
    for source, plan in ((adapter, one), (again, two)):
        bases = module_bases(source, plan)
        x = {m: drawing(n)(40, q.shape[1]) for n, (m, q) in enumerate(bases.items())}
        inputs[source] = {m: q @ x[m].T @ x[m] @ q.T / 40 for m, q in bases.items()}
    for given_inputs in (None, inputs):
        packed = [
            pack_adapter(a, p, inputs=given_inputs and given_inputs[a]) for a, p in ((adapter, one), (again, two))
        ]
        for m in adapter.modules:
            torch.testing.assert_close(update(packed[1], m), update(packed[0], m), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "sharing"), WAYS)
@pytest.mark.parametrize("budget", [90, 140, 200])
def test_the_plan_fits_the_budget_and_counts_what_is_packed(method, sharing, budget):
    adapter = adapter_of(layers=4, d_out=8, d_in=9, rank=4)
    plan = planned(adapter, method, sharing, budget=str(budget))
    packed = pack_adapter(adapter, plan)
    assert parameters(plan, adapter) == size(packed).parameters <= budget
    assert size(packed).bytes == 8 * size(packed).parameters
    assert sum(row["parameters"] for row in describe_adapter(packed)["types"]) == size(packed).parameters
    assert from_json(to_json(plan)) == plan


def test_measured_inputs_make_the_fit_better_where_they_are():
    adapter = adapter_of(rank=4)
    for method, sharing in WAYS[1:]:
        plan = planned(adapter, method, sharing, rank=1)
        bases = module_bases(adapter, plan)
        xs = {m: drawing(7)(40, q.shape[1]) * torch.logspace(0, 2, q.shape[1]) for m, q in bases.items()}
        inputs = {m: q @ xs[m].T @ xs[m] @ q.T / 40 for m, q in bases.items()}
        seeing, blind = pack_adapter(adapter, plan, inputs=inputs), pack_adapter(adapter, plan)

        def cost(packed, xs=xs):
            return sum(
                float(((update(adapter, m) - update(packed, m)) @ xs[m].T).square().sum()) for m in adapter.modules
            )

        assert cost(seeing) < cost(blind), method


def test_an_old_plan_shares_with_a_scale():
    old = {"method": "by hand", "options": {}, "choices": [], "groups": {}, "adapter": "", "metric": None, "version": 1}
    assert from_json(json.dumps(old)).way("anything") == "scale"


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("tied", {}, "needs a --budget or a --rank"),
        ("vera", {"budget": "50%", "rank": 2}, "not both"),
        ("tied", {"rank": 0}, "--rank 0"),
        ("tied", {"budget": "10"}, "too small for tied: rank one takes"),
        ("vera", {"budget": "30"}, "too small for vera: rank one takes 39"),
        ("tied", {"rank": 1, "sharing": "vera"}, "--sharing 'vera'"),
    ],
)
def test_what_cannot_be_planned_is_refused(method, settings, words):
    with pytest.raises(InputError, match=words):
        plan_adapter(adapter_of(), None, method, **settings)


def test_a_core_needs_the_closed_form():
    adapter = adapter_of()
    with pytest.raises(InputError, match="needs --share-init closed"):
        pack_adapter(adapter, planned(adapter, "tied", "core", rank=1), share_init="fresh")


def test_a_packed_adapter_can_be_packed_again():
    adapter = adapter_of()
    once = pack_adapter(adapter, planned(adapter, "tied", "tied", rank=2))
    again = pack_adapter(once, planned(once, "tied", "scale", rank=4))
    assert size(again).parameters < size(adapter).parameters
    for m in once.modules:  # the plain pair that everything works with is the update
        torch.testing.assert_close(once.scale(m) * once.factors(m).B @ once.factors(m).A, update(once, m))


# Files, PEFT, transformers.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    lora(llama(), path / "plain", target_modules=TYPES)
    return path


@pytest.fixture(scope="module")
def packed(root):
    plain = read_adapter(root / "plain")
    found = {}
    for method, sharing in WAYS:
        name = sharing or method
        found[name] = pack_adapter(plain, planned(plain, method, sharing, rank=2 if method == "tied" else 8))
        write_adapter(found[name], root / name)
        write_adapter(found[name], root / f"{name}-expanded", expand=True)
    return found


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def naive(model, adapter):
    model = copy.deepcopy(model).double()
    for module in adapter.modules:
        layer, change = model.get_submodule(module), update(adapter, module)
        with torch.no_grad():
            layer.weight += change.T if type(layer).__name__ == "Conv1D" else change
    return model


@pytest.mark.parametrize("name", ["diagonal", "core", "tied", "vera"])
def test_it_reads_back_the_same_and_peft_computes_what_it_says(root, packed, name):
    adapter = packed[name]
    assert digest(read_adapter(root / name)) == digest(adapter)
    model = PeftModel.from_pretrained(llama(), root / name)
    assert not any(p.requires_grad for p in model.parameters())
    expected = logits(naive(llama(), adapter)).float()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for directory, options in ((root / f"{name}-expanded", {}), (root / name, {"low_cpu_mem_usage": True})):
        other = PeftModel.from_pretrained(llama(), directory, **options)
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    by_transformers = llama()
    by_transformers.load_adapter(str(root / name))
    torch.testing.assert_close(logits(by_transformers), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["diagonal", "core", "tied", "vera"])
def test_trained_and_saved_it_is_one_parameter_a_group_and_seeded_factors_stay(root, packed, name, tmp_path):
    adapter = packed[name]
    model = PeftModel.from_pretrained(llama(), root / name, is_trainable=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size(adapter).parameters
    model.save_pretrained(tmp_path / "same")
    assert digest(read_adapter(tmp_path / "same")) == digest(adapter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    trained = read_adapter(tmp_path / "trained")
    assert trained.groups == adapter.groups
    torch.testing.assert_close(logits(model), logits(naive(llama(), trained)).float(), rtol=1e-4, atol=1e-4)
    for m in adapter.modules:
        assert not torch.equal(trained.modules[m].core, adapter.modules[m].core)
    for group, factors in adapter.pool.items():
        assert torch.equal(trained.pool[group].A, factors.A) == (name == "vera")


def test_two_such_adapters_live_beside_each_other(root, packed, tmp_path):
    model = PeftModel.from_pretrained(llama(), root / "vera", "first")
    model.load_adapter(str(root / "tied"), "second")
    alone = {n: logits(PeftModel.from_pretrained(llama(), root / n)) for n in ("vera", "tied")}
    torch.testing.assert_close(logits(model), alone["vera"])
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), alone["tied"])
    model.save_pretrained(tmp_path)
    assert digest(read_adapter(tmp_path / "first")) == digest(packed["vera"])
    assert digest(read_adapter(tmp_path / "second")) == digest(packed["tied"])


def test_transposed_layers_share_too(tmp_path):
    lora(gpt2(), tmp_path / "plain", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    plain = read_adapter(tmp_path / "plain")
    adapter = pack_adapter(plain, planned(plain, "vera", None, rank=6))
    write_adapter(adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(gpt2(), tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(naive(gpt2(), adapter)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", [None, "int8"])  # int8: the vectors in bf16
def test_the_command_writes_a_vera_checkpoint_that_peft_reads(root, packed, tmp_path, store):
    write_adapter(store_adapter(read_adapter(root / "vera"), store), tmp_path / "stored")
    done = run("expand", tmp_path / "stored", "-o", tmp_path / "vera", "--as-vera")
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(llama(), tmp_path / "vera")
    assert type(model.base_model).__name__ == "VeraModel"
    torch.testing.assert_close(
        logits(model), logits(PeftModel.from_pretrained(llama(), tmp_path / "stored")), rtol=1e-5, atol=1e-5
    )
    config = json.loads((tmp_path / "vera" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["save_projection"]) == ("VERA", 8, True)


def test_a_vera_checkpoint_carries_the_classifier(tmp_path):
    source = bert()
    with torch.no_grad():
        source.classifier.weight += 1
    lora(source, tmp_path / "plain", target_modules=["query", "value"], task_type="SEQ_CLS")
    plain = read_adapter(tmp_path / "plain")
    adapter = pack_adapter(plain, planned(plain, "vera", None, rank=5))
    write_adapter(adapter, tmp_path / "out")
    assert run("expand", tmp_path / "out", "-o", tmp_path / "vera", "--as-vera").returncode == 0
    one, two = (PeftModel.from_pretrained(bert(), tmp_path / name) for name in ("out", "vera"))
    torch.testing.assert_close(logits(two), logits(one), rtol=1e-5, atol=1e-5)


def test_only_what_is_vera_becomes_vera(root, packed, tmp_path):
    line = refused(run("expand", root / "tied", "-o", tmp_path / "no", "--as-vera"))
    assert "is not two vectors on seeded factors" in line and not (tmp_path / "no").exists()


def test_inspect_says_what_is_shared(root, packed):
    done = run("inspect", root / "vera")
    assert "diagonal cores, output vectors, made from the seed 0" in done.stdout, done.stdout


def test_where_nothing_has_a_core_the_file_and_the_digest_are_as_before(root, packed):
    config = json.loads((root / "scale" / "adapter_config.json").read_text())
    assert "forms" not in config["lorapack"]
    pool = {"a": Factors(torch.ones(1, 2), torch.ones(3, 1))}
    plain = Adapter({}, pool, {"layers.0": Pointer("a", 2.0), "layers.1": Pointer("a", 1.0)}, {})
    assert digest(plain) == "fd2287c2c5fb8cbec2d06066b11e2ecb900b40a387f36ab6b350274ebd83fcab"


# Recovery's exchange of factors.


@pytest.mark.parametrize("name", ["core", "tied", "vera"])
def test_in_the_loaded_model_the_layers_compute_the_same_and_everything_of_theirs_is_trained(
    name, packed, root, tmp_path
):
    llama().save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, tmp_path / "base")
    adapter = packed[name]
    loaded = load(read_adapter(root / "plain"), str(tmp_path / "base"), device="cpu")
    placed = place(adapter, loaded.device, trainable=True)
    point(loaded, placed)
    expected = logits(naive(llama(), adapter)).float()
    torch.testing.assert_close(logits(loaded.base), expected, rtol=1e-4, atol=1e-4)
    trained = placed.trained()
    assert sum(p.numel() for p in trained.values()) == size(adapter).parameters
    loaded.base(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    assert digest(taken(adapter, placed)) == digest(adapter)
    with torch.no_grad():
        for p in trained.values():
            p -= 0.1 * p.grad
    after = taken(adapter, placed)
    point(loaded, placed)
    torch.testing.assert_close(logits(loaded.base), logits(naive(llama(), after)).float(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(after.pool[g].A, f.A) == (name == "vera") for g, f in adapter.pool.items())
    point(loaded, place(None, loaded.device))
    torch.testing.assert_close(logits(loaded.base), logits(llama()), rtol=1e-5, atol=1e-5)


# Damage.

M = "model.layers.1.self_attn.q_proj"


def core_is_missing(config, tensors):
    del tensors[f"lorapack.{M}.core"]


def output_is_missing(config, tensors):
    del tensors[f"lorapack.{M}.output"]


def core_too_long(config, tensors):
    tensors[f"lorapack.{M}.core"] = torch.ones(9)


def core_is_a_matrix(config, tensors):
    tensors[f"lorapack.{M}.core"] = torch.ones(8, 8)


def output_too_short(config, tensors):
    tensors[f"lorapack.{M}.output"] = torch.ones(3)


def core_not_finite(config, tensors):
    tensors[f"lorapack.{M}.core"][0] = float("nan")


def core_of_integers(config, tensors):
    tensors[f"lorapack.{M}.core"] = torch.ones(8, dtype=torch.int32)


def core_of_no_group(config, tensors):
    tensors["lorapack.model.layers.9.core"] = torch.ones(8)


def form_of_no_group(config, tensors):
    config["lorapack"]["forms"]["stray"] = {"core": "diagonal"}


def unknown_field(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["twist"] = 1


def unknown_field_of_the_seed(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["seeded"]["recipe"] = 2


def unknown_core(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["core"] = "circulant"


def negative_seed(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["seeded"]["seed"] = -1


def huge_seeded_factors(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["seeded"]["shape"] = [10**9, 10**9]


def another_rank(config, tensors):
    config["lorapack"]["forms"]["vera.32x32"]["seeded"]["rank"] = 6


def seeded_factors_stored(config, tensors):
    tensors["lorapack.vera.32x32.A"] = torch.ones(8, 32)


DAMAGE = {
    core_is_missing: f"lorapack.{M}.core",
    output_is_missing: f"lorapack.{M}.output",
    core_too_long: f"the core of {M} has the shape",
    core_is_a_matrix: f"{M} has a core of 2 dimensions",
    output_too_short: f"output vector of {M}",
    core_not_finite: f"{M}.*NaN",
    core_of_integers: f"{M}.*int32",
    core_of_no_group: "belongs to no module",
    form_of_no_group: "'stray'",
    unknown_field: "vera.32x32.twist",
    unknown_field_of_the_seed: "vera.32x32.seeded.recipe",
    unknown_core: "vera.32x32.core",
    negative_seed: "the seed of 'vera.32x32' is -1",
    huge_seeded_factors: "'vera.32x32' has seeded factors",
    another_rank: "rank",
    seeded_factors_stored: "belongs to no module",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_file_is_refused_by_name(damage, root, packed, tmp_path):
    config = json.loads((root / "vera" / "adapter_config.json").read_text())
    tensors = load_file(root / "vera" / "adapter_model.safetensors")
    damage(config, tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=DAMAGE[damage]):
        read_adapter(tmp_path)


def test_pointers_and_factors_that_do_not_fit_are_refused():
    pool = {"a": Factors(torch.ones(2, 3), torch.ones(4, 2))}
    for pointer, words in (
        (Pointer("a", 1.0, torch.ones(3)), "the core of m has the shape"),
        (Pointer("a", 1.0, None, torch.ones(3)), "output vector of m"),
    ):
        with pytest.raises(InputError, match=words):
            Adapter({}, pool, {"m": pointer}, {})
    with pytest.raises(InputError, match="another kind of core"):
        Adapter({}, pool, {"m": Pointer("a", 1.0, torch.ones(2)), "n": Pointer("a", 1.0)}, {})
