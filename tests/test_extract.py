"""From two models back to an adapter: what was merged comes out again, what is no pair is kept, the rest is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import bert, edit, gpt2, llama, lora, refused, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lorapack import extract_adapter, merge_adapter, read_adapter
from lorapack.errors import InputError
from lorapack.extract.lowrank import of_error, of_rank

IDS = torch.arange(24)[None] * 5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def product(adapter, module) -> torch.Tensor:
    factors = adapter.factors(module)
    return adapter.scale(module) * factors.B.double() @ factors.A.double()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def changed(directory: Path, path: Path, change) -> Path:
    """A copy of a saved model with `change(name, tensor)` in the place of each tensor."""
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    made = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file({n: t for n, t in made.items() if t is not None}, path / "model.safetensors", metadata={"format": "pt"})
    return path


SETTINGS = {
    "llama": (llama, {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, "down_proj": 7}, "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("way", [{"error": 1e-4}, {"rank": 7}])
def test_what_was_merged_comes_out_again_with_its_ranks(tmp_path, kind, way):
    model, options = SETTINGS[kind]
    model().save_pretrained(tmp_path / "base")
    lora(model(), tmp_path / "adapter", **options)
    merge_adapter(tmp_path / "adapter", tmp_path / "full", tmp_path / "base")
    done = extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "again", **way)
    before, after = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "again")
    assert list(before.modules) == list(after.modules) and not done.saved and not done.biases
    for module in before.modules:
        scale = product(before, module).abs().max()
        torch.testing.assert_close(product(after, module), product(before, module), rtol=0, atol=3e-6 * (1 + scale))
        if "error" in way:
            assert after.factors(module).rank == before.factors(module).rank
    ours = PeftModel.from_pretrained(model(), tmp_path / "again")
    torch.testing.assert_close(logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full")))


def test_from_bfloat16_it_comes_out_as_far_as_its_rounding_lets_it_and_the_error_says_how_far(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "base")
    lora(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "full", tmp_path / "base")
    done = extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "again", rank=4)
    before, after = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "base"))
    for layer in done.layers:
        difference = one[f"{layer.module}.weight"].double() - two[f"{layer.module}.weight"].double()
        left = (difference - product(after, layer.module)).norm() / difference.norm()
        assert layer.error == pytest.approx(float(left), rel=1e-3) and 1e-4 < layer.error < 0.02
        assert (product(after, layer.module) - product(before, layer.module)).norm() < 0.02 * difference.norm()


@pytest.mark.parametrize("new_head", [False, True])
def test_a_full_fine_tune_of_everything_is_the_adapter_on_its_base(tmp_path, new_head):
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "base")
    changed(tmp_path / "base", tmp_path / "full", lambda name, t: t + 0.05 * torch.randn_like(t))
    if new_head:
        weights = load_file(tmp_path / "base" / "model.safetensors")
        save_file(
            {n: t for n, t in weights.items() if "classifier" not in n},
            tmp_path / "base" / "model.safetensors",
            metadata={"format": "pt"},
        )
    done = extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "adapter", rank=32)
    assert done.biases and any("LayerNorm" in name for name in done.saved)
    assert {"bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"} <= set(done.saved)
    assert "classifier" in done.saved
    theirs = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "full"))
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    assert not torch.allclose(logits(fresh), theirs, atol=1e-2)
    ours = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-4)


def test_a_merge_of_what_was_extracted_is_the_fine_tuned_model(tmp_path):
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "base")
    changed(tmp_path / "base", tmp_path / "full", lambda name, t: t + 0.05 * torch.randn_like(t))
    extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "adapter", rank=32)
    merge_adapter(tmp_path / "adapter", tmp_path / "again", tmp_path / "base")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "again"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_changed_embedding_that_is_also_the_head_changes_both_ends(tmp_path):
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    moved = lambda name, t: t + 0.05 if "embed_tokens" in name or "q_proj" in name else t  # noqa: E731
    changed(tmp_path / "base", tmp_path / "full", moved)
    done = extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "adapter", rank=1)
    assert done.saved == ("model.embed_tokens",)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), theirs)


def test_names_that_lack_the_models_first_part_in_the_base_are_found(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    lora(gpt2(), tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    merge_adapter(tmp_path / "adapter", tmp_path / "full", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    extract_adapter(tmp_path / "full", tmp_path / "base", tmp_path / "again", rank=4)
    assert list(read_adapter(tmp_path / "again").modules) == list(read_adapter(tmp_path / "adapter").modules)


def test_the_command_line_says_what_it_found(tmp_path):
    llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    lora(llama(), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "full", tmp_path / "base")
    done = run("extract", tmp_path / "full", tmp_path / "base", "-o", tmp_path / "again", "--error", 0.001)
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout and "8 layers; 31 tensors are the base's" in done.stdout
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_what_cannot_be_extracted_is_one_line_and_leaves_nothing(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    llama(layers=2).save_pretrained(tmp_path / "other")
    bert().save_pretrained(tmp_path / "bert")
    changed(tmp_path / "base", tmp_path / "noisy", lambda name, t: t + torch.randn_like(t))
    bare = changed(tmp_path / "base", tmp_path / "bare", lambda name, t: t)
    for place, value in ((bare, 1.0), (tmp_path / "base", 0.0)):
        weights = load_file(place / "model.safetensors") | {"model.gate": torch.full((2, 2), value)}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    wide = changed(tmp_path / "base", tmp_path / "wide", lambda name, t: t.repeat(2, 1) if "q_proj" in name else t)
    there = {path.name for path in tmp_path.iterdir()}
    for full, base, way, needle in (
        ("base", "base", {"rank": 4}, "differs"),
        ("noisy", "base", {"error": 0.01}, "not of low rank"),
        (bare.name, "base", {"rank": 4}, "model.gate"),
        (wide.name, "base", {"rank": 4}, "it is not the base"),
        ("bert", "base", {"rank": 4}, "no tensor"),
        ("base", "other", {"rank": 4}, "is not in the base"),
        ("base", "other", {}, "either a rank or an error"),
        ("base", "nowhere", {"rank": 4}, "nowhere"),
    ):
        with pytest.raises(InputError, match=needle) as told:
            extract_adapter(tmp_path / full, tmp_path / base, tmp_path / "out", **way)
        assert "\n" not in str(told.value)
        assert {path.name for path in tmp_path.iterdir()} == there
    refused(run("extract", tmp_path / "noisy", tmp_path / "base", "-o", tmp_path / "base" / "inside", "--rank", 4))
    edit(tmp_path / "base" / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="quantised"):
        extract_adapter(tmp_path / "noisy", tmp_path / "base", tmp_path / "out", rank=4)


# The pairs themselves


@st.composite
def matrices(draw) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randn(min(rows, columns), dtype=torch.float64, generator=generator).exp()
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, dtype=torch.float64, generator=generator), full_matrices=False
    )
    return u * values @ v


@settings(deadline=None)
@given(matrices(), st.floats(0.01, 0.9))
def test_the_rank_for_an_error_is_the_smallest_that_keeps_it(matrix, error):
    found = of_error(matrix, error)
    values = torch.linalg.svdvals(matrix)
    left = [float(values[rank:].norm() / values.norm()) for rank in range(len(values) + 1)]
    assert found.error == pytest.approx(float((matrix - found.B @ found.A).norm() / matrix.norm()), abs=1e-7)
    assert found.error <= error * (1 + 1e-9) and left[found.rank - 1] > error * (1 - 1e-9)


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_sketch_is_nearly_as_good_as_the_whole_decomposition(rank):
    torch.manual_seed(0)
    matrix = torch.randn(200, 20).double() @ torch.randn(20, 300).double() + 0.05 * torch.randn(200, 300).double()
    values = torch.linalg.svdvals(matrix)
    best = float(values[rank:].norm() / values.norm())
    found = of_rank(matrix, rank)
    assert found.rank == rank and best * (1 - 1e-9) <= found.error <= 1.01 * best
    assert torch.equal(of_rank(matrix, rank).A, found.A)
    wanted = of_error(matrix, 1.001 * best)
    assert wanted.rank == rank
