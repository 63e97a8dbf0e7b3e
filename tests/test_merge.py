"""Merging from file to file: the exact sum, untouched bytes, what PEFT makes, and what is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import bert, edit, gpt2, llama, lora, refused, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lorapack.core.adapter import Adapter
from lorapack.errors import InputError
from lorapack.merge.layout import read_shard
from lorapack.merge.merge import merge_adapter
from lorapack.merge.numbers import STORED, narrow, widen
from lorapack.read import read_adapter
from lorapack.write import write_adapter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def saved(model, path: Path, dtype=torch.float32, **options) -> Path:
    model.to(dtype).save_pretrained(path, **options)
    return path


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def naive(adapter: Adapter, module: str) -> torch.Tensor:
    """The update in float64."""
    factors = adapter.factors(module)
    return adapter.scale(module) * factors.B.double() @ factors.A.double()


def same_logits(one, two) -> None:
    ids = torch.arange(40).reshape(2, 20) * 7 % 512
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", MANTISSA, ids=str)
def test_every_weight_is_the_exact_sum_rounded_once_and_the_rest_is_the_same_bytes(tmp_path, dtype):
    base = saved(llama(), tmp_path / "base", dtype)
    adapter = lora(llama(), tmp_path / "adapter", r=3, lora_alpha=7, target_modules=LINEAR)
    merge_adapter(adapter, tmp_path / "out", base)
    before, after, read = weights(base), weights(tmp_path / "out"), read_adapter(adapter)
    assert before.keys() == after.keys()
    touched = {f"{m}.weight" for m in read.modules}
    assert len(touched) == 28
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in touched:
            assert torch.equal(tensor, before[name])
            continue
        exact = before[name].double() + naive(read, name.removesuffix(".weight"))
        _, exponent = torch.frexp(tensor.double())
        half = (2.0 ** (exponent.double() - MANTISSA[dtype] - 1)).clamp(
            min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
        )
        off = (tensor.double() - exact).abs()
        assert (off <= half * (1 + 1e-12)).all(), name
        module = name.removesuffix(".weight")
        factors = read.factors(module)
        float32 = (before[name].float() + read.scale(module) * factors.B @ factors.A).to(dtype)
        differ = tensor != float32  # the bits of sums made in float32, but where those are not the nearest
        assert (off <= (float32.double() - exact).abs())[differ].all() and (dtype == torch.float32 or differ.sum() <= 2)


def test_sums_that_cancel_are_rounded_once_where_peft_rounds_the_update_first(tmp_path):
    """W near −s·B·A: the worst case. Ours is within half a unit of float64; PEFT's `safe_merge` is off by many."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 96) / 4, torch.randn(64, 16) / 4
    exact = 2.0 * b.double() @ a.double()
    nearly = (-exact * (1 + 2**-9 * torch.randn(64, 96).double())).to(torch.bfloat16)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file({"layer.weight": nearly}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    factors = {"base_model.model.layer.lora_A.weight": a, "base_model.model.layer.lora_B.weight": b}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["layer"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    ours = weights(tmp_path / "out")["layer.weight"]
    net = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)))
    net.layer.weight.data.copy_(nearly)
    theirs = (
        PeftModel.from_pretrained(net, tmp_path / "adapter", autocast_adapter_dtype=False)
        .merge_and_unload(safe_merge=True)
        .layer.weight
    )
    float32 = (nearly.float() + 2.0 * (b @ a)).bfloat16()

    def units(found):
        _, exponent = torch.frexp((nearly.double() + exact).abs())
        return ((found.double() - (nearly.double() + exact)).abs() / 2.0 ** (exponent.double() - 8)).max().item()

    assert units(ours) <= 0.5 < units(float32) < units(theirs)
    differ = ours != float32
    exact = nearly.double() + exact
    assert ((ours.double() - exact).abs() <= (float32.double() - exact).abs())[differ].all()


