"""Factors in fewer bytes: the rounding, the format, budgets in bytes."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import ADAPTER, BASE, CALIBRATION, HELDOUT, llama, lora, refused, run

from lorapack import Adapter, Factors, InputError, Pointer, compress_adapter, read_adapter, write_adapter
from lorapack.core.adapter import decoded, digest, size
from lorapack.core.codes import LOWEST, STORES, Sparse, bytes_of_atom
from lorapack.describe import describe_adapter
from lorapack.evaluate import evaluate_adapters
from lorapack.job import plan_budget
from lorapack.pack.store import levelled, nearest, on_grid, quantised, rerounded, side, store_adapter
from lorapack.pack.truncate import balanced
from lorapack.write import put_adapter

IDS = torch.arange(2, 42).reshape(2, 20)
Q = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
V = "model.layers.1.self_attn.v_proj"


def factors(rank, d_out, d_in, decay=1.0, seed=0, live=None):
    """Random factors whose singular values fall by `decay`; from the atom `live` on they are zero."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator)
    b = torch.randn(d_out, rank, generator=generator) * decay ** torch.arange(rank)
    if live is not None:
        b[:, live:] = 0
    mixed = torch.randn(rank, rank, generator=generator) + 2 * torch.eye(rank)
    return Factors(mixed @ a, b @ torch.linalg.inv(mixed))


def product(f):
    return f.B.double() @ f.A.double()


def error(f, g):
    return float((product(f) - product(g)).square().sum() / product(f).square().sum())


def thinned(f, seed):
    """About a third of the elements, for the others zeros."""
    whole = torch.cat([f.A.reshape(-1), f.B.reshape(-1)])
    mask = torch.rand(whole.numel(), generator=torch.Generator().manual_seed(seed)) < 0.3
    return decoded(Sparse((f.rank, *f.shape), mask, whole[mask]))


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1.0, 0.5, 0.1]))


# Rounding


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(0, 100), st.sampled_from([None, 0, 1]))
def test_levelled_atoms_are_the_same_product_in_equal_lengths_at_the_least_cost(shape, seed, live):
    f = factors(*shape, seed=seed, live=live)
    b, a = levelled(f)
    assert torch.allclose(b @ a, product(f), atol=1e-5 * (1 + float(product(f).abs().max())))
    lengths = torch.cat([a.norm(dim=1), b.norm(dim=0)])
    assert torch.allclose(lengths, lengths.mean(), rtol=1e-3, atol=1e-5)
    singular = torch.linalg.svdvals(product(f))
    cost = (b.square().sum(0) * a.square().sum(1)).sum()
    assert float(cost) == pytest.approx(float(singular.sum() ** 2 / f.rank), rel=1e-3, abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from(sorted(LOWEST)))
def test_a_row_gets_the_nearest_codes_in_range_and_clipping_never_hurts(seed, length, store):
    rows = torch.randn(3, length, generator=torch.Generator().manual_seed(seed)).double()
    found = on_grid(rows, LOWEST[store])
    assert found.codes.min() >= LOWEST[store] and found.codes.max() <= -LOWEST[store] - 1
    assert torch.equal(found.scales, found.scales.bfloat16().double())
    assert torch.equal(found.codes, nearest(rows, found.scales, LOWEST[store]))
    for sign in (1, -1):
        whole = (rows.abs().amax(1, keepdim=True) / (sign * LOWEST[store])).bfloat16().double()
        unclipped = nearest(rows, whole, LOWEST[store]) * whole
        assert ((found.values - rows).square().sum(1) <= (unclipped - rows).square().sum(1) + 1e-12).all()


def test_no_scale_of_a_finer_search_is_much_better():
    rows = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).double()
    found = (on_grid(rows, -8).values - rows).square().sum(1)
    tried = torch.linspace(-1.1, 1.1, 1001).double() * float(rows.abs().max()) / 8
    naive = torch.stack([(nearest(rows, s.expand(4, 1), -8) * s - rows).square().sum(1) for s in tried]).amin(0)
    assert (found <= 1.03 * naive).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 100), st.sampled_from(sorted(LOWEST)))
