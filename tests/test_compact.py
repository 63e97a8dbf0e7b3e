"""The compact format: what it means in PEFT and transformers, and what is refused in it.

Runs against the oldest and the newest PEFT of the supported range.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from support import assert_adapters_equal, bert, edit, gpt2, llama, lora
from torch import nn
from transformers import AutoModelForCausalLM

import lorapack
from lorapack import Adapter, Factors, InputError, Pointer, read_adapter, write_adapter
from lorapack.core.adapter import digest
from lorapack.write import put_adapter

IDS = torch.arange(2, 42).reshape(2, 20)
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
UP = [f"model.layers.{n}.mlp.up_proj" for n in range(4)]
V, K = "model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.k_proj"


def packed(adapter, groups, dropped=(), cut=None, seed=0):
    """Point the modules of each group to new factors of that rank, each with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    pool, modules = dict(adapter.pool), dict(adapter.modules)
    for module in dropped:
        del pool[module], modules[module]
    for module, rank in (cut or {}).items():
        pool[module] = Factors(pool[module].A[:rank].clone(), pool[module].B[:, :rank].clone())
    for name, (rank, members) in groups.items():
        d_out, d_in = adapter.factors(members[0]).shape
        a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((rank, d_in), (d_out, rank)))
        pool[name] = Factors(a, b)
        for number, module in enumerate(members):
            pool.pop(module, None)
            modules[module] = Pointer(name, (-1) ** number * (0.5 + number))
    return replace(adapter, pool=pool, modules=modules)


