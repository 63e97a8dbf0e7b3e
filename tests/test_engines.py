"""What `lorapack expand` writes for each engine, against the engine's rule in the plainest words.

The engines' own code is run by tests/engines, where its packages are there.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from serving import ADAPTERS, ALL, LAYERS, NO_EMBEDDINGS, SHAPES, adapter, assert_updates, update
from support import ADAPTER, BASE, edit, llama, refused, run

from lorapack import Adapter, Factors, InputError, Pointer, expand_adapter, read_adapter
from lorapack.engines import NAMES, rules
from lorapack.engines.arrange import times
from lorapack.engines.tgi import LEAST
from lorapack.engines.vllm import MAX_RANKS
from lorapack.errors import OutputError
from lorapack.write.expanded import prove

ROOT = Path(__file__).parent.parent
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    llama().save_pretrained(directory)
    return directory


def read(directory):
    """The configuration and the pairs of an expanded directory, with nothing of lorapack's."""
    tensors = load_file(directory / "adapter_model.safetensors")
    pairs = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor.double()
    return json.loads((directory / "adapter_config.json").read_text()), pairs


def by_patterns(config, pairs):
    """vLLM: scales and ranks as PEFT looks them up, each multiplied into its B."""
    found = {}
    for module, ab in pairs.items():
        ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
        rank = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
        assert rank == len(ab["A"])
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        found[module] = scale * ab["B"] @ ab["A"]
    return found


def by_one_scale(config, pairs):
    """SGLang: lora_alpha / r for all, every tensor of rank r, q beside v, k if there is any, gate beside up."""
    for module, ab in pairs.items():
        assert ab["A"].shape[0] == ab["B"].shape[1] == config["r"], module
        stem, part = module.rpartition(".")[::2]
        if part in ("q_proj", "k_proj", "v_proj"):
            assert {f"{stem}.q_proj", f"{stem}.v_proj"} <= pairs.keys()
            assert (f"{stem}.k_proj" in pairs) == any(m.endswith("k_proj") for m in pairs)
        assert part != "up_proj" or f"{stem}.gate_proj" in pairs
    return {module: config["lora_alpha"] / config["r"] * ab["B"] @ ab["A"] for module, ab in pairs.items()}