def test_a_sweep_of_rerounding_never_raises_the_error_and_its_last_step_is_exact(shape, seed, store):
    f = factors(*shape, seed=seed)
    b, a = levelled(f)
    before, partner = on_grid(b.T, LOWEST[store]), on_grid(a, LOWEST[store]).values
    after = rerounded(before, a, b, partner)
    target = b @ a

    def off(values):
        return float((target - values.T @ partner).square().sum())

    assert off(after.values) <= off(before.values) * (1 + 1e-9) + 1e-12
    assert after.codes.min() >= LOWEST[store] and after.codes.max() <= -LOWEST[store] - 1
    # brute force over all codes of the last atom, the others as they are, at the scale it started with
    best = after.values.clone()
    options = torch.arange(LOWEST[store], -LOWEST[store]).double() * before.scales[-1]
    for place in range(best.shape[1]):
        column = best[:, place].repeat(len(options), 1)
        column[:, -1] = options
        found = ((target[place] - column @ partner) ** 2).sum(1).argmin()
        best[-1, place] = options[found]
    assert off(after.values) <= off(best) * (1 + 1e-9) + 1e-12


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 100), st.sampled_from(sorted(LOWEST)))
def test_what_was_measured_weighs_the_error_and_a_sweep_never_raises_it(shape, seed, store):
    f = factors(*shape, seed=seed)
    b, a = levelled(f)
    x = torch.randn(50, shape[2], generator=torch.Generator().manual_seed(seed)).double() * 3.0 ** torch.arange(
        shape[2]
    )
    weigh = side(f.A.double(), f.A.double() @ x.T @ x @ f.A.double().T)
    moment = weigh(torch.eye(shape[2], dtype=torch.float64))
    seen = f.A.double() @ moment @ f.A.double().T
    assert torch.allclose(seen, f.A.double() @ x.T @ x @ f.A.double().T, rtol=1e-6, atol=1e-6 * float(seen.trace()))
    before, partner = on_grid(b.T, LOWEST[store]), on_grid(a, LOWEST[store]).values

    def off(grid):
        rest = b @ a - grid.values.T @ partner
        return float(((rest @ moment) * rest).sum())

    assert off(rerounded(before, a, b, partner, weigh)) <= off(before) * (1 + 1e-9) + 1e-9


def test_int4_is_nearer_in_what_the_inputs_meet_where_they_were_measured():
    f = factors(12, 80, 60)
    x = torch.randn(500, 60, generator=torch.Generator().manual_seed(1)).double() @ torch.diag(
        0.9 ** torch.arange(60).double()
    )
    h = x @ f.A.double().T
    known = side(f.A.double(), h.T @ h)

    def off(g):
        return float(((product(f) - product(g)) @ x.T).square().sum())

    assert off(quantised(f, "int4", known)) < 0.95 * off(quantised(f, "int4"))
    assert error(f, quantised(f, "int4", known)) > error(f, quantised(f, "int4"))


@pytest.mark.parametrize(("store", "most"), [("int8", 2e-4), ("int4", 3e-2)])
def test_quantising_costs_less_than_rounding_to_the_nearest(store, most):
    for decay, gain in ((1.0, 1.01), (0.7, 0.5), (0.4, 0.3)):
        f = factors(12, 80, 60, decay)
        b, a = balanced(f.B.double(), f.A.double())
        lowest = LOWEST[store]
        plain = Factors(on_grid(a, lowest).values, on_grid(b.T, lowest).values.T)
        found = quantised(f, store)
        assert error(f, found) <= most
        assert error(f, found) <= gain * error(f, plain)
        a_values, b_values = found.codes.values()
        assert torch.equal(found.A, a_values) and torch.equal(found.B, b_values)
        assert found.A.dtype == found.B.dtype == torch.float32


def test_nothing_becomes_nothing():
    for store in LOWEST:
        found = quantised(Factors(torch.ones(2, 5), torch.zeros(7, 2)), store)
        assert not product(found).any() and torch.isfinite(found.codes.scales).all()


