"""What a merged model says is what the adapter says on its base: architectures, kinds of layers, settings of LoRA.

The other side is PEFT's adapter as it stands, not PEFT's own merge.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import bert, edit, gpt2, llama, lora
from transformers import AutoModelForCausalLM

from lorapack.errors import InputError
from lorapack.merge.merge import merge_adapter
from lorapack.read import read_adapter
from lorapack.verify import verify
from lorapack.write import write_adapter

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"vocab_size": 128, **SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def seeded(make):
    def model():
        torch.manual_seed(0)
        return make()

    return model


@seeded
def roberta():
    config = transformers.RobertaConfig(vocab_size=128, **SMALL, max_position_embeddings=66, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


@seeded
def t5():
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


@seeded
def whisper():
    halves = {
        f"{half}_{name}": n
        for half in ("encoder", "decoder")
        for name, n in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
    }
    config = transformers.WhisperConfig(
        vocab_size=128,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        **halves,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


@seeded
def gemma3():
    config = transformers.Gemma3TextConfig(vocab_size=128, **SMALL, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma3ForCausalLM(config)


@seeded
def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))


@seeded
def qwen3_moe():
    config = transformers.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


@seeded
def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LINEAR = {"target_modules": [*ATTENTION, *MLP]}
CLASSIFIER = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "bias": "lora_only"}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CONVOLUTIONS = {"target_modules": r".*convolution", "task_type": None}
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 6}, "alpha_pattern": {r"layers\.0\..*": 32}}
CASES = {
    "llama": (llama, LINEAR),
    "llama rslora": (llama, {**LINEAR, "use_rslora": True}),
    "llama patterns": (llama, {**LINEAR, **PATTERNS}),
    "llama dora": (llama, {**LINEAR, "use_dora": True}),
    "llama dora rslora patterns": (llama, {**LINEAR, **PATTERNS, "use_dora": True, "use_rslora": True}),
    "llama embedding": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "llama dora embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "llama saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "gpt2 tied embedding": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "gpt2 tied head": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
    "gpt2 both tied": (gpt2, {"target_modules": ["wte", "lm_head"]}),
    "gpt2 saved tied head": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], **CLASSIFIER}),
    "roberta": (roberta, {"target_modules": ["query", "value", "dense"], **CLASSIFIER, "use_dora": True}),
    "t5": (t5, {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "whisper": (whisper, {"target_modules": ["q_proj", "v_proj", "fc1"], "task_type": None}),
    "whisper rslora": (
        whisper,
        {"target_modules": ["q_proj", "out_proj"], "task_type": "SEQ_2_SEQ_LM", "use_rslora": True},
    ),
    "gemma3": (gemma3, LINEAR),
    "gemma3 tied embedding": (gemma3, {"target_modules": ["q_proj", "embed_tokens"]}),
    "mixtral": (mixtral, EXPERTS),
    "mixtral down only": (mixtral, {"target_parameters": ["experts.down_proj"], "target_modules": ["v_proj"]}),
    "qwen3 experts": (qwen3_moe, {**EXPERTS, "use_rslora": True}),
    "resnet": (resnet, CONVOLUTIONS),
    "resnet dora": (resnet, {**CONVOLUTIONS, "use_dora": True}),
}


def moved(path):
    """Every tensor of an adapter a little off its beginning, as after training."""
    file = path / "adapter_model.safetensors"
    torch.manual_seed(1)
    tensors = {n: t if "base_layer" in n else t * (1 + 0.2 * torch.rand_like(t)) for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_a_merged_model_says_what_the_adapter_says(tmp_path, model, options):
    model().save_pretrained(tmp_path / "base")
    adapter = moved(lora(model(), tmp_path / "adapter", **options))
    merge_adapter(adapter, tmp_path / "out", tmp_path / "base")
    found = verify(adapter, tmp_path / "out", tmp_path / "base")
    assert found.same, found.reasons
    assert found.mean < 1e-4 * found.effect


def test_a_merged_compact_adapter_says_what_its_shared_layers_say(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    found = read_adapter(lora(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"]))
    first = found.modules["model.layers.0.self_attn.q_proj"]
    shared = {
        module: replace(pointer, factors=first.factors, scale=n + 1.0) if "q_proj" in module else pointer
        for n, (module, pointer) in enumerate(found.modules.items())
    }
    found = found.with_pool({p.factors: found.pool[p.factors] for p in shared.values()}, shared)
    write_adapter(found, tmp_path / "compact")
    merge_adapter(tmp_path / "compact", tmp_path / "out", tmp_path / "base", verify=True)
    assert verify(tmp_path / "compact", tmp_path / "out", tmp_path / "base").mean < 1e-4
    assert not verify(tmp_path / "adapter", tmp_path / "out", tmp_path / "base").same


def test_several_adapters_are_added_by_their_weights(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    weights, exact = {"one": 0.7, "two": -0.4}, {}
    for n, (name, weight) in enumerate(weights.items()):
        lora(llama(), tmp_path / name, seed=n, r=4 + n, target_modules=[["q_proj", "v_proj"], ["q_proj", "o_proj"]][n])
        merge_adapter(tmp_path / name, tmp_path / f"{name} alone", tmp_path / "base", dtype="float32")
        before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", f"{name} alone"))
        for key, tensor in before.items():
            exact[key] = exact.get(key, tensor.double()) + weight * (after[key].double() - tensor.double())
    merge_adapter(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", tmp_path / "base", weights=list(weights.values())
    )
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), exact[key], atol=1e-6, rtol=1e-6, msg=key)
    assert json.loads((tmp_path / "out" / "lorapack_merge.json").read_text())["weights"] == [0.7, -0.4]


def test_what_has_no_sum_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    one = lora(llama(), tmp_path / "one", target_modules=["q_proj"])
    two = lora(llama(), tmp_path / "two", target_modules=["q_proj"], use_dora=True)
    three = lora(llama(), tmp_path / "three", target_modules=["q_proj"], modules_to_save=["lm_head"])
    for adapters, weights, message in (
        ([one, two], [0.5, 0.5], "cannot be weighed"),
        ([one, three], [0.5, 0.5], "lm_head"),
        ([two], [0.5], "cannot be weighed"),
        ([one, one], None, "--weights"),
        ([one, one], [0.5], "2 adapters"),
        ([one], [float("nan")], "finite"),
    ):
        with pytest.raises(InputError, match=message):
            merge_adapter(adapters, tmp_path / "out", tmp_path / "base", weights=weights)
    edit(two / "adapter_config.json", base_model_name_or_path="another")
    with pytest.raises(InputError, match="different base models"):
        merge_adapter([one, two], tmp_path / "out", weights=[1, 1])
    assert not (tmp_path / "out").exists()


def test_an_untied_model_keeps_its_index_and_the_other_end(tmp_path):
    gpt2().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    adapter = lora(gpt2(), tmp_path / "adapter", target_modules=["wte"])
    merge_adapter(adapter, tmp_path / "out", tmp_path / "base")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = model.state_dict()
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_another_embedding_below_a_lora_is_at_both_ends_of_a_tied_model(tmp_path, target):
    """PEFT saves it with the adapter and loads it into the tensor that both ends are."""
    gemma3().save_pretrained(tmp_path / "base")
    adapter = moved(lora(gemma3(), tmp_path / "adapter", target_modules=["q_proj", target]))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    below = [name for name in tensors if "base_layer" in name]
    assert below
    save_file(tensors | {n: tensors[n].flip(0).contiguous() for n in below}, file, metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "out", tmp_path / "base")
    found = verify(adapter, tmp_path / "out", tmp_path / "base")
    assert found.same, found.reasons
    assert found.mean < 1e-4 * found.effect


def test_experts_whose_place_is_not_certain_are_refused(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(mixtral(), LoraConfig(r=4, init_lora_weights=False, **EXPERTS))
    wrapped.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "base" / "config.json", model_type="olmoe")
    with pytest.raises(InputError, match="not certain"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    edit(tmp_path / "base" / "config.json", model_type="mixtral", num_local_experts=8)
    with pytest.raises(InputError, match="fit neither"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
