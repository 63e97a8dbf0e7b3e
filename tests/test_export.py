"""Exports to ONNX: what ONNX Runtime says is what PEFT says, shared factors stay one tensor, the rest is refused."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from peft import PeftModel
from support import BASE, bert, edit, gpt2, llama, lora, refused, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.errors import GateError, InputError
from lorapack.export.cache import cached
from lorapack.export.check import verify
from lorapack.export.export import export_adapter, export_further
from lorapack.export.graph import Weight, record
from lorapack.export.job import read_job
from lorapack.export.record import read_record
from lorapack.export.trace import Part, trace
from lorapack.export.verify import Session
from lorapack.read import read_adapter
from lorapack.write import write_adapter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=layers)
    )


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=3))


def mpnet():
    return MPNetForTokenClassification(MPNetConfig(**SMALL, num_labels=5))


def embedding():
    return BertModel(BertConfig(**SMALL))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


HEAD = {"modules_to_save": ["classifier"]}
MODELS = {
    "llama": (lambda: llama(2), {"target_modules": LINEAR}),
    "gemma3": (gemma3, {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "lora_only", **HEAD}),
    "roberta": (roberta, {"target_modules": ["query"], "task_type": "SEQ_CLS", **HEAD}),
    "mpnet": (mpnet, {"target_modules": ["q", "v"], "task_type": "TOKEN_CLS", **HEAD}),
    "embedding": (embedding, {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
    "t5": (t5, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A graph cache of the tests' own, which they share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def made(model, path: Path, **settings) -> tuple[Path, Path]:
    """A base with a tokenizer, and a random LoRA for it."""
    model.save_pretrained(path / "base")
    with_tokenizer(path / "base")
    return path / "base", lora(model, path / "adapter", **settings)


def with_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A Llama, an adapter on all its linear layers, and both exported apart, unchecked."""
    path = tmp_path_factory.mktemp("small")
    base, adapter = made(llama(2), path, target_modules=LINEAR)
    export_adapter(adapter, path / "out", base, separate=True, verify=False)
    return path


def session(path: Path):
    return onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])


def logits(session, ids, adapter: Path | None = None):
    """What a decoder says of whole rows, without a cache."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        active = onnxruntime.LoraAdapter()
        active.Load(str(adapter))
        options.add_active_adapter(active)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros([len(ids), value.shape[1], 0, value.shape[3]], np.float32)
    return session.run(["logits"], feeds, options)[0]


def pefts(base: Path, adapter: Path | None, ids):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


IDS = np.arange(24).reshape(2, 12) * 7 % 512


@pytest.mark.parametrize(("model", "settings"), MODELS.values(), ids=MODELS)
def test_merged_and_separate_exports_say_what_torch_says(tmp_path, model, settings):
    torch.manual_seed(0)
    base, adapter = made(model(), tmp_path, **settings)
    for separate in (False, True):
        done = export_adapter(adapter, tmp_path / f"{separate}", base, separate=separate)
        base_too = {"base"} if not any(done.carried.values()) else set()  # a base without its head says nothing
        assert done.verification.keys() == ({"adapter"} | base_too if separate else {"merged"})
        for figures in done.verification.values():
            assert figures["largest"] <= 1e-5 * max(figures["scale"], 0.1)
            assert figures["equal"] == figures["decisions"]
            assert figures["numbers"] >= 10 and max(figures["lengths"]) >= 64 and 1 in figures["lengths"]


def test_a_decoder_is_pefts_with_a_cache_of_any_length(small):
    """Independent of the exporter's own check: whole rows at once, token by token, and with padding in front."""
    wanted = pefts(small / "base", small / "adapter", IDS)
    whole = session(small / "out")
    np.testing.assert_allclose(logits(whole, IDS, small / "out" / "model.onnx_adapter"), wanted, atol=1e-5)
    step = Session(small / "out" / "model.onnx")
    step.activate(small / "out")
    past: dict = {}
    for n in range(IDS.shape[1]):
        feeds = {"input_ids": IDS[:, n : n + 1], "attention_mask": np.ones((2, n + 1), np.int64)}
        found = step({**feeds, "position_ids": np.full((2, 1), n), **past})
        np.testing.assert_allclose(found["logits"][:, 0], wanted[:, n], atol=1e-5)
        past = {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
    padded = np.pad(IDS, ((0, 0), (3, 0)))
    mask = np.pad(np.ones_like(IDS), ((0, 0), (3, 0)))
    found = step({"input_ids": padded, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)})
    np.testing.assert_allclose(found["logits"][:, 3:], wanted, atol=1e-5)