def test_storing_again_changes_nothing():
    adapter = store_adapter(read_adapter(ADAPTER), "int4")
    assert digest(store_adapter(adapter, "int4")) == digest(adapter)


def test_half_precision_shares_its_range_and_refuses_what_it_cannot_hold():
    apart = Factors(torch.full((1, 4), 1e-7), torch.full((4, 1), 1e7))  # neither fits alone
    held = store_adapter(lone(apart), "fp16").factors("m")
    assert held.A.dtype == torch.float16 and torch.allclose(product(held), product(apart), rtol=2e-3)
    large = Factors(torch.full((1, 4), 1e7), torch.full((4, 1), 1e7))
    with pytest.raises(InputError, match="factors of m are too large"):
        store_adapter(lone(large), "fp16")
    assert torch.isfinite(store_adapter(lone(large), "bf16").factors("m").A).all()


@pytest.mark.parametrize(
    ("store", "most"), [("fp32", 0), ("bf16", 1e-4), ("fp16", 1e-6), ("int8", 1e-3), ("int4", 0.1)]
)
@pytest.mark.parametrize("core", [None, (6,), (6, 6)])
def test_every_module_keeps_its_update_in_every_store_whatever_stands_between_the_factors(store, most, core):
    generator = torch.Generator().manual_seed(3)
    f = factors(6, 80, 60, 0.5)
    f = Factors(f.A * torch.logspace(-3, 3, 6)[:, None], f.B)  # atoms that are far from balanced
    own = [None if core is None else torch.randn(core, generator=generator) for _ in range(2)]
    outputs = [torch.rand(80, generator=generator) + 0.5 for _ in range(2)]
    modules = {f"layers.{n}.q": Pointer("shared", 1.0 + n, own[n], outputs[n]) for n in range(2)}
    adapter = Adapter({"peft_type": "LORA"}, {"shared": f}, modules, {})
    held = store_adapter(adapter, store)
    for module in modules:
        assert error(adapter.factors(module), held.factors(module)) <= most
    assert {t.element_size() for p in held.modules.values() for t in p.own} == {4 if store == "fp32" else 2}


def lone(f):
    return Adapter({"peft_type": "LORA"}, {"m": f}, {"m": Pointer("m", 1.0)}, {})


# The format


@st.composite
def stored_adapters(draw):
    """Random shapes, ranks and stores, mixed; some modules share."""
    pool, modules = {}, {}
    for number in range(draw(st.integers(1, 4))):
        rank, d_out, d_in, _ = draw(SHAPES)
        f = factors(rank, d_out, d_in, seed=number)
        store = draw(st.sampled_from([None, "int8", "int4", "sparse"]))
        users = draw(st.integers(1, 3))
        name = f"layers.0.m{number}" if users == 1 else draw(st.sampled_from(["shared.", "z"])) + str(number)
        pool[name] = f if store is None else thinned(f, number) if store == "sparse" else quantised(f, store)
        for layer in range(users):
            modules[f"layers.{layer}.m{number}"] = Pointer(name, 0.5 + layer)
    carried = draw(st.sampled_from([{}, {"base_model.model.head.bias": torch.arange(3)}]))
    return Adapter({"peft_type": "LORA", "task_type": "CAUSAL_LM"}, pool, modules, carried)