def naive(model, adapter):
    """The base with scale * B @ A added to its weights, by hand and in float64."""
    model = copy.deepcopy(model).double()
    for module in adapter.modules:
        layer, factors = model.get_submodule(module), adapter.factors(module)
        update = adapter.scale(module) * factors.B.double() @ factors.A.double()
        with torch.no_grad():
            layer.weight += update.T if type(layer).__name__ == "Conv1D" else update
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_same(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def layers_of(model, modules):
    """The LoRA layers of these modules, in a PeftModel or a transformers model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [base.get_submodule(module) for module in modules]


def assert_tied(model, modules, name="default"):
    layers = layers_of(model, modules)
    for part in ("lora_A", "lora_B"):
        weights = {id(getattr(layer, part)[name].weight) for layer in layers}
        assert len(weights) == 1, f"{part} of {modules} is {len(weights)} parameters"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("compact")


@pytest.fixture(scope="module")
def base(root):
    llama().save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def adapter(root, base):
    """Shared by 3 and by 2 modules, one module dropped, one of lower rank, 21 with their own factors."""
    lora(llama(), root / "plain", target_modules=TYPES)
    edit(root / "plain" / "adapter_config.json", base_model_name_or_path=str(base))
    groups = {"shared.q": (3, Q[1:]), "shared.up": (4, UP[:2])}
    return packed(read_adapter(root / "plain"), groups, dropped=[K], cut={V: 2})


@pytest.fixture(scope="module")
def compact(root, adapter):
    write_adapter(adapter, root / "compact")
    return root / "compact"


@pytest.fixture(scope="module")
def expanded(root, adapter):
    write_adapter(adapter, root / "expanded", expand=True)
    return root / "expanded"


def by_peft(base, directory):
    return PeftModel.from_pretrained(llama(), directory)


def by_peft_with_little_memory(base, directory):
    return PeftModel.from_pretrained(llama(), directory, low_cpu_mem_usage=True)


def by_peft_to_train(base, directory):
    return PeftModel.from_pretrained(llama(), directory, is_trainable=True)


def by_peft_beside_another(base, directory):
    model = PeftModel.from_pretrained(llama(), directory, "first")
    model.load_adapter(str(directory), "default")
    model.set_adapter("default")
    return model


def by_auto_peft(base, directory):
    return AutoPeftModelForCausalLM.from_pretrained(directory)


def by_transformers(base, directory):
    model = llama()
    model.load_adapter(str(directory))
    return model


def by_transformers_under_a_name(base, directory):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(directory), adapter_name="mine")
    return model


def by_transformers_from_the_adapter_directory(base, directory):
    return AutoModelForCausalLM.from_pretrained(directory)


WAYS = [
    by_peft,
    by_peft_with_little_memory,
    by_peft_to_train,
    by_peft_beside_another,
    by_auto_peft,
    by_transformers,
    by_transformers_under_a_name,
    by_transformers_from_the_adapter_directory,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_load_it_gives_the_expanded_adapter_with_shared_parameters(way, base, adapter, compact, expanded):
    model = way(base, compact)
    name = "mine" if way is by_transformers_under_a_name else "default"
    assert_same(logits(model), logits(PeftModel.from_pretrained(llama(), expanded)))
    assert_tied(model, Q[1:], name)
    assert_tied(model, UP[:2], name)
    own, other = (layer.lora_A[name].weight for layer in layers_of(model, [Q[0], Q[1]]))
    assert own is not other
    assert not hasattr(layers_of(model, [K])[0], "lora_A"), "a dropped module has no LoRA layer"


def test_it_computes_base_plus_scaled_products(adapter, compact):
    model = PeftModel.from_pretrained(llama(), compact).double()
    assert_same(logits(model), logits(naive(llama(), adapter)), 1e-12)
    far = logits(llama().double()) - logits(model)
    assert far.abs().max() > 0.1, "the adapter must matter for the comparison to mean anything"


def test_shared_factors_count_once(adapter, compact):
    model = PeftModel.from_pretrained(llama(), compact, is_trainable=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(f.parameters for f in adapter.pool.values())
    assert model.get_nb_trainable_parameters()[0] == trained


def test_a_training_step_moves_the_shared_factors_as_one(adapter, compact):
    model = PeftModel.from_pretrained(llama(), compact, is_trainable=True)
    before = layers_of(model, Q[1:2])[0].lora_A["default"].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    weight = layers_of(model, Q[1:2])[0].lora_A["default"].weight
    assert weight.grad is not None
    optimizer.step()
    assert_tied(model, Q[1:])
    assert not torch.equal(weight, before)
    assert all(torch.equal(layer.lora_A["default"].weight, weight) for layer in layers_of(model, Q[1:]))


def test_the_shared_gradient_is_the_sum_over_the_layers(compact, expanded):
    tied = PeftModel.from_pretrained(llama(), compact, is_trainable=True)
    apart = PeftModel.from_pretrained(llama(), expanded, is_trainable=True)
    for model in (tied, apart):
        model(input_ids=IDS, labels=IDS).loss.backward()
    parts = [layer.lora_B["default"].weight.grad for layer in layers_of(apart, Q[1:])]
    assert_same(layers_of(tied, Q[1:2])[0].lora_B["default"].weight.grad, sum(parts), 1e-5)


@pytest.mark.parametrize("way", [by_peft, by_peft_with_little_memory, by_peft_to_train, by_peft_beside_another])
def test_save_pretrained_keeps_the_bytes_and_the_sharing(way, base, adapter, compact, tmp_path):
    way(base, compact).save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (compact / "adapter_model.safetensors").read_bytes()
    found = read_adapter(tmp_path / "again")
    assert found.groups == adapter.groups
    assert_adapters_equal(found, adapter)
    model = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert_tied(model, Q[1:])
    assert_same(logits(model), logits(by_peft(base, compact)), 0)


def test_transformers_save_pretrained_keeps_the_sharing(adapter, compact, tmp_path):
    model = by_transformers(None, compact)
    model.save_pretrained(tmp_path / "again")
    found = read_adapter(tmp_path / "again")
    assert found.groups == adapter.groups
    assert_adapters_equal(found, adapter)
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits(model))


def test_two_compact_adapters_live_beside_each_other(root, adapter, compact, tmp_path):
    other = packed(read_adapter(root / "plain"), {"shared.q": (2, Q[:2]), "shared.up": (2, UP[1:])}, seed=1)
    write_adapter(other, tmp_path / "other")
    alone = logits(PeftModel.from_pretrained(llama(), tmp_path / "other"))
    model = PeftModel.from_pretrained(llama(), compact)
    first = logits(model)
    model.load_adapter(str(tmp_path / "other"), "other")
    assert_same(logits(model), first, 0)
    model.set_adapter("other")
    assert_same(logits(model), alone)
    assert_tied(model, Q[:2], "other")
    assert_tied(model, UP[1:], "other")
    assert_tied(model, Q[1:])
    model.save_pretrained(tmp_path / "both")
    assert_adapters_equal(read_adapter(tmp_path / "both"), adapter)
    assert_adapters_equal(read_adapter(tmp_path / "both" / "other"), other)
    model.delete_adapter("default")
    assert_same(logits(model), alone)


def test_delete_adapter_leaves_the_base(compact):
    model = PeftModel.from_pretrained(llama(), compact)
    model.delete_adapter("default")
    assert_same(logits(model.base_model.model), logits(llama()), 0)
    assert all("default" not in model.base_model.model.get_submodule(m).lora_A for m in Q)


def test_merge_and_unload_gives_the_merged_weights(adapter, compact):
    merged = PeftModel.from_pretrained(llama(), compact).merge_and_unload()
    expected = naive(llama(), adapter).float().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor)


def test_disable_adapter_gives_the_base(compact):
    model = PeftModel.from_pretrained(llama(), compact)
    with model.disable_adapter():
        assert_same(logits(model), logits(llama()), 0)


def test_the_file_holds_each_factor_once(adapter, compact):
    distinct = sum(f.nbytes for f in adapter.pool.values())
    assert (compact / "adapter_model.safetensors").stat().st_size <= distinct + 64 * 1024
    tensors = load_file(compact / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(f.parameters for f in adapter.pool.values())


def vllm_names(tensors):
    """As vLLM takes a checkpoint apart: by tensor names alone, anything it does not know stops it."""
    modules = []
    for name in tensors:
        parts = name.removeprefix("base_model.model.").split(".")
        if len(parts) < 3 or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{name} is unsupported LoRA weight")
        modules.append(".".join(parts[:-2]))
    return modules


def llama_cpp_names(tensors):
    """As llama.cpp's converter does."""
    modules = []
    for name in tensors:
        if ".lora_A.weight" in name or ".lora_B.weight" in name:
            modules.append(name.split(".lora_")[0].removeprefix("base_model.model."))
        elif ".base_layer.weight" not in name and "_layernorm" not in name and ".norm" not in name:
            raise ValueError(f"Unexpected name '{name}': Not a lora_A or lora_B tensor")
    return modules


@pytest.mark.parametrize("reader", [vllm_names, llama_cpp_names])
def test_a_reader_that_ignores_peft_type_stops_instead_of_skipping_shared_layers(reader, adapter, compact, expanded):
    tensors = load_file(compact / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lorapack\.shared\."):
        reader(tensors)
    plainly_named = [name for name in tensors if ".lora_A.weight" in name or ".lora_B.weight" in name]
    assert not {m for m in Q[1:] + UP[:2] if any(m in name for name in plainly_named)}
    assert set(reader(load_file(expanded / "adapter_model.safetensors"))) == set(adapter.modules)


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


# A process in which lorapack cannot be imported: what others see who have not installed it.
WITHOUT_LORAPACK = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "lorapack":
                raise ImportError("lorapack is not installed here")
    sys.meta_path.insert(0, Blocked())
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    import torch
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_lorapack_a_compact_adapter_is_refused_and_plain_ones_load(
    base, root, adapter, compact, expanded, tmp_path
):
    alone = packed(read_adapter(root / "plain"), {}, dropped=[K], cut={V: 2})
    write_adapter(alone, tmp_path / "alone")  # shares nothing: not compact, though not expanded either
    code = """
    import warnings
    warnings.simplefilter("error", UserWarning)  # a missing or unexpected tensor is a warning in PEFT
    try:
        PeftModel.from_pretrained(base, sys.argv[2])
        print("LOADED")
    except Exception as error:
        print("REFUSED", type(error).__name__, error)
    found = []
    for directory in sys.argv[3:5]:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), directory)
        with torch.no_grad():
            found.append(model(input_ids=torch.arange(2, 42).reshape(2, 20)).logits)
    torch.save(found, sys.argv[5])
    assert "lorapack" not in sys.modules
    """
    done = python(WITHOUT_LORAPACK + code, base, compact, expanded, tmp_path / "alone", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("REFUSED") and "LORAPACK" in done.stdout
    of_expanded, of_alone = torch.load(tmp_path / "logits.pt")
    assert_same(of_expanded, logits(PeftModel.from_pretrained(llama(), compact)))
    assert_same(of_alone, logits(naive(llama(), alone)).float(), 1e-5)


def test_importing_lorapack_is_light_and_the_order_of_imports_does_not_matter(base, compact):
    code = """
    import sys
    if sys.argv[1] != "peft first":
        import lorapack
        heavy = {"torch", "peft", "transformers", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        if sys.argv[1] == "only asked for":
            import importlib.util
            assert importlib.util.find_spec("peft") and importlib.util.find_spec("peft")
        import peft, transformers
    else:
        import peft, transformers, lorapack
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
    model.load_adapter(sys.argv[3])
    base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
    other = peft.PeftModel.from_pretrained(base, sys.argv[3]).get_base_model()
    for m in (model, other):
        first, last = (m.model.layers[n].self_attn.q_proj.lora_A["default"] for n in (1, 3))
        assert first.weight is last.weight
    print("fine")
    """
    for order in ("lorapack first", "only asked for", "peft first"):
        done = python(code, order, base, compact)
        assert (done.stdout, done.returncode) == ("fine\n", 0), (order, done.stderr)


def test_registering_again_changes_nothing(compact):
    from lorapack.plugin import peft, transformers

    peft.register()
    transformers.register()
    assert_same(logits(by_transformers(None, compact)), logits(by_peft(None, compact)))


def test_gpt2_with_its_transposed_layers(tmp_path):
    lora(gpt2(), tmp_path / "plain", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    members = [f"transformer.h.{n}.attn.c_attn" for n in range(2)]
    mlp = [f"transformer.h.{n}.mlp.c_proj" for n in range(2)]
    adapter = packed(read_adapter(tmp_path / "plain"), {"shared.c_attn": (3, members), "shared.mlp": (2, mlp)})
    write_adapter(adapter, tmp_path / "compact")
    model = PeftModel.from_pretrained(gpt2(), tmp_path / "compact").double()
    assert_tied(model, members)
    assert_same(logits(model), logits(naive(gpt2(), adapter)), 1e-12)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_bert_with_its_saved_classifier(way, tmp_path):
    source = bert()
    with torch.no_grad():
        source.classifier.weight += 1  # trained: not what the base has
    lora(source, tmp_path / "plain", target_modules=["query", "value"], task_type="SEQ_CLS")
    members = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(3)]
    adapter = packed(read_adapter(tmp_path / "plain"), {"shared.query": (4, members)})
    assert "base_model.model.classifier.weight" in adapter.carried
    write_adapter(adapter, tmp_path / "compact")
    if way == "peft":
        model = PeftModel.from_pretrained(bert(), tmp_path / "compact")
    else:
        model = bert()
        model.load_adapter(str(tmp_path / "compact"))
    assert_tied(model, members)
    expected = naive(bert(), adapter)
    expected.load_state_dict({n.removeprefix("base_model.model."): t for n, t in adapter.carried.items()}, strict=False)
    assert_same(logits(model.double()), logits(expected), 1e-10)
    model.save_pretrained(tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    assert again.groups == adapter.groups and again.carried.keys() == adapter.carried.keys()


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    lora(llama(), tmp_path / "plain", target_modules=TYPES, use_rslora=True, lora_alpha=3)
    plain = read_adapter(tmp_path / "plain")
    assert plain.scale(V) == pytest.approx(3 / 4**0.5)
    adapter = packed(plain, {"shared.q": (3, Q[1:])}, cut={V: 2})
    write_adapter(adapter, tmp_path / "compact")
    model = PeftModel.from_pretrained(llama(), tmp_path / "compact").double()
    assert_same(logits(model), logits(naive(llama(), adapter)), 1e-12)


def test_a_configuration_key_that_peft_does_not_know_does_no_harm(adapter, tmp_path):
    old = replace(adapter, config={**adapter.config, "enable_lora": None, "merge_weights": False})
    write_adapter(old, tmp_path / "old")
    assert_tied(PeftModel.from_pretrained(llama(), tmp_path / "old"), Q[1:])


class Named(nn.Module):
    """Linear layers under names that end in each other or hold characters special in regular expressions."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        torch.manual_seed(0)
        for name in names:
            parent = self
            *above, last = name.split(".")
            for part in above:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(6, 6))

    def forward(self, x):
        return sum(self.get_submodule(name)(x) for name in self.names)


NAMES = ["a.b", "x.a.b", "y.x.a.b", "a+b", "aab", "a(b", "c*[0]", "c", "x.c", "a-b|c", "a_b"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_module_gets_its_own_rank_and_scale_whatever_its_name_is(tmp_path_factory, data):
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    ranks = {name: data.draw(st.integers(1, 3), label=name) for name in names}
    scales = {name: data.draw(st.sampled_from([0.25, 1.0, 3.5]), label=name) for name in names}
    torch.manual_seed(0)
    pool = {name: Factors(torch.randn(rank, 6), torch.randn(6, rank)) for name, rank in ranks.items()}
    pointers = {name: Pointer(name, scales[name]) for name in names}
    out = tmp_path_factory.mktemp("named")
    put_adapter(Adapter({"peft_type": "LORA"}, pool, pointers, {}), out)
    model = PeftModel.from_pretrained(Named(NAMES), out).get_base_model()
    for name in names:
        layer = model.get_submodule(name)
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(scales[name], rel=1e-12)
        assert torch.equal(layer.lora_A["default"].weight, pool[name].A)
    x = torch.randn(5, 6)
    updates = sum(scales[n] * x @ pool[n].A.T @ pool[n].B.T for n in names)
    with torch.no_grad():
        assert_same(model(x), Named(NAMES)(x) + updates, 1e-4)  # what is not in the adapter adds nothing


# Damage: each is a function of the configuration and the tensors, and the words its refusal must hold.


def no_manifest(config, tensors):
    del config["lorapack"]


def unknown_version(config, tensors):
    config["lorapack"]["version"] = 2


def no_version(config, tensors):
    del config["lorapack"]["version"]


def ill_typed_groups(config, tensors):
    config["lorapack"]["shared"]["shared.q"] = "q_proj"


def group_without_tensors(config, tensors):
    del tensors["lorapack.shared.q.B"]


def tensors_of_no_group(config, tensors):
    tensors["lorapack.shared.stray.A"] = torch.zeros(2, 32)


def third_tensor_of_a_group(config, tensors):
    tensors["lorapack.shared.q.C"] = torch.zeros(2, 32)


def tensors_whose_group_the_manifest_lacks(config, tensors):
    del config["lorapack"]["shared"]["shared.q"]


def group_without_modules(config, tensors):
    config["lorapack"]["shared"]["shared.q"] = []


def module_with_shared_and_own_factors(config, tensors):
    tensors[f"base_model.model.{Q[1]}.lora_A.weight"] = torch.zeros(3, 32)
    tensors[f"base_model.model.{Q[1]}.lora_B.weight"] = torch.zeros(32, 3)


def module_in_two_groups(config, tensors):
    config["lorapack"]["shared"]["shared.up"].append(Q[1])


def module_twice_in_a_group(config, tensors):
    config["lorapack"]["shared"]["shared.up"].append(UP[0])


def group_name_that_is_no_name(config, tensors):
    config["lorapack"]["shared"]["../../x"] = config["lorapack"]["shared"].pop("shared.q")


def not_a_number(config, tensors):
    tensors["lorapack.shared.q.A"][0, 0] = float("nan")


def other_rank_than_the_configuration(config, tensors):
    tensors["lorapack.shared.q.A"] = torch.zeros(2, 32)
    tensors["lorapack.shared.q.B"] = torch.zeros(32, 2)


def ranks_that_do_not_meet(config, tensors):
    tensors["lorapack.shared.q.A"] = torch.zeros(2, 32)


def three_dimensions(config, tensors):
    tensors["lorapack.shared.q.A"] = torch.zeros(3, 32, 1)


def private_module_without_tensors(config, tensors):
    del tensors[f"base_model.model.{V}.lora_A.weight"], tensors[f"base_model.model.{V}.lora_B.weight"]


def private_module_with_half_its_tensors(config, tensors):
    del tensors[f"base_model.model.{V}.lora_B.weight"]


DAMAGE = {
    no_manifest: "lorapack",
    unknown_version: "version 2",
    no_version: "version None",
    ill_typed_groups: "shared.q",
    group_without_tensors: "lorapack.shared.q.B",
    tensors_of_no_group: "lorapack.shared.stray.A",
    third_tensor_of_a_group: "lorapack.shared.q.C",
    tensors_whose_group_the_manifest_lacks: "lorapack.shared.q.A",
    group_without_modules: "shared.q",
    module_with_shared_and_own_factors: f"{Q[1]} points to 'shared.q' and has factors of its own",
    module_in_two_groups: Q[1],
    module_twice_in_a_group: UP[0],
    group_name_that_is_no_name: "../../x",
    not_a_number: "shared.q",
    other_rank_than_the_configuration: Q[1],
    ranks_that_do_not_meet: "shared.q",
    three_dimensions: "shared.q",
    private_module_without_tensors: V,
    private_module_with_half_its_tensors: V,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_refused_by_name(damage, compact, tmp_path):
    directory = tmp_path / "damaged"
    shutil.copytree(compact, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    damage(config, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(InputError, match=re.escape(DAMAGE[damage])) as refusal:
        read_adapter(directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "damage",
    [
        no_manifest,
        unknown_version,
        group_without_tensors,
        tensors_of_no_group,
        module_in_two_groups,
        ranks_that_do_not_meet,
    ],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("way", [by_peft, by_transformers], ids=lambda way: way.__name__)
def test_peft_does_not_load_what_is_damaged(way, damage, compact, tmp_path):
    directory = tmp_path / "damaged"
    shutil.copytree(compact, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    damage(config, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises((InputError, RuntimeError)):
        way(None, directory)


# Round trips


SCALES = st.floats(-1e6, 1e6, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 2.0, 1 / 3])


@st.composite
def adapters(draw):
    """Random shapes, ranks, dtypes and scales; any modules of one shape may share."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def factors(shape):
        rank = draw(st.integers(1, 5))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        return Factors(
            torch.randn(rank, shape[1], generator=generator).to(dtype),
            torch.randn(shape[0], rank, generator=generator).to(dtype),
        )

    pool, modules = {}, {}
    for kind in draw(st.lists(st.sampled_from(["attn.q", "attn.k", "mlp.up", "head"]), min_size=1, unique=True)):
        shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        places = draw(st.lists(st.sampled_from([None, "s", "t"]), min_size=1, max_size=12))
        for layer, place in enumerate(places):
            module = f"layers.{layer}.{kind}"
            alone = place is None or places.count(place) == 1
            name = module if alone else f"shared.{kind}.{place}"
            if name not in pool:
                pool[name] = factors(shape)
            modules[module] = Pointer(name, draw(SCALES))
    carried = draw(st.sampled_from([{}, {"base_model.model.head.bias": torch.arange(3)}]))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "use_rslora": draw(st.booleans())}
    return Adapter(config, pool, modules, carried)


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_is_written_reads_back_equal(tmp_path_factory, adapter):
    out = tmp_path_factory.mktemp("round")
    put_adapter(adapter, out)
    found = read_adapter(out)
    assert_adapters_equal(found, adapter)
    assert found.groups == adapter.groups
    assert found.task_type == "CAUSAL_LM"
    assert digest(found) == digest(adapter)  # by which a report knows the tensors that it is about


@settings(max_examples=40, deadline=None)
@given(adapters())
def test_expanding_keeps_every_update_and_shares_nothing(tmp_path_factory, adapter):
    once, out = tmp_path_factory.mktemp("compact"), tmp_path_factory.mktemp("expanded")
    put_adapter(adapter, once)
    put_adapter(read_adapter(once), out, expand=True)
    found = read_adapter(out)
    assert_adapters_equal(found, adapter)
    assert not found.groups and found.config["peft_type"] == "LORA" and "lorapack" not in found.config


def test_writing_the_same_adapter_twice_gives_the_same_bytes(adapter, compact, tmp_path):
    write_adapter(read_adapter(compact), tmp_path / "again")
    assert sorted(p.name for p in compact.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())
    for path in compact.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_does_not_read_back_as_it_was_written_is_not_kept(adapter, tmp_path, monkeypatch):
    def bad_disk(tensors, path, metadata):
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name][0, 0] += 1e-3
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("lorapack.write.adapter.save_file", bad_disk)
    with pytest.raises(InputError, match="reads back differently"):
        write_adapter(adapter, tmp_path / "out", expand=True)  # expanding copies: the adapter is as it was
    assert list(tmp_path.iterdir()) == []


def test_the_public_names_are_there():
    for name in lorapack.__all__:
        assert getattr(lorapack, name) is not None