def test_one_session_serves_the_base_and_adapters_of_different_ranks(small, tmp_path):
    other = lora(llama(2), tmp_path / "other", seed=1, r=2, target_modules=["q_proj", "down_proj"])
    done = export_further(other, tmp_path / "further", small / "out", small / "base")
    assert done.verification["adapter"]["largest"] < 1e-5
    one = session(small / "out")
    for adapter, file in (
        (None, None),
        (small / "adapter", small / "out" / "model.onnx_adapter"),
        (other, tmp_path / "further" / "model.onnx_adapter"),
        (None, None),
    ):
        wanted = pefts(small / "base", adapter, IDS)
        np.testing.assert_allclose(logits(one, IDS, file), wanted, atol=1e-5)
    assert np.abs(pefts(small / "base", other, IDS) - pefts(small / "base", None, IDS)).max() > 0.01


@pytest.mark.parametrize("hidden", [64, 256, 1024, 2048])
def test_a_shared_pair_of_factors_is_one_entry_at_every_size(tmp_path, hidden):
    """The sizes at which a folding exporter would make a copy for every module."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, **heads)
    )
    base, adapter = made(model, tmp_path, target_modules=["q_proj", "up_proj"])
    found = read_adapter(adapter)
    first, second = (f"model.layers.{n}.mlp.up_proj" for n in (0, 1))
    pointers = {**found.modules, second: Pointer(found.modules[first].factors, 0.5)}
    compact = found.with_pool({p.factors: found.pool[p.factors] for p in pointers.values()}, pointers)
    write_adapter(compact, tmp_path / "compact")
    export_adapter(tmp_path / "compact", tmp_path / "out", base, separate=True, verify=False)
    tensors = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "out" / "model.onnx_adapter")).get_parameters()
    group = read_record(tmp_path / "out").slots["model.onnx"][second].factors
    query = "model.layers.{}.self_attn.q_proj.lora_{}"
    assert tensors.keys() == {
        *(f"{group}.lora_{part}" for part in "AB"),
        *(query.format(layer, part) for layer in (0, 1) for part in "AB"),
        *(f"{module}.lora_scale" for module in (first, second)),
    }
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert {name for name in graph.initializers if ".lora_" in name} == tensors.keys()
    assert len(graph.initializers[f"{group}.lora_A"].uses()) == 2
    stored = sum(t.nbytes for f in compact.pool.values() for t in (f.A, f.B))
    assert sum(value.numpy().nbytes for value in tensors.values()) == stored + 8  # two scales
    ids = IDS % 64
    write_adapter(compact, tmp_path / "plain", expand=True)
    wanted = pefts(base, tmp_path / "plain", ids)
    np.testing.assert_allclose(
        logits(session(tmp_path / "out"), ids, tmp_path / "out" / "model.onnx_adapter"), wanted, atol=1e-4
    )


@pytest.mark.parametrize("core", ["diagonal", "full"])
def test_cores_and_output_vectors_are_inputs_beside_the_shared_factors(small, tmp_path, core):
    """Tied-LoRA and VeRA: one pair for all layers, and little of each layer's own."""
    torch.manual_seed(0)
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    own = [(torch.randn(4, 4) if core == "full" else torch.randn(4), torch.randn(32)) for _ in modules]
    config = {**json.loads((small / "adapter" / "adapter_config.json").read_text()), "target_modules": modules}
    adapter = Adapter(
        config,
        {"tied": Factors(torch.randn(4, 32), torch.randn(32, 4))},
        {m: Pointer("tied", 0.3, *tensors) for m, tensors in zip(modules, own, strict=True)},
        {},
    )
    write_adapter(adapter, tmp_path / "tied")
    done = export_adapter(tmp_path / "tied", tmp_path / "out", small / "base", separate=True)
    assert done.verification["adapter"]["largest"] < 1e-5 * max(1, done.verification["adapter"]["scale"])
    names = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "out" / "model.onnx_adapter")).get_parameters()
    assert names.keys() == {"tied.lora_A", "tied.lora_B"} | {
        f"{m}.lora_{p}" for m in modules for p in ("core", "output")
    }