@settings(max_examples=60, deadline=None)
@given(stored_adapters())
def test_what_is_stored_reads_back_bit_for_bit_in_as_many_bytes_as_it_says(tmp_path_factory, adapter):
    out, plain = tmp_path_factory.mktemp("stored"), tmp_path_factory.mktemp("plain")
    put_adapter(adapter, out)
    found = read_adapter(out)
    assert digest(found) == digest(adapter) and size(found) == size(adapter) and found.groups == adapter.groups
    for name, f in adapter.pool.items():
        assert (f.codes is None) == (found.pool[name].codes is None)
        if f.codes is not None:
            again = found.pool[name].codes
            assert again.store == f.codes.store
            for part in ("mask", "numbers") if f.codes.store == "sparse" else ("A", "B", "scales"):
                assert torch.equal(getattr(again, part), getattr(f.codes, part))
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == size(found).bytes + size(found).carried_bytes
    put_adapter(found, plain, expand=True)
    expanded = read_adapter(plain)
    assert expanded.config["peft_type"] == "LORA" and not any(f.codes for f in expanded.pool.values())
    for module in adapter.modules:
        assert torch.equal(expanded.factors(module).A, adapter.factors(module).A)
        assert torch.equal(expanded.factors(module).B, adapter.factors(module).B)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def adapter(root):
    """q_proj shared by two modules, the others with factors of their own; all int4."""
    found = read_adapter(lora(llama(), root / "plain", target_modules=["q_proj", "v_proj"]))
    pool = {name: f for name, f in found.pool.items() if name not in Q[:2]} | {"both": found.pool[Q[0]]}
    modules = {**found.modules, Q[0]: Pointer("both", 2.0), Q[1]: Pointer("both", -1.5)}
    return store_adapter(replace(found, pool=pool, modules=modules), "int4")


@pytest.fixture(scope="module")
def stored(root, adapter):
    write_adapter(adapter, root / "stored")
    return root / "stored"


def by_peft(directory):
    return PeftModel.from_pretrained(llama(), directory)


def by_transformers(directory):
    model = llama()
    model.load_adapter(str(directory))
    return model


@pytest.mark.parametrize("way", [by_peft, by_transformers], ids=lambda way: way.__name__)
def test_peft_loads_it_and_saves_the_floats_it_holds(way, root, adapter, stored, tmp_path):
    expanded = root / f"expanded {way.__name__}"
    write_adapter(adapter, expanded, expand=True)
    model = way(stored)
    with torch.no_grad():
        expected = by_peft(expanded).eval()(input_ids=IDS).logits
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected, rtol=1e-6, atol=1e-6)
        assert (llama()(input_ids=IDS).logits - expected).abs().max() > 0.01
    model.save_pretrained(tmp_path / "again")
    found = read_adapter(tmp_path / "again")
    assert not any(f.codes for f in found.pool.values()) and found.groups == adapter.groups
    assert digest(found) == digest(adapter)


