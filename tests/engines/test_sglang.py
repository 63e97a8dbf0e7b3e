"""SGLang's own code on what is written for it: `make engines` downloads the package."""

from types import SimpleNamespace

import pytest
import torch
from released import released
from safetensors.torch import load_file
from serving import ADAPTERS, ALL, SHAPES, adapter, assert_updates
from support import ADAPTER, BASE, llama
from transformers import AutoModelForCausalLM

from lorapack import InputError, expand_adapter, read_adapter

ONE_GPU = SimpleNamespace(
    **dict.fromkeys(("tp_size", "attn_tp_size", "moe_ep_size", "moe_tp_size"), 1),
    **dict.fromkeys(("tp_rank", "moe_ep_rank", "moe_tp_rank"), 0),
)
SGLANG = released(
    "sglang",
    {f"sglang.srt.lora.{name}" for name in ("lora", "lora_config", "lora_manager", "mem_pool", "utils")}
    | {"sglang.srt.layers.utils.common"},
    {
        "sglang.srt.runtime_context": {"get_parallel": lambda: ONE_GPU},
        "sglang.srt.lora.layers": {"unwrap_lora_layer": lambda layer: layer},
        "sglang.srt.utils": {"is_pin_memory_available": lambda: False},
    },
)
for user in ("lora", "mem_pool"):  # they import it through a package that is hollow
    SGLANG[user].get_layer_id = SGLANG["common"].get_layer_id
SOURCES = {**ADAPTERS, "the fixture": read_adapter(ADAPTER)}
STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Layer:
    """A layer on one GPU: nothing is cut out of the factors."""

    base_layer = None

    def slice_lora_a_weights(self, a):
        return a

    slice_lora_b_weights = slice_lora_a_weights


def loaded(directory, base):
    """Let SGLang check the adapter and put it into its pool of memory; the pool and the adapter."""
    config = SGLANG["lora_config"].LoRAConfig(str(directory), base_vocab_size=base.config.vocab_size)
    manager = object.__new__(SGLANG["lora_manager"].LoRAManager)
    vars(manager).update(lora_refs={}, attn_dp_enabled=False, base_model=base, configs={"x": config})
    vars(manager).update(lora_added_tokens_size=None, max_loras_per_batch=2, num_pinned_loras=0)
    manager.init_lora_shapes()
    pool = SGLANG["mem_pool"].LoRAMemoryPool(
        base.config,
        1,
        torch.float32,
        manager.max_lora_rank,
        manager.target_modules,
        base,
        "lru",
        0,
        strict_loading=True,
    )
    manager.memory_pool = pool
    reference = SimpleNamespace(lora_name="x", lora_path=str(directory), pinned=False)
    manager.validate_new_adapter(config, reference)
    found = SGLANG["lora"].LoRAAdapter("x", config, base.config, None, None)
    found.initialize_weights_from_tensors(load_file(directory / "adapter_model.safetensors"))
    targets = manager.target_modules - {"embed_tokens", "lm_head"}
    layers = [
        {f"model.layers.{n}.{'mlp' if 'up' in t or 'down' in t else 'self_attn'}.{t}": Layer() for t in targets}
        for n in range(base.config.num_hidden_layers)
    ]
    outer = (Layer() if name in manager.target_modules else None for name in ("embed_tokens", "lm_head"))
    pool.load_lora_weight_to_buffer("x", 0, found, layers, *outer)
    return pool, found


def computed(pool, adapter, base):
    """What the pool's buffers and the adapter's scale add to each module, as SGLang's kernels cut them."""
    found, rank = {}, adapter.config.r
    for target, buffers in pool.A_buffer.items():
        for n, stacked in enumerate(buffers):
            a, b = stacked[0].double(), pool.B_buffer[target][n][0].double()
            row = 0
            for i, part in enumerate(STACKS.get(target, (target,))):
                stem = f"model.layers.{n}.{'mlp' if part in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}"
                rows = base.get_submodule(f"{stem}.{part}").out_features
                product = b[row : row + rows, :rank] @ a[i * rank : (i + 1) * rank]
                found[f"{stem}.{part}"], row = adapter.scaling * product, row + rows
            assert row == len(b)
    for kind, place in (("embedding", "model.embed_tokens"), ("lm_head", "lm_head")):
        target = place.rpartition(".")[2]
        if target in pool.target_modules:
            a, b = (getattr(pool, f"{kind}_{part}_buffer")[target][0].double() for part in "AB")
            found[place] = adapter.scaling * b @ a
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = llama()
    model.save_pretrained(tmp_path_factory.mktemp("served"))
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_it_accepts_the_directory_and_computes_the_adapter(name, base, tmp_path):
    if name == "the fixture":
        base = AutoModelForCausalLM.from_pretrained(BASE)
    base.config.save_pretrained(tmp_path / "base")
    expand_adapter(SOURCES[name], tmp_path / "out", "sglang", base=tmp_path / "base")
    assert_updates(computed(*loaded(tmp_path / "out", base), base), SOURCES[name])


@pytest.mark.parametrize("name", ["ranks and scales differ", "shared", "only k"])
def test_the_plain_form_of_these_it_would_not_take(name, base, tmp_path):
    expand_adapter(ADAPTERS[name], tmp_path / "out", "peft")
    with pytest.raises((AssertionError, KeyError, ValueError, RuntimeError)):
        loaded(tmp_path / "out", base)


def test_rslora_and_patterns_it_would_overlook(base, tmp_path):
    source = adapter(ALL, scales=(2.0, 4.0), use_rslora=True)
    expand_adapter(source, tmp_path / "out", "peft")
    with pytest.raises(AssertionError):
        assert_updates(computed(*loaded(tmp_path / "out", base), base), source)


def test_what_is_refused_it_would_leave_out_without_a_word(base, tmp_path):
    source = adapter(ALL, carried={"base_model.model.model.norm.weight": torch.ones(32)}, modules_to_save=["norm"])
    with pytest.raises(InputError, match=r"does not take model\.norm\.weight"):
        expand_adapter(source, tmp_path / "no", "sglang")
    expand_adapter(source, tmp_path / "out", "peft")
    _, found = loaded(tmp_path / "out", base)
    names = {name for layer in found.layers for name in layer.weights} | set(found.embedding_layers)
    assert not [name for name in names if "norm" in name]
    assert set(SHAPES) <= {key.split(".", 3)[3] for key in computed(*loaded(tmp_path / "out", base), base)}