def test_sixteen_and_eight_bits(small, tmp_path):
    sizes = {}
    for dtype in ("fp32", "fp16", "int8"):
        done = export_adapter(small / "adapter", tmp_path / dtype, small / "base", dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.onnx.data").stat().st_size
        assert done.verification["merged"]["largest"] < {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.2}[dtype]
    assert sizes["fp16"] < 0.52 * sizes["fp32"] and sizes["int8"] < 0.5 * sizes["fp32"]
    with pytest.raises(InputError, match="choose fp32 or fp16"):
        export_adapter(small / "adapter", tmp_path / "out", small / "base", dtype="int8", separate=True)


def test_the_check_finds_a_weight_that_is_not_the_models(small, tmp_path):
    shutil.copytree(small / "out", tmp_path / "out")
    (tmp_path / "work").mkdir()
    job = read_job(small / "adapter", small / "base", None, "fp32", tmp_path / "work", in_memory=True)
    record = read_record(tmp_path / "out")
    assert verify(job, job.adapter, record, tmp_path / "out", tmp_path / "out")["base"]["largest"] < 1e-5
    with open(tmp_path / "out" / "model.onnx.data", "r+b") as file:
        file.seek(512 * 32 * 4)  # behind the embeddings
        file.write(np.full(64, 0.5, np.float32).tobytes())
    with pytest.raises(GateError, match="differs from torch by"):
        verify(job, job.adapter, record, tmp_path / "out", tmp_path / "out")


def test_a_head_that_only_the_adapter_has_is_exported_with_its_labels(tmp_path):
    model = bert(labels=5)
    model.bert.save_pretrained(tmp_path / "headless")
    base, adapter = made(model, tmp_path, target_modules=["query"], task_type="SEQ_CLS", **HEAD)
    with_tokenizer(tmp_path / "headless")
    export_adapter(adapter, tmp_path / "one", base)
    export_adapter(adapter, tmp_path / "two", tmp_path / "headless")
    one, two = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(json.loads((tmp_path / "two" / "config.json").read_text())["id2label"]) == 5


def test_no_link_is_written_and_the_texts_come_along(small, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (small / "base").iterdir():
        (linked / path.name).symlink_to(path)
    (linked / "code.py").write_text("print()")
    export_adapter(small / "adapter", tmp_path / "out", linked, verify=False)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"}
    assert "code.py" not in left and not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    for value in ir.load(tmp_path / "out" / "model.onnx").graph.initializers.values():
        assert getattr(value.const_value, "location", "model.onnx.data") == "model.onnx.data"
    assert str(Path.home()).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"site-packages" not in (tmp_path / "out" / "model.onnx").read_bytes()


def test_a_kept_graph_is_used_again_and_a_damaged_one_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = []

    def make():
        times.append(1)
        value = ir.Value(name="w", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("Identity", [value])
        model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
        record(model, {"w": Weight(["w"], False)})
        return {"model.onnx": model}

    config = {"model_type": "llama", "transformers_version": "5.0"}
    for n, (asked, kind) in enumerate(
        [(config, "fp32"), (config, "fp32"), ({**config, "a": 1}, "fp32"), (config, "fp16")]
    ):
        cached(asked, "CAUSAL_LM", kind, make)
        assert len(times) == (1, 1, 2, 3)[n]
    cached({**config, "transformers_version": "5.1"}, "CAUSAL_LM", "fp32", make)
    assert len(times) == 3
    for path in tmp_path.rglob("model.onnx"):
        path.write_bytes(path.read_bytes()[:10])
    assert cached(config, "CAUSAL_LM", "fp32", make)["model.onnx"].graph.inputs[0].name == "w"
    assert len(times) == 4
    cached(config, "CAUSAL_LM", "fp32", make)
    assert len(times) == 4, "the damaged one was not replaced"


class Stubborn(torch.nn.Module):
    """Its answer depends on the number of tokens it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.model_ = torch.nn.Linear(4, 4)

    def forward(self, inputs, past):
        return (self.model_(inputs["x"] * (2 if inputs["x"].shape[1] == 3 else 3)),)


def test_an_axis_that_the_tracer_fixed_is_one_clear_line():
    part = Part("m", Stubborn().eval(), {"x": (torch.zeros(2, 3, 4), ("batch", "sequence", 4))}, {"y": ("batch", 3, 4)})
    with pytest.raises(InputError, match="Linear cannot be exported") as caught:
        trace(part)
    assert "\n" not in str(caught.value)


def broken(change):
    return pytest.param(change, id=change.__name__)


def an_unknown_architecture(base, adapter):
    edit(base / "config.json", model_type="never_heard_of")
    return "has no configuration that can be exported"


def an_architecture_for_another_task(base, adapter):
    edit(adapter / "adapter_config.json", task_type="SEQ_2_SEQ_LM")
    return "the architecture llama cannot be exported for the task SEQ_2_SEQ_LM"


def a_task_without_an_export(base, adapter):
    edit(adapter / "adapter_config.json", task_type="QUESTION_ANS")
    return "task_type QUESTION_ANS cannot be exported"


def no_tokenizer(base, adapter):
    (base / "tokenizer.json").unlink()
    return "has no tokenizer that can be loaded"


def weights_of_another_shape(base, adapter):
    edit(base / "config.json", intermediate_size=64)
    return "by config.json: they do not belong together"


@pytest.mark.parametrize(
    "change",
    [
        broken(f)
        for f in (
            *(an_unknown_architecture, an_architecture_for_another_task, a_task_without_an_export),
            *(no_tokenizer, weights_of_another_shape),
        )
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(small, tmp_path, change):
    for name in ("base", "adapter"):
        shutil.copytree(small / name, tmp_path / name)
    message = change(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(InputError, match=message) as caught:
        export_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_adapter_that_does_not_fit_the_graph_is_refused(small, tmp_path):
    def refuse(message, adapter, base=small / "base", graph=small / "out"):
        with pytest.raises(InputError, match=message):
            export_further(adapter, tmp_path / "out", graph, base, verify=False)
        assert not (tmp_path / "out").exists()

    llama(2, seed=1).save_pretrained(tmp_path / "other base")
    refuse("has other weights", small / "adapter", tmp_path / "other base")
    narrow = lora(llama(2), tmp_path / "narrow", target_modules=["q_proj"])
    export_adapter(narrow, tmp_path / "graph", small / "base", separate=True, verify=False)
    refuse("has no place for model.layers.0", small / "adapter", graph=tmp_path / "graph")
    export_adapter(narrow, tmp_path / "merged", small / "base", verify=False)
    refuse("was exported with its adapter merged", narrow, graph=tmp_path / "merged")
    found = read_adapter(narrow)
    name = found.modules["model.layers.0.self_attn.q_proj"].factors
    pointers = {module: replace(pointer, factors=name) for module, pointer in found.modules.items()}
    write_adapter(found.with_pool({name: found.pool[name]}, pointers), tmp_path / "shared")
    export_adapter(tmp_path / "shared", tmp_path / "shared graph", small / "base", separate=True, verify=False)
    refuse("shares its factors", narrow, graph=tmp_path / "shared graph")
    embedding = lora(llama(2), tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="export without --separate"):
        export_adapter(embedding, tmp_path / "out", small / "base", separate=True)


def test_the_command_says_how_far_it_is_from_torch(small, tmp_path):
    done = run("export", small / "adapter", "--base", small / "base", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "differ from torch's by at most" in done.stdout and "64 of 64 choices the same" in done.stdout
    assert done.stderr == ""
    assert "exists" in refused(run("export", small / "adapter", "--base", small / "base", "-o", tmp_path / "out"))
    further = ["--adapter-only", small / "out", "--base", small / "base", "-o", tmp_path / "further"]
    assert run("export", small / "adapter", *further, "--no-verify").returncode == 0
    assert {path.name for path in (tmp_path / "further").iterdir()} == {"export.json", "model.onnx_adapter"}


def test_without_onnxruntime_the_command_says_what_to_install(small, tmp_path):
    arguments = ["lorapack", "export", str(small / "adapter"), "-o", str(tmp_path / "out")]
    code = (
        f"import sys; sys.modules['onnxruntime'] = None; sys.argv = {arguments}; from lorapack.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "an export needs onnxruntime: pip install 'lorapack[onnx]'" in refused(done)


def test_the_script_in_the_page_runs_without_torch_and_says_what_torch_says(small, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text()
    script = tmp_path / "generate.py"
    script.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small / "base"), small / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=-1)
    blocked = "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'peft', 'lorapack']); "
    arguments = ["generate.py", str(small / "out"), "Once upon a time", str(small / "out" / "model.onnx_adapter")]
    code = f"{blocked} sys.argv = {arguments}; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == tokenizer.decode(wanted[0], skip_special_tokens=True).rstrip("\n")
