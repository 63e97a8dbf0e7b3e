"""vLLM's own code on what is written for it: `make engines` downloads the package."""

from types import SimpleNamespace

import pytest
import torch
from released import released, source
from serving import ADAPTERS, ALL, adapter, assert_updates
from support import ADAPTER

from lorapack import InputError, expand_adapter, read_adapter
from lorapack.engines.vllm import MAX_RANKS

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
VLLM = released(
    "vllm",
    {f"vllm.lora.{name}" for name in ("peft_helper", "lora_model", "lora_weights", "model_manager", "utils")},
    {"vllm.utils.torch_utils": {"PIN_MEMORY": False}},
)
WANTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
SOURCES = {**ADAPTERS, "the fixture": read_adapter(ADAPTER)}


def checked(directory, most):
    """The configuration as vLLM reads it, past its own check."""
    helper = VLLM["peft_helper"].PEFTHelper.from_local_dir(str(directory), 128)
    helper.validate_legal(SimpleNamespace(max_lora_rank=most))
    return helper


def loaded(directory, most):
    return VLLM["lora_model"].LoRAModel.from_local_checkpoint(
        str(directory), WANTED, checked(directory, most), device="cpu", model_vocab_size=512
    )


def added(model):
    """Hand the adapter to vLLM's manager, which packs its layers: each module's scale is in its B afterwards."""
    manager = object.__new__(VLLM["model_manager"].LoRAModelManager)
    vars(manager).update(modules={}, packed_modules={}, is_pooling_model=False, _registered_adapters={})
    vars(manager).update(
        supports_mm=False, _enable_mixed_moe_lora_format=False, _validate_moe_lora_format=lambda lora: 0
    )
    manager._get_text_lora_name = lambda model, name: None
    stems = {name.rpartition(".")[0] for name in model.loras if ".layers." in name}
    for stem in stems:
        for packed, parts in PACKED.items():
            manager.packed_modules[f"{stem}.{packed}"] = [f"{stem}.{part}" for part in parts]
    manager._add_adapter(model)
    found = {}
    for name, lora in model.loras.items():
        stem, _, last = name.rpartition(".")
        parts = [f"{stem}.{part}" for part in PACKED[last]] if last in PACKED else [name]
        packed = lora.is_packed
        factors = (lora.lora_a, lora.lora_b) if packed else ([lora.lora_a], [lora.lora_b])
        for part, a, b in zip(parts, *factors, strict=True):
            if a is not None:
                found[part] = b.double() @ a.double()
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_it_accepts_the_directory_and_computes_the_adapter(name, tmp_path):
    source = SOURCES[name]
    written = expand_adapter(source, tmp_path / "out", "vllm")
    rank = max(factors.rank for factors in written.pool.values())
    most = next(allowed for allowed in MAX_RANKS if allowed >= rank)
    model = loaded(tmp_path / "out", most)
    for module, lora in model.loras.items():
        assert lora.scaling == pytest.approx(source.scale(module), rel=1e-12)
        assert lora.rank == lora.lora_a.shape[0] == lora.lora_b.shape[1]
    # vLLM rounds B times the scale in B's own type
    assert_updates(added(model), source, tolerance=2**-8 if name == "bfloat16" else 1e-6)


def test_a_saved_head_is_read(tmp_path):
    head = {"base_model.model.score.weight": torch.ones(2, 32)}
    source = adapter(ALL, carried=head, modules_to_save=["classifier", "score"])
    expand_adapter(source, tmp_path / "out", "vllm")
    model = loaded(tmp_path / "out", 8)
    assert torch.equal(model.modules_to_save["score"].weight, torch.ones(2, 32))
    assert_updates(added(model), source)


def test_the_rank_that_is_named_is_the_smallest_that_it_takes(tmp_path):
    expand_adapter(ADAPTERS["ranks above sixteen"], tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match="LoRA rank 20 is greater than max_lora_rank 16"):
        checked(tmp_path / "out", 16)
    checked(tmp_path / "out", 32)
    allowed = ", ".join(map(str, MAX_RANKS))
    assert f"MaxLoRARanks = Literal[{allowed}]" in source("vllm", "vllm.config.lora")


def test_what_is_refused_would_be_refused_by_vllm(tmp_path):
    bias = adapter(ALL, carried={f"base_model.model.{ALL[0]}.base_layer.bias": torch.ones(32)}, bias="lora_only")
    with pytest.raises(InputError):
        expand_adapter(bias, tmp_path / "no", "vllm")
    expand_adapter(bias, tmp_path / "out", "peft")
    with pytest.raises(ValueError, match="bias is not supported"):
        checked(tmp_path / "out", 8)


@pytest.mark.parametrize("form", ["peft", "sglang"])
def test_the_plain_form_and_the_one_for_sglang_mean_the_same(form, tmp_path):
    expand_adapter(ADAPTERS["shared"], tmp_path / "out", form)
    assert_updates(added(loaded(tmp_path / "out", 8)), ADAPTERS["shared"])