def by_stacks(gpus):
    """TGI on so many GPUs: layers of a type stacked or all dropped, and a padded rank replaces r for what follows."""

    def stacked(config, pairs):
        found, r = {}, config["r"]
        for kind in SHAPES:
            modules = [f"model.layers.{n}.{kind}" for n in range(LAYERS)]
            if not all(module in pairs for module in modules):
                continue
            ranks = {len(pairs[module]["A"]) for module in modules}
            assert len(ranks) == 1, "they do not stack"
            found |= {m: config["lora_alpha"] / r * pairs[m]["B"] @ pairs[m]["A"] for m in modules}
            (rank,) = ranks
            r = 8 * gpus if rank <= 8 * gpus else -(-rank // 16) * 16
        return found

    return stacked


def by_each_rank(config, pairs):
    """llama.cpp: one alpha in float32 over the rank of each tensor."""
    alpha = float(torch.tensor(config["lora_alpha"], dtype=torch.float32))
    return {module: alpha / len(ab["A"]) * ab["B"] @ ab["A"] for module, ab in pairs.items()}


RULES = {
    "vllm": by_patterns,
    "sglang": by_one_scale,
    "tgi": by_stacks(1),
    "tgi on 8 GPUs": by_stacks(8),
    "llama.cpp": by_each_rank,
}
CASES = [(rule, name) for rule in RULES for name in ADAPTERS if name in NO_EMBEDDINGS or not rule.startswith("tgi")]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_the_engine_computes_the_adapter(rule, name, base, tmp_path):
    expand_adapter(ADAPTERS[name], tmp_path / "out", rule.split()[0], base=base)
    assert_updates(RULES[rule](*read(tmp_path / "out")), ADAPTERS[name])


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", ["ranks and scales differ", "shared", "rsLoRA"])
def test_peft_computes_the_adapter_from_what_is_written_for_any_engine(engine, name, base, tmp_path):
    expand_adapter(ADAPTERS[name], tmp_path / "out", engine, base=base)
    model = PeftModel.from_pretrained(llama(), tmp_path / "out").get_base_model().double()
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert_updates({m: layer.get_delta_weight("default").detach() for m, layer in layers.items()}, ADAPTERS[name])


@pytest.mark.parametrize("rule", ["vllm", "llama.cpp"])
def test_what_is_written_for_sglang_means_the_same_to_engines_that_know_less_or_more(rule, base, tmp_path):
    expand_adapter(ADAPTERS["shared"], tmp_path / "out", "sglang", base=base)
    config, pairs = read(tmp_path / "out")
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert_updates(RULES[rule](config, pairs), ADAPTERS["shared"])


def test_where_an_engine_needs_nothing_the_tensors_keep_their_bytes(tmp_path):
    source = read_adapter(ADAPTER)
    for engine in ("peft", "vllm", "sglang", "llama.cpp"):
        expand_adapter(source, tmp_path / engine, engine)
        written = load_file(tmp_path / engine / "adapter_model.safetensors")
        original = load_file(ADAPTER / "adapter_model.safetensors")
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("scale", [1 / 3, 0.1, 7 / 5])
def test_one_scale_for_all_never_moves_into_b(engine, scale, base, tmp_path):
    source = adapter(ALL, ranks=(7, 3) if engine != "llama.cpp" else (3,), scales=(scale,), dtype=torch.bfloat16)
    expand_adapter(source, tmp_path / "out", engine, base=base)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module, factors in source.pool.items():
        b = written[f"{PREFIX}{module}.lora_B.weight"]
        assert b.dtype == torch.bfloat16 and torch.equal(b[:, : factors.rank], factors.B)


@given(st.floats(-1e4, 1e4, width=32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_scale_moved_into_b_is_exact_or_rounded_once_to_float32(number, dtype):
    b = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = times(Factors(torch.ones(3, 2, dtype=dtype), b), number).B
    exact = b.double() * number
    assert found.dtype in (dtype, torch.float32)
    assert (found.double() - exact).abs().max() <= 2**-24 * exact.abs().max() + 2**-149  # below it there is none
    if dtype is torch.bfloat16 and number in (2.0, -1.0, 0.5):
        assert found.dtype == dtype and torch.equal(found.double(), exact)


# What an engine cannot take


def with_factors(module, factors, **config):
    plain = adapter(ALL[:1], **config)
    return replace(plain, pool={**plain.pool, module: factors}, modules={**plain.modules, module: Pointer(module, 1.0)})


def linear(rank=2, d_in=4, d_out=4):
    return Factors(torch.ones(rank, d_in), torch.ones(d_out, rank))


CONV = with_factors("conv", Factors(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), "conv"))
TABLE = with_factors("model.embed_tokens", Factors(torch.ones(2, 9), torch.ones(4, 2), "embedding"))
BIAS = adapter(ALL, carried={f"{PREFIX}{ALL[0]}.base_layer.bias": torch.ones(32)}, bias="lora_only")
NORM = adapter(ALL, carried={f"{PREFIX}model.norm.weight": torch.ones(32)}, modules_to_save=["norm"])
ROWS = adapter(
    ALL, carried={f"{PREFIX}model.embed_tokens.weight": torch.ones(512, 32)}, modules_to_save=["embed_tokens"]
)
HEADS = adapter(
    ALL,
    carried={f"{PREFIX}{name}.weight": torch.ones(2, 32) for name in ("classifier", "score")},
    modules_to_save=["classifier", "score"],
)
DENSE = adapter(ALL, carried={f"{PREFIX}classifier.dense.weight": torch.ones(2, 32)}, modules_to_save=["classifier"])


def experts(ranks, stem="model.layers.0.mlp.experts"):
    pool = {f"{stem}.{name}": linear(rank) for name, rank in ranks.items()}
    return Adapter({"peft_type": "LORA"}, pool, {name: Pointer(name, 1.0) for name in pool}, {})


WHOLE = {f"{n}.{name}": 2 for n in range(3) for name in ("w1", "w2", "w3")}
GAP = experts({name: rank for name, rank in WHOLE.items() if not name.startswith("1")})
UNEVEN = experts({**WHOLE, "2.w3": 3})
PART = experts({name: rank for name, rank in WHOLE.items() if name[2:] != "w2"})
OUTSIDE = with_factors("model.projector", linear())
VISION = with_factors("vision.model.layers.0.self_attn.q_proj", linear(d_in=32, d_out=32))
GPT2 = with_factors("transformer.h.0.attn.c_attn", linear(), fan_in_fan_out=True)

REFUSED = [
    ("vllm", CONV, "no LoRA for conv, a convolution"),
    ("sglang", CONV, "no LoRA for conv, a convolution"),
    ("tgi", CONV, "no LoRA for conv, a convolution"),
    ("llama.cpp", CONV, "no LoRA for conv, a convolution"),
    ("tgi", TABLE, "no LoRA for model.embed_tokens, an embedding"),
    ("vllm", BIAS, "model.layers.0.self_attn.q_proj.base_layer.bias, a bias"),
    ("sglang", BIAS, "model.layers.0.self_attn.q_proj.base_layer.bias, a bias"),
    ("tgi", BIAS, "model.layers.0.self_attn.q_proj.base_layer.bias, a bias"),
    ("llama.cpp", BIAS, "model.layers.0.self_attn.q_proj.base_layer.bias, a bias"),
    ("vllm", NORM, "model.norm.weight, a whole tensor"),
    ("sglang", NORM, "model.norm.weight, a whole tensor"),
    ("tgi", NORM, "model.norm.weight, a whole tensor"),
    ("llama.cpp", NORM, "model.norm.weight, a whole tensor"),
    ("vllm", ROWS, "model.embed_tokens.weight, a whole tensor"),
    ("sglang", HEADS, "classifier.weight, a whole tensor"),
    ("vllm", HEADS, "one classification head, named in modules_to_save, not classifier"),
    ("vllm", DENSE, "classifier.dense.weight, a whole tensor"),
    ("vllm", adapter(ALL[:1], ranks=(513,)), "ranks up to 512, model.layers.0.self_attn.q_proj has 513"),
    ("vllm", GAP, "stacks all experts, and model.layers.0.mlp.experts.1.w1 has no LoRA"),
    ("vllm", PART, "stacks all experts, and model.layers.0.mlp.experts.0.w2 has no LoRA"),
    ("llama.cpp", UNEVEN, "stacks all experts, and model.layers.0.mlp.experts.2.w3 has rank 3, others 2"),
    ("sglang", GAP, "a layer named model.layers.0.mlp.experts.0.w1"),
    ("sglang", OUTSIDE, "a layer named model.projector"),
    ("tgi", VISION, "a layer named vision.model.layers.0.self_attn.q_proj"),
    ("sglang", GPT2, "a layer named transformer.h.0.attn.c_attn"),
    ("llama.cpp", GPT2, "transposes model.layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize(("engine", "adapter", "message"), REFUSED)
def test_what_an_engine_cannot_take_is_said_by_name_with_the_way_out(engine, adapter, message, base, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        expand_adapter(adapter, tmp_path / "out", engine, base=base)
    assert "`lorapack " in str(refusal.value) and "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_experts_of_equal_rank_are_taken(tmp_path):
    for engine in ("vllm", "llama.cpp"):
        expand_adapter(experts(WHOLE), tmp_path / engine, engine)


def test_one_classification_head_goes_to_vllm(tmp_path):
    head = {f"{PREFIX}score.weight": torch.ones(2, 32)}
    expand_adapter(adapter(ALL, carried=head, modules_to_save=["classifier", "score"]), tmp_path / "out", "vllm")
    assert torch.equal(
        load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{PREFIX}score.weight"], head.popitem()[1]
    )


# The base model's configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "has model.layers.3.mlp.down_proj, the base 3 layers"),
        ({"num_hidden_layers": ...}, "has no num_hidden_layers"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ],
)
def test_another_base_is_noticed(changes, message, base, tmp_path):
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        expand_adapter(adapter(ALL), tmp_path / "out", "tgi", base=tmp_path)


def test_shapes_that_only_the_base_can_tell_come_from_its_configuration(base, tmp_path):
    expand_adapter(ADAPTERS["only k"], tmp_path / "out", "sglang", base=base)
    _, pairs = read(tmp_path / "out")
    assert pairs["model.layers.2.self_attn.q_proj"]["B"].shape == (32, 4)
    assert pairs["model.layers.2.self_attn.v_proj"]["B"].shape == (16, 4)
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**config, "head_dim": 16}}))
    expand_adapter(ADAPTERS["only k"], tmp_path / "wide", "sglang", base=tmp_path)
    assert read(tmp_path / "wide")[1]["model.layers.2.self_attn.q_proj"]["B"].shape == (64, 4)
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(InputError, match=re.escape("does not say (")):
        expand_adapter(ADAPTERS["only k"], tmp_path / "no", "sglang", base=tmp_path)


