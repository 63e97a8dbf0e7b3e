"""The memory plan, from headers alone. How near it is to what runs then needed is in docs/scale.md."""

import json
import struct

import pytest
import torch
from support import ADAPTER, BASE, attached, llama, run
from transformers import LlamaConfig, LlamaForCausalLM

from lorapack.data.batches import Batch
from lorapack.errors import InputError
from lorapack.footprint import plan_memory
from lorapack.model.forward import run_body
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.read import read_adapter
from lorapack.recover.recover import AT_ONCE


def test_the_base_is_counted_as_it_lies_in_memory(tmp_path):
    adapter, loaded = attached(llama(2), tmp_path, target_modules=["q_proj"])
    found = plan_memory(adapter, str(tmp_path / "base"), device="cpu")
    in_memory = sum(p.nbytes for n, p in loaded.base.named_parameters() if "lora" not in n)
    assert {step["base"] for step in found.steps.values()} == {in_memory}
    half = plan_memory(adapter, str(tmp_path / "base"), device="cpu", dtype="bfloat16")
    assert half.steps["measure"]["base"] == in_memory // 2
    assert half.steps["measure"]["activations"] == pytest.approx(found.steps["measure"]["activations"] / 2, rel=1e-3)


def test_a_base_of_140_gigabytes_is_planned_without_a_byte_of_it(tmp_path):
    """A sparse file: its header says 70 billion numbers, and there are none."""
    hidden, inner, layers = 8192, 28672, 80
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=layers))
    wide = {"q_proj": (hidden, hidden), "k_proj": (1024, hidden), "v_proj": (1024, hidden), "o_proj": (hidden, hidden)}
    wide |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    header, at = {}, 0
    for name in model.state_dict():
        kind = name.split(".")[-2]
        shape = wide.get(kind, (hidden,) if "norm" in kind else (32000, hidden))
        stop = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"hidden_size": hidden, "vocab_size": 32000, "model_type": "llama"}))
    raw = json.dumps(header).encode()
    with open(base / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    done = run("compress", ADAPTER, "--base", base, "-o", tmp_path / "out", "--plan-memory", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "does NOT fit" in done.stdout and not (tmp_path / "out").exists()
    said = run(
        "compress", ADAPTER, "--base", base, "-o", tmp_path / "out", "--plan-memory", "--json", "--device", "cpu"
    )
    found = json.loads(said.stdout)
    assert found["steps"]["measure"]["base"] == 2 * at  # float32 on the CPU
    assert not found["fits"] and found["peak"] > found["free"]["cpu"]


def test_more_is_planned_for_a_token_than_the_backward_pass_keeps_of_it_and_not_many_times_as_much():
    adapter = read_adapter(ADAPTER)
    loaded = load(adapter, str(BASE), device="cpu")
    point(loaded, place(adapter, loaded.device, trainable=True))
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in loaded.model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_body(loaded, Batch(ids, torch.ones_like(ids), ids, None, (0, 1, 2, 3)))
    needed = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    assert needed
    for command, step, tokens in (
        ("compress", "measure", 4096),
        ("measure", "measure", 4096),
        ("recover", "recover", AT_ONCE),
    ):
        found = plan_memory(adapter, str(BASE), command, device="cpu", batch_tokens=4096).steps
        planned = found[step]["activations"] / tokens
        assert needed / ids.numel() <= planned <= 3 * needed / ids.numel()


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        (("measure", "-o", "out"), ["measure"]),
        (("recover", "--steps", "30", "-o", "out", "--json"), ["refit", "recover", "evaluate"]),
        (("recover", "--steps", "0", "--refit", "-o", "out", "--json"), ["refit", "evaluate"]),
        (("evaluate", "--json"), ["evaluate"]),
    ],
)
def test_each_command_plans_its_own_steps_as_compress_does(command, steps, tmp_path):
    name, *more = command
    given = ("--base", BASE, "--data", "never-read.jsonl", "--device", "cpu", "--batch-tokens", "2048")
    done = run(name, ADAPTER, *more, *given, "--plan-memory", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    known = plan_memory(read_adapter(ADAPTER), str(BASE), device="cpu", batch_tokens=2048, recover_steps=30).steps
    if "--json" in more:
        found = json.loads(done.stdout)["steps"]
        assert found == {step: {**known[step], "total": sum(known[step].values())} for step in steps}
    else:
        assert "refit" not in done.stdout
        assert f"together {sum(known[steps[0]].values()) / 1e6:,.0f}" in " ".join(done.stdout.split())


def test_a_base_without_headers_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no \.safetensors file"):
        plan_memory(read_adapter(ADAPTER), str(tmp_path))
