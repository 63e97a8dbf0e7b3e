"""What many tests need: small random models, adapters for them, and the command line."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import warm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorapack.cli.main import main
from lorapack.model.load import load
from lorapack.read import read_adapter

FIXTURES = Path(__file__).parent.parent / "fixtures"
BASE = FIXTURES / "stories260k"
ADAPTER = FIXTURES / "adapter"
CALIBRATION = FIXTURES / "tinyshakespeare" / "calibration.jsonl"
HELDOUT = FIXTURES / "tinyshakespeare" / "heldout.jsonl"


def llama(layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with grouped queries: q_proj 32x32, k_proj and v_proj 16x32, MLP 48."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ).eval()


def gpt2(layers: int = 2, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2, whose layers are Conv1D (fan_in_fan_out)."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=layers, n_head=4, n_positions=128)).eval()


def bert(layers: int = 3, labels: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            num_labels=labels,
        )
    ).eval()


def lora(model, path: Path, seed: int = 0, **settings) -> Path:
    """Save a LoRA with random A and B (not zero) for the model; returns the directory."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    return path


def attached(model, path: Path, **settings):
    """A random LoRA (see `lora`) on a model, both through files in `path`: the adapter, and what `load` makes of it."""
    model.save_pretrained(path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path / "base")
    adapter = read_adapter(lora(model, path / "adapter", **settings))
    return adapter, load(adapter, str(path / "base"), device="cpu")


def assert_adapters_equal(found, expected):
    """The same modules with the same factors, types, scales and carried tensors; sharing is not looked at."""
    assert found.modules.keys() == expected.modules.keys()
    for module in expected.modules:
        one, two = found.factors(module), expected.factors(module)
        assert one.A.dtype == two.A.dtype and torch.equal(one.A, two.A), module
        assert one.B.dtype == two.B.dtype and torch.equal(one.B, two.B), module
        assert found.scale(module) == pytest.approx(expected.scale(module), rel=1e-12), module
    assert found.carried.keys() == expected.carried.keys()
    for name, tensor in expected.carried.items():
        assert found.carried[name].dtype == tensor.dtype and torch.equal(found.carried[name], tensor), name


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; a value of None stays in it, `...` removes the key."""
    value = json.loads(path.read_text())
    value = {k: v for k, v in {**value, **changes}.items() if v is not ...}
    path.write_text(json.dumps(value))


def run(*arguments, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own."""
    given = list(map(str, arguments))
    if not environment and said() == SAID:
        return warm.run(_server(), given, cwd or Path.cwd(), {})
    command = [sys.executable, "-m", "lorapack", *given]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**said(), **environment}, timeout=300)


def said() -> dict[str, str]:
    """The environment of a command: this process's."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


SAID = said()  # what a test has changed since is not for the server, whose libraries have read it


@functools.cache
def _server() -> "subprocess.Popen[str]":
    until_the_end = contextlib.ExitStack()
    atexit.register(until_the_end.close)
    return until_the_end.enter_context(warm.server(SAID))


def call(capsys, monkeypatch, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["lorapack", *map(str, arguments)])
    with patch.dict(os.environ), pytest.raises(SystemExit) as end:  # it sets variables that are not for other tests
        main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def as_installed(**more: str) -> dict[str, str]:
    """The environment of a script that calls `lorapack` and `python3`: it gets this checkout and this Python."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **more,
    }


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a command refused its input as it should; returns the one line it said."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lorapack: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, each with its command line, as /proc has them."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: lines[child] for child in found - {pid} if child in lines}


def perturbed(out: Path, count: int) -> list[Path]:
    """Adapters that differ from the fixture's by a little noise, a seed each."""
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(out / f"adapter-{seed:03d}")
        made[-1].mkdir(parents=True)
        noisy = {name: t + 0.02 * t.std() * torch.randn_like(t) for name, t in tensors.items()}
        save_file(noisy, made[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(ADAPTER / "adapter_config.json", made[-1])
    return made
