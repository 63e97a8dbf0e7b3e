"""Reading adapters: what is found in the wild, what is damaged, and what is refused, each in one line."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import bert, edit, gpt2, llama, lora, refused, run
from torch import nn

from lorapack import InputError, read_adapter, write_adapter
from lorapack.core.checked import parse_value
from lorapack.hub import find_adapter
from lorapack.read.config import LoraSettings

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def checkpoint(directory, config, modules, rank=8, shape=(6, 5), carried=(), dtype=torch.float32):
    """A directory with this configuration and, for each module, factors that fit it."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator).to(dtype)
    tensors |= {name: torch.ones(2, 2) for name in carried}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def refusal(source, *needles):
    """What `read_adapter` says of it: one line that holds the needles."""
    with pytest.raises(InputError) as found:
        read_adapter(source)
    message = str(found.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message
    return message


LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
HEAD = ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]

# Configurations as they are found in public repositories, the telling keys of each; the module they
# act on, and what is to be read from them.
FOUND = {
    "a list of targets": ({**LORA, "target_modules": ["q_proj", "v_proj"]}, Q0, {}),
    "saved modules, one named twice": (
        {**LORA, "modules_to_save": ["pre_classifier", "classifier", "classifier", "score"], "task_type": "SEQ_CLS"},
        "distilbert.transformer.layer.0.attention.q_lin",
        {"task_type": "SEQ_CLS", "carried": HEAD},
    ),
    "token classification": (
        {**LORA, "modules_to_save": ["classifier", "score"], "task_type": "TOKEN_CLS"},
        Q0,
        {"task_type": "TOKEN_CLS", "carried": HEAD},
    ),
    "fan_in_fan_out": (
        {**LORA, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
        "transformer.h.0.attn.c_attn",
        {},
    ),
    "targets as a regular expression, gaussian start, still in training": (
        {
            **LORA,
            "target_modules": "(.*(language_model).*(down_proj|q_proj).*$|.*(custom_text_proj).*$)",
            "init_lora_weights": "gaussian",
            "inference_mode": False,
            "task_type": "FEATURE_EXTRACTION",
        },
        "language_model.model.layers.0.self_attn.q_proj",
        {"task_type": "FEATURE_EXTRACTION"},
    ),
    "keys of 2023": (
        {**LORA, "enable_lora": None, "merge_weights": False, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"},
        Q0,
        {"base_model": "meta-llama/Llama-2-7b-hf"},
    ),
    "no rank_pattern, no base model": (
        {**LORA, "base_model_name_or_path": None, "lora_dropout": 0.1, "modules_to_save": None},
        Q0,
        {"base_model": None},
    ),
    "rank one": ({**LORA, "r": 1, "lora_alpha": 32}, "gpt_neox.layers.0.attention.query_key_value", {"scale": 32.0}),
    "rank patterns that are null": ({**LORA, "rank_pattern": None, "alpha_pattern": None}, Q0, {}),
    "rank-stabilised": ({**LORA, "r": 64, "lora_alpha": 64, "use_rslora": True}, Q0, {"scale": 8.0}),
    "mica start": ({**LORA, "init_lora_weights": "mica", "r": 32, "lora_alpha": 64, "target_modules": None}, Q0, {}),
    "a UNet with dotted targets and no base model": (
        {
            **LORA,
            "r": 16,
            "lora_alpha": 40,
            "base_model_name_or_path": None,
            "task_type": None,
            "target_modules": ["to_q", "0.proj_in", "to_out.0"],
            "auto_mapping": {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets"},
        },
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        {"scale": 2.5, "task_type": None, "base_model": None},
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_configurations_as_they_are_found_are_read_right(case, tmp_path):
    config, module, expected = FOUND[case]
    directory = checkpoint(tmp_path / "a", config, [module], config["r"], carried=expected.get("carried", ()))
    adapter = read_adapter(directory)
    assert list(adapter.modules) == [module]
    assert adapter.factors(module).rank == config["r"] and adapter.factors(module).shape == (6, 5)
    assert adapter.scale(module) == expected.get("scale", 2.0)
    assert adapter.task_type == expected.get("task_type", "CAUSAL_LM")
    assert adapter.base_model == expected.get("base_model")
    assert set(adapter.carried) == set(expected.get("carried", ()))
    write_adapter(adapter, tmp_path / "again")
    assert read_adapter(tmp_path / "again").scale(module) == adapter.scale(module)


NOT_LORA = ["BOFT", "IA3", "LOHA", "LOKR", "VERA", "ADALORA", "PROMPT_TUNING", "lora", 7]
REFUSED = {
    **{str(kind): ({"peft_type": kind, "r": 8}, repr(kind)) for kind in NOT_LORA},
    "no peft_type": ({"base_model": "lerobot/smolvla_base"}, "no peft_type"),
    "block-diagonal": ({**LORA, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o_proj"]}}, "block-diagonal"),
    "DoRA": ({**LORA, "use_dora": True}, "DoRA"),
    "KaSA": ({**LORA, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "KaSA"),
    "lora_bias": ({**LORA, "lora_bias": True}, "lora_bias"),
    "layer_replication": ({**LORA, "layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
    "target_parameters": ({**LORA, "target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "QALoRA": ({**LORA, "use_qalora": True}, "QALoRA"),
    "activated LoRA": ({**LORA, "alora_invocation_tokens": [1, 2]}, "alora"),
    "loralib's merged projections": ({**LORA, "enable_lora": [True, False, True]}, "enable_lora"),
    "PiSSA": ({**LORA, "init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
    "OLoRA": ({**LORA, "init_lora_weights": "olora"}, "changed the base weights"),
    "LoftQ": ({**LORA, "init_lora_weights": "loftq"}, "changed the base weights"),
    "a rank of zero": ({**LORA, "r": 0}, "r is 0"),
    "a rank that is a word": ({**LORA, "r": "many"}, "r:"),
    "an alpha that is no number": ({**LORA, "lora_alpha": float("nan")}, "lora_alpha"),
    "an infinite alpha": ({**LORA, "alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern"),
    "a rank pattern that is a list": ({**LORA, "rank_pattern": ["q_proj"]}, "rank_pattern"),
    "a rank pattern that is no regular expression": ({**LORA, "rank_pattern": {"q_(proj": 8}}, "q_(proj"),
    "an alpha pattern that is no regular expression": ({**LORA, "alpha_pattern": {"*": 8}}, "'*'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_right_is_refused_with_the_reason(case, tmp_path):
    config, reason = REFUSED[case]
    refusal(checkpoint(tmp_path / "a", config, [Q0]), "adapter_config.json", reason)


def test_a_magnitude_vector_is_dora_whatever_the_configuration_says(tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0], carried=[f"{PREFIX}{Q0}.lora_magnitude_vector"])
    refusal(directory, "DoRA", Q0)


def test_dora_as_peft_saves_it_is_refused(tmp_path):
    refusal(lora(llama(), tmp_path / "a", target_modules=["q_proj"], use_dora=True), "use_dora")


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_are_those_peft_would_use(rslora, tmp_path):
    settings = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "rank_pattern": {
            "q_proj": 2,
            r"layers\.1\.self_attn\.v_proj": 3,
            r"^model\.layers\.[02].*k_proj": 5,
            "proj": 9,
        },
        "alpha_pattern": {r"layers.1.self_attn.q_proj": 7, "up_proj": 1.5, r"self_attn\.(q|v)_proj": 3, "k_pro": 99},
        "use_rslora": rslora,
    }
    adapter = read_adapter(lora(llama(), tmp_path / "a", **settings))
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").get_base_model()
    assert len(adapter.modules) == 16
    for module in adapter.modules:
        layer = model.get_submodule(module)
        assert adapter.factors(module).rank == layer.r["default"], module
        assert adapter.scale(module) == pytest.approx(layer.scaling["default"], rel=1e-15), module
    assert len({adapter.scale(m) for m in adapter.modules}) >= 5


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.point(self.conv(x)).mean((2, 3)))


def carried_over(directory, out):
    """Every tensor must come back under its name with the same bytes."""
    before = load_file(directory / "adapter_model.safetensors")
    write_adapter(read_adapter(directory), out)
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    return before


def test_convolutions_are_carried_untouched(tmp_path):
    directory = lora(Convolutions(), tmp_path / "a", target_modules=["conv", "point", "head"], task_type=None)
    adapter = read_adapter(directory)
    assert adapter.linear == ["head"]
    assert adapter.factors("conv").kind == "conv"
    carried_over(directory, tmp_path / "b")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before, after = (PeftModel.from_pretrained(Convolutions(), tmp_path / name)(x) for name in "ab")
    assert torch.equal(before, after)


def test_embedding_lora_is_carried_untouched(tmp_path):
    directory = lora(llama(), tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    adapter = read_adapter(directory)
    assert adapter.factors("model.embed_tokens").kind == "embedding"
    assert "model.embed_tokens" not in adapter.linear and len(adapter.linear) == 4
    before = carried_over(directory, tmp_path / "b")
    assert any("lora_embedding_A" in name for name in before)
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        one, two = (PeftModel.from_pretrained(llama(), tmp_path / name)(input_ids=ids).logits for name in "ab")
    assert torch.equal(one, two)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_carried_untouched(bias, tmp_path):
    directory = lora(bert(), tmp_path / "a", target_modules=["query"], bias=bias, task_type="SEQ_CLS")
    before = carried_over(directory, tmp_path / "b")
    assert any(name.endswith(("query.bias", "base_layer.bias")) for name in before), list(before)


def test_saved_modules_are_carried_untouched(tmp_path):
    directory = lora(bert(), tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
    adapter = read_adapter(directory)
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(adapter.carried)
    carried_over(directory, tmp_path / "b")


def test_an_integer_tensor_is_carried_untouched(tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0])
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.model.position_ids"] = torch.arange(7)
    save_file(tensors, directory / "adapter_model.safetensors")
    carried_over(directory, tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0], dtype=dtype)
    carried_over(directory, tmp_path / "b")
    assert read_adapter(tmp_path / "b").factors(Q0).A.dtype == dtype


def test_gpt2_factors_have_peft_s_orientation(tmp_path):
    adapter = read_adapter(lora(gpt2(), tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True))
    assert adapter.factors("transformer.h.0.attn.c_attn").shape == (96, 32)


def test_a_bin_file_is_read_like_safetensors(tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0])
    expected = read_adapter(directory)
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    assert torch.equal(read_adapter(directory).factors(Q0).A, expected.factors(Q0).A)
    assert torch.equal(read_adapter(directory).factors(Q0).B, expected.factors(Q0).B)


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["torch.save", "plain pickle"])
def test_a_bin_file_that_holds_code_is_refused_and_nothing_runs(how, tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0])
    (directory / "adapter_model.safetensors").unlink()
    target, file = tmp_path / "exploded", directory / "adapter_model.bin"
    state = {f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(8, 5), "x": Bomb(target)}
    if how == "torch.save":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps({"x": Bomb(target)}))
    refusal(directory, "adapter_model.bin", "nothing in it was executed")
    refusal(file, "nothing in it was executed")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb must be a real one"


def test_a_bin_file_with_other_things_than_tensors_is_refused(tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0])
    (directory / "adapter_model.safetensors").unlink()
    torch.save({"state": {"x": torch.zeros(1)}, "epoch": 3}, directory / "adapter_model.bin")
    refusal(directory, "adapter_model.bin", "something else than named tensors")


# Damage. Each function gets a good directory and spoils it.

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:fd6abf95832c2a085eec96aff4a98a45d21ea251\nsize 1049\n"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def damaged_tensors(change):
    def spoil(directory):
        tensors = load_file(directory / FILE)
        change(tensors)
        save_file(tensors, directory / FILE)

    return spoil


def header_longer_than_the_file(directory):
    (directory / FILE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def cut_off(directory):
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(whole[:-100])


def cut_off_in_the_header(directory):
    (directory / FILE).write_bytes((directory / FILE).read_bytes()[:60])


def header_that_is_no_json(directory):
    (directory / FILE).write_bytes(struct.pack("<Q", 16) + b"\xff" * 16)


A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
DAMAGE = {
    "no configuration": (lambda d: (d / CONFIG).unlink(), [CONFIG]),
    "no tensors": (lambda d: (d / FILE).unlink(), [FILE, "adapter_model.bin"]),
    "a configuration that is a Git LFS pointer": (lambda d: (d / CONFIG).write_text(LFS), [CONFIG, "Git LFS pointer"]),
    "tensors that are a Git LFS pointer": (lambda d: (d / FILE).write_text(LFS), [FILE, "Git LFS pointer"]),
    "a configuration that is no JSON": (
        lambda d: (d / CONFIG).write_text('{"r": 8,\n'),
        [CONFIG, "not JSON", "line 2"],
    ),
    "a configuration nested too deep": (lambda d: (d / CONFIG).write_text("[" * 100_000), [CONFIG, "not JSON"]),
    "a configuration with an endless number": (
        lambda d: (d / CONFIG).write_text('{"r": ' + "9" * 5000 + "}"),
        [CONFIG],
    ),
    "a configuration that is a list": (lambda d: (d / CONFIG).write_text("[]"), [CONFIG, "list"]),
    "a configuration that is not text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), [CONFIG, "UTF-8"]),
    "a configuration that is a directory": (
        lambda d: ((d / CONFIG).unlink(), (d / CONFIG).mkdir()),
        [CONFIG, "cannot be read"],
    ),
    "an empty configuration": (lambda d: (d / CONFIG).write_text(""), [CONFIG, "not JSON"]),
    "an empty file": (lambda d: (d / FILE).write_bytes(b""), [FILE, "empty or cut off"]),
    "a file that is cut off": (cut_off, [FILE, "cut off", "header wants"]),
    "a file cut off in its header": (cut_off_in_the_header, [FILE, "cut off"]),
    "a header longer than the file": (header_longer_than_the_file, [FILE, "1,099,511,627,776"]),
    "a header that is no JSON": (header_that_is_no_json, [FILE, "no valid safetensors"]),
    "a missing B": (damaged_tensors(lambda t: t.pop(B)), [FILE, Q0, "no lora_B"]),
    "a missing A": (damaged_tensors(lambda t: t.pop(A)), [FILE, Q0, "no lora_A"]),
    "no LoRA at all": (damaged_tensors(lambda t: (t.clear(), t.update(x=torch.zeros(1)))), [FILE, "no LoRA tensors"]),
    "another rank than the configuration's": (lambda d: edit(d / CONFIG, r=4), [FILE, Q0, "rank 8", "4"]),
    "ranks that do not meet": (damaged_tensors(lambda t: t.update({B: torch.zeros(6, 7)})), [FILE, Q0, "8", "7"]),
    "a NaN": (damaged_tensors(lambda t: t[A].__setitem__((0, 0), float("nan"))), [FILE, A, "NaN"]),
    "an infinite number": (damaged_tensors(lambda t: t[B].__setitem__((0, 0), float("inf"))), [FILE, B, "infinite"]),
    "factors quantised to eight bits": (damaged_tensors(lambda t: t.update({A: t[A].to(torch.int8)})), [Q0, "int8"]),
    "an empty factor": (damaged_tensors(lambda t: t.update({A: torch.zeros(8, 0)})), [FILE, Q0, "empty"]),
    "a factor of one dimension": (damaged_tensors(lambda t: t.update({A: torch.zeros(8)})), [FILE, Q0, "1 and 2"]),
    "a name without PEFT's prefix": (
        damaged_tensors(lambda t: [t.update({n.removeprefix(PREFIX): t.pop(n)}) for n in list(t)]),
        [FILE, Q0, PREFIX],
    ),
    "a third kind of LoRA tensor": (
        damaged_tensors(lambda t: t.update({f"{PREFIX}{Q0}.lora_E": torch.zeros(8, 1)})),
        [FILE, "lora_E"],
    ),
    "a name that is kept with its adapter": (
        damaged_tensors(lambda t: t.update({f"{PREFIX}{Q0}.lora_A.default.weight": t.pop(A)})),
        [FILE, "lora_A.default"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line_that_says_where(case, tmp_path):
    directory = checkpoint(tmp_path / "a", LORA, [Q0, "model.layers.1.self_attn.q_proj"])
    spoil, needles = DAMAGE[case]
    spoil(directory)
    refusal(directory, str(directory), *needles)


def test_a_directory_that_is_not_there_is_said_so(tmp_path):
    refusal(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


FOREIGN = {
    "kohya": ({"lora_unet_mid.lora_down.weight": (4, 8), "lora_unet_mid.lora_up.weight": (8, 4)}, "kohya/diffusers"),
    "diffusers": (
        {"unet.mid.to_q.lora_down.weight": (4, 8), "unet.mid.to_q.lora_up.weight": (8, 4)},
        "kohya/diffusers",
    ),
    "cloneofsimo": ({"text_encoder:0:up": (8, 4), "unet:0:down": (4, 8)}, "cloneofsimo"),
    "loralib": ({"encoder.0.self.query.lora_A": (4, 8), "encoder.0.self.query.lora_B": (8, 4)}, "loralib"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_single_files_of_other_tools_are_refused_by_their_name(name, ending, tmp_path):
    shapes, called = FOREIGN[name]
    tensors = {n: torch.zeros(shape) for n, shape in shapes.items()}
    path = tmp_path / "there" / f"weights.{ending}"
    path.parent.mkdir()
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    refusal(path, str(path), called)
    refusal(path.parent, str(path.parent), CONFIG, called)


# Hub ids, offline, from a cache as the Hub's own client leaves it.

SHA, OLDER = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """HF_HOME with somebody/adapter: main of rank 8, the tag v1 of rank 4."""
    home = tmp_path_factory.mktemp("hf")
    repository = home / "hub" / "models--somebody--adapter"
    (repository / "refs").mkdir(parents=True)
    for reference, sha, rank in (("main", SHA, 8), ("v1", OLDER, 4)):
        (repository / "refs" / reference).write_text(sha)
        checkpoint(repository / "snapshots" / sha, {**LORA, "r": rank, "lora_alpha": rank}, [Q0], rank)
    return home


def test_a_hub_id_is_read_from_the_cache(cache):
    done = run("inspect", "somebody/adapter", "--json", HF_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["types"][0]["ranks"] == "8"


def test_a_revision_is_read_from_the_cache(cache):
    done = run("inspect", "somebody/adapter", "--json", "--revision", "v1", HF_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["types"][0]["ranks"] == "4"


def test_an_id_that_is_not_in_the_cache_is_one_line(cache):
    line = refused(run("inspect", "nobody/nothing", HF_HOME=str(cache)))
    assert "nobody/nothing" in line and "not in the Hub cache" in line


def test_a_revision_of_a_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="--revision is for adapters on the Hub"):
        find_adapter(tmp_path, "main")


@pytest.mark.parametrize("source", ["../x/y", "a/b/c", "x", "owner/../name", "~/adapter"])
def test_what_is_no_hub_id_is_taken_for_a_path(source):
    assert find_adapter(source) == Path(source)


def test_nothing_of_the_input_is_changed_by_reading_and_writing(tmp_path):
    directory = lora(llama(), tmp_path / "a", target_modules=["q_proj"])
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()}
    adapter = read_adapter(directory)
    write_adapter(adapter, tmp_path / "b", expand=True)
    write_adapter(adapter, tmp_path / "c")
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()}


def test_an_adapter_that_peft_just_made_reads_back_equal_to_the_model(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    state = model.state_dict()
    assert len(adapter.modules) == 8
    for module in adapter.modules:
        assert torch.equal(adapter.factors(module).A, state[f"{PREFIX}{module}.lora_A.default.weight"])
        assert torch.equal(adapter.factors(module).B, state[f"{PREFIX}{module}.lora_B.default.weight"])
    assert [m for m in adapter.modules if re.search(r"q_proj", m)] == [
        f"model.layers.{n}.self_attn.q_proj" for n in range(4)
    ]


LEAVES = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3)
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(max_size=2), LEAVES, max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*LoraSettings.__dataclass_fields__, "other"]), VALUES, max_size=3))
def test_settings_are_what_pydantic_makes_of_them(value):
    try:
        wanted = pydantic.TypeAdapter(LoraSettings).validate_python(value)
    except pydantic.ValidationError:
        with pytest.raises(InputError):
            parse_value(LoraSettings, value, "here")
    else:
        assert repr(parse_value(LoraSettings, value, "here")) == repr(wanted)