# The command


def test_the_command_writes_for_an_engine_and_says_how_it_is_loaded(tmp_path):
    done = run("expand", ADAPTER, "-o", tmp_path / "out", "--for", "vllm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Wrote {tmp_path / 'out'} for vLLM {rules('vllm').version}",
        f"Load it with: vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules NAME={tmp_path / 'out'}",
    ]
    line = refused(run("expand", ADAPTER, "-o", tmp_path / "no", "--for", "tgi", "--base", "owner/nothing"))
    assert "name it with --base" in line.lower() and "owner/nothing" in line
    assert refused(run("expand", ADAPTER, "-o", tmp_path / "no", "--for", "tgi", "--as-vera"))
    done = run("expand", ADAPTER, "-o", tmp_path / "tgi", "--for", "tgi", "--base", BASE, "--verify")
    assert done.returncode == 0, done.stderr
    edit(tmp_path / "out" / "adapter_config.json", use_dora=True)
    line = refused(run("expand", tmp_path / "out", "-o", tmp_path / "no", "--for", "vllm"))
    assert "DoRA" in line and not (tmp_path / "no").exists()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_a_directory_that_the_engine_would_read_otherwise_does_not_pass(engine, tmp_path):
    source = ADAPTERS["one rank and scale"]
    expand_adapter(source, tmp_path / "out", engine)
    prove(source, engine, tmp_path / "out")
    edit(tmp_path / "out" / "adapter_config.json", lora_alpha=8.001)
    with pytest.raises(OutputError, match="reads back differently"):
        prove(source, engine, tmp_path / "out")


# The page


def test_the_page_names_the_versions_and_files_that_the_code_was_written_from():
    page = (ROOT / "docs" / "engines.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    table = page.partition("What each refuses")[0]
    rows = dict(re.findall(r"^\| (`[a-z.]+`) \| (.*?) \|", table, re.MULTILINE))
    assert rows.keys() == {f"`{name}`" for name in NAMES}
    for name in NAMES:
        engine = rules(name)
        assert rows[f"`{name}`"] == f"{engine.title} {engine.version}"
        assert all(f"`{source}`" in page for source in engine.sources), name
    allowed = ", ".join(map(str, MAX_RANKS[:-1]))
    assert f"`--max-lora-rank`: {allowed} or {MAX_RANKS[-1]}" in table and f"at least {LEAST} by zeros" in table
    for name in ("vllm", "sglang"):
        assert f"{name}=={rules(name).version}" in makefile
    assert f"peft=={rules('peft').version}" in (ROOT / "constraints.txt").read_text()


def test_updates_of_the_cases_are_far_from_zero():
    assert all(update(a, m).norm() > 0.1 for a in ADAPTERS.values() for m in a.modules if a.scale(m))