HEADED = {"modules_to_save": ["classifier"], "bias": "lora_only", "task_type": "SEQ_CLS"}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 32}}
CASES = {
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (llama, {"target_modules": LINEAR, **PATTERNS}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "bert with a head and biases": (bert, {"target_modules": ["query", "dense"], **HEADED}),
}


@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_a_merged_model_says_what_peft_says(tmp_path, model, options):
    auto = AutoModelForSequenceClassification if model is bert else AutoModelForCausalLM
    base = saved(model(), tmp_path / "base")
    lora(model(), tmp_path / "adapter", **options)
    with torch.no_grad():  # other biases than the base's, as after training
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        moved = {
            n: t + 0.1 if n.endswith(".bias") or "classifier" in n or "lm_head" in n else t for n, t in tensors.items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    done = run("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    theirs = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "adapter").merge_and_unload()
    ours = auto.from_pretrained(tmp_path / "out")
    same_logits(ours, theirs)
    for (name, one), two in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left >= {"config.json", "model.safetensors"} and not any("adapter" in name for name in left)


def test_a_convolution_is_merged_as_peft_does(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, (1, 3)))
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    wrapped = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    theirs = wrapped.merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name])


@pytest.mark.parametrize("form", ["shared", "int8"])
def test_compact_adapters_merge_as_their_expanded_form_does(tmp_path, form):
    from lorapack.pack.store import store_adapter

    base = saved(llama(), tmp_path / "base")
    found = read_adapter(lora(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"]))
    if form == "shared":
        first = found.modules["model.layers.0.self_attn.q_proj"]
        pointers = {
            m: replace(p, factors=first.factors, scale=p.scale * (n + 1)) if "q_proj" in m else p
            for n, (m, p) in enumerate(found.modules.items())
        }
        found = found.with_pool({p.factors: found.pool[p.factors] for p in pointers.values()}, pointers)
    else:
        found = store_adapter(found, "int8")
    write_adapter(found, tmp_path / "compact")
    write_adapter(found, tmp_path / "plain", expand=True)
    assert json.loads((tmp_path / "compact" / "adapter_config.json").read_text())["peft_type"] == "LORAPACK"
    for name in ("compact", "plain"):
        merge_adapter(tmp_path / name, tmp_path / f"of {name}", base)
    one, two = weights(tmp_path / "of compact"), weights(tmp_path / "of plain")
    assert all(torch.equal(one[n], two[n]) for n in two) and len(one) == len(two)
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(one[name], weights(base)[name])


def test_shards_their_index_and_the_texts_come_along(tmp_path):
    base = saved(llama(), tmp_path / "base", max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    (base / "tokenizer_config.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("card of the base")
    (base / "adapter_config.json").write_text("{}")
    adapter = lora(llama(), tmp_path / "adapter", target_modules=LINEAR)
    merge_adapter(adapter, tmp_path / "out", base)
    single = saved(llama(), tmp_path / "single")
    merge_adapter(adapter, tmp_path / "one", single)
    assert {p.name for p in base.iterdir()} - {"README.md", "adapter_config.json"} | {"lorapack_merge.json"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    one, two = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_an_adapters_own_tokenizer_takes_the_place_of_the_bases(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (base / name).write_text('"base"')
        (adapter / name).write_text('"adapter"')
    (base / "vocab.txt").write_text("base")
    merge_adapter(adapter, tmp_path / "out", base)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"adapter"'
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_pickled_bases_are_read_as_tensors_only(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter", target_modules=LINEAR)
    merge_adapter(adapter, tmp_path / "of safetensors", base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merge_adapter(adapter, tmp_path / "of bin", base)
    one, two = weights(tmp_path / "of safetensors"), weights(tmp_path / "of bin")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert not (tmp_path / "of bin" / ".bin").exists()
    torch.save({"a": print}, base / "pytorch_model.bin")
    with pytest.raises(InputError, match="nothing in it was executed"):
        merge_adapter(adapter, tmp_path / "out", base)


@pytest.mark.parametrize("kept", ["without", "with one more"])
def test_names_with_another_prefix_are_found(tmp_path, kept):
    base = saved(gpt2(), tmp_path / "base")
    adapter = lora(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    merge_adapter(adapter, tmp_path / "out", base)
    tensors = load_file(base / "model.safetensors")
    rename = (lambda n: n.removeprefix("transformer.")) if kept == "without" else (lambda n: f"wrapped.{n}")
    save_file({rename(n): t for n, t in tensors.items()}, base / "model.safetensors")
    merge_adapter(adapter, tmp_path / "renamed", base)
    one, two = weights(tmp_path / "out"), weights(tmp_path / "renamed")
    assert all(torch.equal(two[rename(n)], t) for n, t in one.items())


def test_another_dtype_is_the_exact_sum_in_it_for_every_tensor(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    done = run("merge", adapter, "--base", base, "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    before, after, read = weights(base), weights(tmp_path / "out"), read_adapter(adapter)
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        exact = before[name].double() + (naive(read, module) if module in read.modules else 0)
        assert tensor.dtype == torch.bfloat16
        assert (tensor != exact.to(torch.bfloat16)).sum() <= 0.003 * tensor.numel()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(["BF16", "F16", "F32"]))
def test_numbers_are_rounded_as_torch_rounds_them(bits, dtype):
    values = np.array(bits, np.uint32).view(np.float32)
    values = np.append(values[np.abs(values) < 60000], np.float32(1))
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    wanted = torch.from_numpy(values.copy()).to(kind)
    out = np.empty(values.shape, STORED[dtype])
    narrow(values, dtype, out, np.empty(values.shape, np.uint32))
    assert out.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    for wide in (np.float32, np.float64):
        back = np.empty(values.shape, wide)
        widen(out, dtype, back, np.empty(values.shape, np.uint32))
        assert (back == wanted.double().numpy()).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0x0080, 0x7F00), st.booleans(), st.sampled_from([-1, 0, 1]))
def test_a_float64_beside_the_middle_of_two_bfloat16_goes_to_its_own_side(upper, negative, side):
    middle = np.array([(upper << 16) | 0x8000], np.uint32).view(np.float32).astype(np.float64)
    value = middle * (1 + side * 2.0**-40) * (-1 if negative else 1)  # float32 cannot tell the three apart
    out = np.empty(1, np.uint16)
    narrow(value, "BF16", out, np.empty(1, np.uint32))
    wanted = upper + (1 if side > 0 else 0 if side < 0 else upper & 1)
    assert out[0] == wanted | (0x8000 if negative else 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x7F00), st.booleans(), st.integers(-1, 1)), min_size=1, max_size=9))
def test_float32_numbers_on_and_beside_the_middle_are_rounded_as_torch_rounds_them(numbers):
    bits = [(upper << 16 | 0x8000) + beside | negative << 31 for upper, negative, beside in numbers]
    values = np.array(bits, np.uint32).view(np.float32)
    out = np.empty(values.shape, np.uint16)
    narrow(values, "BF16", out, np.empty(values.shape, np.uint32))
    assert out.tobytes() == torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().tobytes()


def broken(change):
    return pytest.param(change, id=change.__name__)


def quantised(base, adapter):
    edit(base / "config.json", quantization_config={"quant_method": "gptq"})
    return "quantised (gptq)"


def a_shard_is_missing(base, adapter):
    next(iter(base.glob("*.safetensors"))).unlink()
    return "which is not there"


def the_index_lies(base, adapter):
    path = base / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    names = sorted(set(places.values()))
    edit(path, weight_map={**places, "model.norm.weight": next(n for n in names if n != places["model.norm.weight"])})
    return "which does not hold it"


def the_index_leads_out(base, adapter):
    path = base / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map={n: f"../base/{f}" for n, f in places.items()})
    return "no plain name"


def a_shard_is_cut_off(base, adapter):
    path = next(iter(base.glob("*.safetensors")))
    os.truncate(path, path.stat().st_size - 1)
    return "Download it again"


def of_another_base(base, adapter):
    edit(adapter / "adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    save_file({n.replace(".layers.0.", ".layers.9."): t for n, t in load_file(file).items()}, file)
    return "has no tensor model.layers.9.self_attn.q_proj.weight"


def of_another_width(base, adapter):
    shutil.rmtree(base)
    saved(llama(), base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    save_file({**tensors, name: torch.zeros(8, 32)}, base / "model.safetensors")
    return "is [8, 32] in the base"


def stored_in_eight_bits(base, adapter):
    path = base / "model.safetensors.index.json"
    name = "model.layers.0.self_attn.q_proj.weight"
    file = base / json.loads(path.read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    return "it is quantised"


def with_nan(base, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * float("nan") for n, t in load_file(file).items()}, file)
    return "NaN"


@pytest.mark.parametrize(
    "change",
    [
        broken(f)
        for f in (
            *(quantised, a_shard_is_missing, the_index_lies, the_index_leads_out, a_shard_is_cut_off),
            *(of_another_base, of_another_width, stored_in_eight_bits, with_nan),
        )
    ],
)
def test_what_cannot_be_merged_with_certainty_is_refused_and_nothing_is_left(tmp_path, change):
    base = saved(llama(), tmp_path / "base", max_shard_size="40KB")
    adapter = lora(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    message = change(base, adapter)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # the first byte written would be another error
    try:
        with pytest.raises(InputError) as said:
            merge_adapter(adapter, tmp_path / "out", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message in str(said.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_tied_weight_that_cannot_be_untied_with_certainty_is_refused(tmp_path):
    base = saved(gpt2(), tmp_path / "base")
    edit(base / "config.json", architectures=["GPT2DoubleHeadsModel", "GPT2LMHeadModel"])
    adapter = lora(gpt2(), tmp_path / "adapter", target_modules=["c_attn", "wte"])
    with pytest.raises(InputError, match="tied"):
        merge_adapter(adapter, tmp_path / "out", base)


def test_the_inputs_stay_and_an_existing_output_is_replaced_only_when_asked(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter")
    before = {p: p.read_bytes() for p in (*base.iterdir(), *adapter.iterdir())}
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "out").returncode == 0
    assert "--overwrite" in refused(run("merge", adapter, "--base", base, "-o", tmp_path / "out"))
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "out", "--overwrite").returncode == 0
    assert "overlap" in refused(run("merge", adapter, "--base", base, "-o", base, "--overwrite"))
    assert "overlap" in refused(run("merge", adapter, "--base", base, "-o", base / "in"))
    assert {p: p.read_bytes() for p in before} == before


def test_a_killed_merge_leaves_no_output(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(2**26)}, base / "model.safetensors")
    arguments = [sys.executable, "-m", "lorapack", "merge", adapter, "--base", base, "-o", tmp_path / "out"]
    with subprocess.Popen(list(map(str, arguments))) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.*/out/model.safetensors")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "out").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-m", "lorapack", "merge", adapter, "--base", base, "-o", tmp_path / "new" / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert "cannot be written" in refused(done)
    script = (
        'mount -t tmpfs -o size=128k none "$1" || exit 77; '
        '"$2" -m lorapack merge "$3" --base "$4" -o "$1/out"; code=$?; ls -A "$1"; exit $code'
    )
    (tmp_path / "full").mkdir()
    command = ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path / "full", sys.executable, adapter, base]
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode in (1, 77) and "lorapack" not in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert "No space left" in refused(done) and done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "full"]


def test_a_merge_of_safetensors_imports_nothing_that_takes_longer_than_the_merge(tmp_path):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter", modules_to_save=["lm_head"])
    code = (
        "import sys; from lorapack.merge.merge import merge_adapter; merge_adapter(*sys.argv[1:]); "
        "print({'torch', 'transformers', 'peft', 'huggingface_hub', 'pydantic', 'regex'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, adapter, tmp_path / "out", base], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_kernel_and_the_fallback_copy_the_same(tmp_path, monkeypatch):
    base = saved(llama(), tmp_path / "base")
    adapter = lora(llama(), tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "one", base)
    monkeypatch.delattr(os, "copy_file_range")
    merge_adapter(adapter, tmp_path / "two", base)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two and read_shard(tmp_path / "two" / "model.safetensors").entries