@pytest.mark.parametrize("store", STORES)
def test_only_what_plain_peft_cannot_express_is_compact(store, tmp_path):
    write_adapter(store_adapter(lone(factors(3, 8, 6)), store), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    if store in LOWEST:
        assert config["peft_type"] == "LORAPACK" and not [name for name in tensors if "lora_" in name]
    else:
        assert config["peft_type"] == "LORA" and "lorapack" not in config
    assert describe_adapter(read_adapter(tmp_path / "out"))["types"][0]["dtype"] == {
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
    }.get(store, store)


def unknown_store(entry, tensors):
    entry["stored"]["int3"] = entry["stored"].pop("int4")


def no_codes(entry, tensors):
    del tensors["lorapack.int4.codes"]


def no_scales(entry, tensors):
    del tensors["lorapack.int4.scales"]


def codes_of_another_type(entry, tensors):
    tensors["lorapack.int4.codes"] = tensors["lorapack.int4.codes"].view(torch.int8)


def too_few_codes(entry, tensors):
    tensors["lorapack.int4.codes"] = tensors["lorapack.int4.codes"][:-1]


def too_many_scales(entry, tensors):
    tensors["lorapack.int4.scales"] = torch.ones(999, dtype=torch.bfloat16)


def endless_scale(entry, tensors):
    tensors["lorapack.int4.scales"][3] = float("inf")


def a_huge_shape(entry, tensors):
    entry["stored"]["int4"][V] = [10**12, 10**12, 10**12]


def an_empty_shape(entry, tensors):
    entry["stored"]["int4"][V] = [0, 16, 32]


def a_shape_of_two(entry, tensors):
    entry["stored"]["int4"][V] = [4, 16]


def another_rank(entry, tensors):
    entry["stored"]["int4"][V] = [2, 64, 32]


def floats_beside_codes(entry, tensors):
    tensors[f"base_model.model.{V}.lora_A.weight"] = torch.zeros(4, 32)


def floats_beside_shared_codes(entry, tensors):
    tensors["lorapack.both.A"] = torch.zeros(4, 32)


def stored_twice(entry, tensors):
    entry["stored"]["int8"] = {V: [4, 16, 32]}


def codes_that_the_manifest_lacks(entry, tensors):
    tensors["lorapack.int8.codes"] = torch.zeros(4, dtype=torch.int8)


def no_entry(entry, tensors):
    del entry["stored"]


def a_module_that_is_not_targeted(entry, tensors):
    entry["stored"]["int4"]["model.layers.9.x"] = entry["stored"]["int4"].pop(V)


def a_member_stored_for_itself(entry, tensors):
    entry["stored"]["int4"][Q[0]] = entry["stored"]["int4"].pop(V)


DAMAGE = {
    unknown_store: "the store 'int3' is unknown",
    no_codes: "'lorapack.int4.codes' is missing",
    no_scales: "'lorapack.int4.scales' is missing",
    codes_of_another_type: "lorapack.int4.codes is torch.int8",
    too_few_codes: "lorapack.int4.codes is torch.uint8 of shape",
    too_many_scales: "lorapack.int4.scales is torch.bfloat16 of shape (999,)",
    endless_scale: "lorapack.int4.scales holds NaN or infinite",
    a_huge_shape: "lorapack.int4.codes is torch.uint8 of shape",
    an_empty_shape: V,
    a_shape_of_two: V,
    another_rank: "lorapack.int4.scales",
    floats_beside_codes: f"{V} is stored as int4 and has the tensor",
    floats_beside_shared_codes: "both is stored as int4 and has the tensor 'lorapack.both.A'",
    stored_twice: f"{V} is stored more than once",
    codes_that_the_manifest_lacks: "lorapack.int8.codes",
    no_entry: "'lorapack.both.A' is missing",
    a_module_that_is_not_targeted: f"{V} is one of the target_modules and has no factors",
    a_member_stored_for_itself: Q[0],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_refused_by_name(damage, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "damaged" / "adapter_model.safetensors")
    damage(config["lorapack"], tensors)
    (tmp_path / "damaged" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "damaged" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=re.escape(DAMAGE[damage])) as refusal:
        read_adapter(tmp_path / "damaged")
    assert "\n" not in str(refusal.value)
    if damage is not a_module_that_is_not_targeted:  # PEFT warns of a target without tensors
        with pytest.raises((InputError, RuntimeError, ValueError)):
            by_peft(tmp_path / "damaged")


SPARSE_DAMAGE = {
    "'lorapack.sparse.mask' is missing": lambda t: t.pop("lorapack.sparse.mask"),
    "lorapack.sparse.mask is torch.uint8 of shape (5,)": lambda t: t.update(
        {"lorapack.sparse.mask": torch.zeros(5, dtype=torch.uint8)}
    ),
    "the unused bits of its last byte are not zeros": lambda t: t["lorapack.sparse.mask"][-1].bitwise_or_(1 << 7),
    "lorapack.sparse.numbers is torch.float32 of shape": lambda t: t["lorapack.sparse.mask"][0].bitwise_xor_(1),
    "lorapack.sparse.numbers holds NaN": lambda t: t["lorapack.sparse.numbers"][0].fill_(float("nan")),
}


@pytest.mark.parametrize("message", SPARSE_DAMAGE)
def test_damage_to_single_elements_is_refused_by_name(message, tmp_path):
    write_adapter(lone(thinned(factors(2, 8, 7), 0)), tmp_path / "out")  # 30 elements: 2 bits of the last byte unused
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    SPARSE_DAMAGE[message](tensors)
    save_file(tensors, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=re.escape(message)):
        read_adapter(tmp_path / "out")


def test_the_unused_half_of_the_last_byte_is_a_zero(tmp_path):
    write_adapter(store_adapter(lone(factors(1, 2, 3)), "int4"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    tensors["lorapack.int4.codes"][-1] ^= 0xF0
    save_file(tensors, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="unused half"):
        read_adapter(tmp_path / "out")


# Budgets in bytes


def test_budgets_in_bytes_become_parameters():
    found = read_adapter(ADAPTER)
    whole = size(found)
    assert plan_budget("40KB", found) == plan_budget("40000B", found) == plan_budget("0.04mb", found) == 10_000
    assert plan_budget("50%", found) == whole.parameters // 2
    assert plan_budget("50%", found, "fp32") == whole.parameters // 2
    assert plan_budget("50%", found, "bf16") == whole.parameters
    least = min(sum(found.factors(m).shape) for m in found.linear)
    assert plan_budget("10KB", found, "int8") == int(10_000 / ((least + 4) / least))
    assert plan_budget("5000", found, "int4") == 5000  # a bare number is of parameters
    for bad in ("KB", "xMB", "nan%", "1e99GB", "0KB", "-3B", "B"):
        with pytest.raises(InputError, match="--budget"):
            plan_budget(bad, found, "int4")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("budget", ["7%", "9001B", "30KB"])
def test_the_result_keeps_to_its_bytes_and_uses_them(store, budget):
    found = read_adapter(ADAPTER)
    made = compress_adapter(found, None, method="rank", budget=budget, options={"metric": "weight"}, store=store)
    limit = {"7%": 0.07 * size(found).bytes, "9001B": 9001, "30KB": 30_000}[budget]
    assert 0.85 * limit < size(made.adapter).bytes <= limit
    assert made.report.after == size(made.adapter) and made.report.settings["store"] == store


@settings(deadline=None)
@given(st.sampled_from(STORES), st.integers(1, 50), st.integers(1, 50), st.integers(1, 9))
def test_an_atom_never_takes_more_than_it_is_counted_for(store, d_out, d_in, rank):
    held = store_adapter(lone(factors(rank, d_out, d_in)), store)
    assert size(held).bytes <= rank * bytes_of_atom(store, d_out + d_in)


# The whole job


def test_what_layers_have_of_their_own_counts_before_any_step_is_taken():
    given = {"method": "tied", "options": {"sharing": "core"}, "sample": "6", "max_length": 16, "device": "cpu"}

    def watch(step, items):
        assert step != "recover", "it recovers what it then refuses"
        return items

    with pytest.raises(InputError, match="LoRA bytes, the budget allows 147,968: what layers have of their own"):
        compress_adapter(
            read_adapter(ADAPTER), str(CALIBRATION), str(BASE), budget="40%", store="int4", watch=watch, **given
        )


def test_the_figures_are_of_what_is_written(tmp_path):
    found = read_adapter(ADAPTER)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:12]))
    rows = {"device": "cpu", "max_length": 32}
    options = {"method": "rank", "budget": "5%", "store": "int4", "recover_steps": 2, "sample": "10"}
    made = compress_adapter(found, str(CALIBRATION), str(BASE), eval_data=str(held), **options, **rows)
    write_adapter(made.adapter, tmp_path / "out", report=made.report)
    again = read_adapter(tmp_path / "out")
    assert all(f.codes is not None for f in again.pool.values())
    assert made.report.adapter["compressed"] == digest(again)
    quality, _ = evaluate_adapters(found, str(held), str(BASE), compressed=again, **rows)
    assert quality.metrics["loss"]["compressed"].value == pytest.approx(
        made.report.quality.metrics["loss"]["compressed"].value, rel=1e-6
    )


def test_the_commands_store_show_and_expand(tmp_path):
    few = ("--method", "rank", "--metric", "weight", "--budget", "20KB")
    done = run("compress", ADAPTER, *few, "--store", "int4", "-o", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    shown = run("inspect", tmp_path / "small")
    assert "int4" in shown.stdout and "lorapack compact" in shown.stdout
    assert run("expand", tmp_path / "small", "-o", tmp_path / "plain").returncode == 0
    assert digest(read_adapter(tmp_path / "plain")) == digest(read_adapter(tmp_path / "small"))
    assert "--store" in refused(run("compress", ADAPTER, *few, "--store", "int5", "-o", tmp_path / "no"))
    assert "20XB" in refused(run("compress", ADAPTER, *few[:-1], "20XB", "-o", tmp_path / "no"))
