"""What `convert` writes for llama.cpp, loaded by a real one: an npm package that ships its binary (`make llama`)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_base import write_base
from peft import PeftModel
from support import ADAPTER, BASE, gpt2, lora, run
from transformers import AutoConfig, AutoModelForCausalLM

from lorapack.convert.gguf import ARCHITECTURES
from lorapack.read import read_adapter
from lorapack.write import write_adapter

HERE = Path(__file__).parent
MODULES = HERE.parent.parent / ".cache" / "engines" / "llama" / "node_modules"
CONVERTER = MODULES.parent / "llama.cpp" / "convert_lora_to_gguf.py"
PROMPTS = [[1, 403, 407, 261, 378], [1, 291, 345, 411], [1, 17, 403, 304, 292, 5]]
COUNT = 40

pytestmark = pytest.mark.skipif(not MODULES.is_dir(), reason="no llama.cpp here: `make llama` installs it")


def tokens_of_llama_cpp(model: Path, adapter: Path | None, prompts=PROMPTS) -> list[list[int]]:
    asked = {"model": str(model), "lora": str(adapter) if adapter else None, "prompts": prompts, "count": COUNT}
    done = subprocess.run(
        ["node", HERE / "llama_cpp.mjs"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "NODE_MODULES": str(MODULES)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def tokens_of_transformers(base: Path, adapter: Path | None, prompts=PROMPTS) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(base).float()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    made = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(COUNT):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        made.append(ids[len(prompt) :])
    return made


def converted(adapter: Path, base: Path, path: Path, *options) -> Path:
    done = run("convert", adapter, "-o", path, "--base", base, *options)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The fixture's base model, a Llama with grouped queries, as llama.cpp wants it."""
    return write_base(BASE, tmp_path_factory.mktemp("base") / "base.gguf")


def patterned(path: Path) -> Path:
    """Ranks and alphas that differ, under rsLoRA: no two kinds of modules have the same alpha in llama.cpp's sense."""
    settings = {
        "rank_pattern": {"q_proj": 2, "down_proj": 8},
        "alpha_pattern": {r"layers\.1\..*": 3},
        "use_rslora": True,
    }
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    return lora(AutoModelForCausalLM.from_pretrained(BASE), path, lora_alpha=1, target_modules=targets, **settings)


def shared(path: Path) -> Path:
    """A compact adapter: all q_proj on the factors of the first layer."""
    found = read_adapter(ADAPTER)
    first = "model.layers.0.self_attn.q_proj"
    pointers = {m: replace(p, factors=first) if "q_proj" in m else p for m, p in found.modules.items()}
    write_adapter(found.with_pool({p.factors: found.pool[p.factors] for p in pointers.values()}, pointers), path)
    return path


@pytest.mark.parametrize("make", [lambda path: ADAPTER, patterned, shared], ids=["trained", "patterned", "shared"])
def test_llama_cpp_says_with_the_adapter_what_transformers_says_and_something_else_without(tmp_path, model, make):
    adapter = make(tmp_path / "adapter")
    plain = tokens_of_llama_cpp(model, None)
    with_it = tokens_of_llama_cpp(model, converted(adapter, BASE, tmp_path / "adapter.gguf"))
    assert plain == tokens_of_transformers(BASE, None)
    assert with_it == tokens_of_transformers(BASE, adapter)
    assert all(one != two for one, two in zip(plain, with_it, strict=True))


def test_llama_cpp_takes_the_transposed_layers_of_gpt2(tmp_path):
    base = gpt2()
    with torch.no_grad():  # or it says the same whatever it is asked
        for parameter in base.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    base.save_pretrained(tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = write_base(tmp_path / "base", tmp_path / "base.gguf")
    plain = tokens_of_llama_cpp(model, None)
    with_it = tokens_of_llama_cpp(model, converted(adapter, tmp_path / "base", tmp_path / "adapter.gguf"))
    assert plain == tokens_of_transformers(tmp_path / "base", None)
    assert with_it == tokens_of_transformers(tmp_path / "base", adapter) != plain


@pytest.mark.skipif(not CONVERTER.is_file(), reason="no converter of llama.cpp here: `make llama` fetches it")
@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"gpt2"}))  # whose factors it turns round by mistake
def test_our_tensors_are_those_of_llama_cpps_own_converter(tmp_path, kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, num_key_value_heads=2, head_dim=8, **sizes, **ids)
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter", target_modules="all-linear", lora_alpha=6)
    ours = converted(adapter, tmp_path / "base", tmp_path / "ours.gguf")
    command = [sys.executable, CONVERTER, adapter, "--base", tmp_path / "base", "--outfile", tmp_path / "theirs.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    read = [gguf.GGUFReader(path) for path in (ours, tmp_path / "theirs.gguf")]
    one, two = ({tensor.name: tensor.data for tensor in file.tensors} for file in read)
    assert one.keys() == two.keys() and len(one) >= 16
    assert all(np.array_equal(one[name], two[name]) for name in one)
    for field in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert read[0].fields[field].contents() == read[1].fields[field].contents()


def test_llama_cpp_loads_float16_too(tmp_path, model):
    adapter = converted(ADAPTER, BASE, tmp_path / "adapter.gguf", "--dtype", "float16")
    answers = tokens_of_llama_cpp(model, adapter)
    assert [answer[:4] for answer in answers] == [a[:4] for a in tokens_of_transformers(BASE, ADAPTER)]
