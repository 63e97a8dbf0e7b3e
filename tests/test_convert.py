"""Other tools' formats: what comes back is what went in, what their own code makes of ours, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import ADAPTER, BASE, llama, lora, refused, run
from torch import nn

from lorapack import convert_adapter, read_adapter, write_adapter
from lorapack.convert.diffusers import from_diffusers, to_diffusers
from lorapack.convert.kohya import NAMES, from_kohya, to_kohya
from lorapack.convert.loralib import from_loralib
from lorapack.convert.mlx import from_mlx
from lorapack.convert.names import dotted, underscored
from lorapack.convert.pairs import Pair, adapter_of
from lorapack.core.adapter import Adapter
from lorapack.errors import InputError


def same(one: Adapter, two: Adapter) -> None:
    """The same modules with the same factors, bit for bit, and the same scales to the last digit but one."""
    assert list(one.modules) == list(two.modules)
    for module in one.modules:
        for mine, theirs in zip(pair(one, module), pair(two, module), strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), module
        assert one.scale(module) == pytest.approx(two.scale(module), rel=1e-15), module


def pair(adapter: Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return adapter.factors(module).A, adapter.factors(module).B


def product(adapter: Adapter, module: str) -> torch.Tensor:
    """s * B @ A in float64, the kernel of a convolution flattened."""
    a, b = (t.double().flatten(1) for t in pair(adapter, module))
    return adapter.scale(module) * b @ a


# Round trips

WORDS = st.text("abxy_019", min_size=1, max_size=5)
NAMES_OF = {
    "unet": st.lists(WORDS, min_size=1, max_size=4).map(lambda parts: ".".join(["down_blocks.0", *parts])),
    "text_encoder": st.lists(WORDS, min_size=1, max_size=4).map(lambda parts: ".".join(["text_model", *parts])),
}
ALPHAS = st.floats(1e-3, 1e4) | st.integers(1, 256).map(float) | st.floats(0.125, 16, width=32)


@st.composite
def parts(draw) -> dict[str, Adapter]:
    """Adapters of a UNet and perhaps a text encoder: any names, shapes, ranks, types and alphas."""
    found = {}
    for component in draw(st.sampled_from([["unet"], ["text_encoder"], ["unet", "text_encoder"]])):
        names = draw(st.lists(NAMES_OF[component], min_size=1, max_size=4, unique_by=underscored))
        pairs = {}
        for name in names:
            rank, d_out, d_in = (draw(st.integers(1, 5)) for _ in range(3))
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
            kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
            down = torch.randn(rank, d_in, *kernel).to(dtype)
            up = torch.randn(d_out, rank, *[1 for _ in kernel]).to(dtype)
            pairs[name] = Pair(down, up, draw(ALPHAS))
        found[component] = adapter_of(pairs, "drawn")
    return found


@settings(deadline=None)
@given(parts())
def test_kohya_and_back_loses_nothing(found):
    tensors, metadata = to_kohya(found)
    again = from_kohya(tensors, metadata, {}, "file")
    with_base = from_kohya(tensors, {}, {name: adapter.modules for name, adapter in found.items()}, "file")
    for name, adapter in found.items():
        same(again[name], adapter)
        same(with_base[name], adapter)


@settings(deadline=None)
@given(parts())
def test_diffusers_format_and_back_loses_nothing(found):
    again = from_diffusers(*to_diffusers(found), "file")
    for name, adapter in found.items():
        same(again[name], adapter)


UNET = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.upsamplers.0.conv",
]
TEXT = ["text_model.encoder.layers.10.self_attn.q_proj", "text_model.encoder.layers.10.mlp.fc1"]


def pipeline(dtype=torch.float32) -> dict[str, Adapter]:
    torch.manual_seed(0)
    kernels = {"mid_block.resnets.0.conv1": (3, 3), "up_blocks.1.upsamplers.0.conv": (3, 3)}
    found = {}
    for component, names in (("unet", UNET), ("text_encoder", TEXT)):
        pairs = {}
        for rank, name in enumerate(names, 2):
            kernel = kernels.get(name, ())
            down, up = torch.randn(rank, 8, *kernel), torch.randn(6, rank, *[1 for _ in kernel])
            pairs[name] = Pair(down.to(dtype), up.to(dtype), 1.5 * rank)
        found[component] = adapter_of(pairs, "made")
    return found


def test_the_command_line_takes_a_pipeline_through_all_formats_and_back(tmp_path):
    for name, adapter in pipeline(torch.bfloat16).items():
        write_adapter(adapter, tmp_path / "peft" / name)
    steps = [("peft", "k.safetensors", "kohya"), ("k.safetensors", "d.safetensors", "diffusers")]
    steps += [("d.safetensors", "back", "peft")]
    for source, out, to in steps:
        done = run("convert", tmp_path / source, "-o", tmp_path / out, "--to", to)
        assert done.returncode == 0, done.stderr
        assert "4 modules of the unet" in done.stdout and "2 modules of the text_encoder" in done.stdout
    assert set(load_file(tmp_path / "k.safetensors")) >= {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0.alpha",
        "lora_te_text_model_encoder_layers_10_mlp_fc1.lora_down.weight",
    }
    for name, adapter in pipeline(torch.bfloat16).items():
        same(read_adapter(tmp_path / "back" / name), adapter)


def test_a_compact_adapter_is_converted_as_its_expanded_form(tmp_path):
    found = pipeline()["unet"]
    first = next(iter(found.modules.values()))
    twins = adapter_of({f"down_blocks.{n}.resnets.0.conv": Pair(*pair(found, UNET[0]), 3.0) for n in (0, 1)}, "made")
    pointers = {m: type(p)("shared", first.scale * (n + 1)) for n, (m, p) in enumerate(twins.modules.items())}
    compact = twins.with_pool({"shared": found.factors(UNET[0])}, pointers)
    write_adapter(compact, tmp_path / "compact")
    assert json.loads((tmp_path / "compact" / "adapter_config.json").read_text())["peft_type"] == "LORAPACK"
    convert_adapter(tmp_path / "compact", tmp_path / "k.safetensors", "kohya")
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "plain")
    same(read_adapter(tmp_path / "plain"), compact)


# Names


def diffusers_models() -> dict[str, nn.Module]:
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "cross_attention_dim": 2048,
    }
    with torch.device("meta"):
        return {
            "sd15": diffusers.UNet2DConditionModel(cross_attention_dim=768),
            "sdxl": diffusers.UNet2DConditionModel(**sdxl),
            "flux": diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "sd3": diffusers.SD3Transformer2DModel(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
            "clip": CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=12, hidden_size=768)),
            "t5": T5EncoderModel(T5Config(num_layers=11, d_model=64, feed_forward_proj="gated-gelu")),
        }


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return diffusers_models()


def layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux", "sd3", "clip", "t5"])
def test_the_dots_of_every_layer_of_the_known_models_are_found_again(models, kind):
    names = layers(models[kind])
    assert len(names) > 60
    for name in names:
        assert dotted(underscored(name), "file") == name


def test_a_name_of_an_unknown_model_is_refused_and_the_way_out_named(tmp_path):
    tensors = {f"lora_unet_odd_thing_0.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    with pytest.raises(InputError, match=r"odd_thing_0.*not certain.*--base"):
        from_kohya(tensors, {}, {}, "file")
    (tmp_path / "base").mkdir()
    weights = {"conv_in.weight": torch.ones(1), "odd.thing_0.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "k.safetensors")
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "out", base=str(tmp_path / "base"))
    assert list(read_adapter(tmp_path / "out").modules) == ["odd.thing_0"]
    tensors |= {f"lora_unet_other.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    with pytest.raises(InputError, match="other is no module of the base's unet"):
        from_kohya(tensors, {}, {"unet": ["odd.thing_0"]}, "file")


@pytest.mark.parametrize("prefix", ["lora_unet", "lora_transformer"])
def test_a_transformer_is_known_by_its_names_under_either_prefix(prefix):
    name = "single_transformer_blocks.3.attn.to_q"
    tensors = {f"{prefix}_{underscored(name)}.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    for names in ({}, {"transformer": [name, "proj_out"]}):
        found = from_kohya(tensors, {}, names, "file")
        assert list(found) == ["transformer"] and list(found["transformer"].modules) == [name]


def test_two_adapters_for_one_transformer_are_refused():
    name = underscored("single_transformer_blocks.3.attn.to_q")
    stems = [
        f"{prefix}_{name}.lora_{half}.weight" for prefix in ("lora_transformer", "lora_unet") for half in ("down", "up")
    ]
    with pytest.raises(InputError, match="two adapters for the transformer"):
        from_kohya(dict.fromkeys(stems, torch.ones(2, 2)), {}, {}, "file")


def test_names_that_kohya_cannot_tell_apart_are_refused():
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    found = adapter_of({"down_blocks.0.a_b": Pair(a, b), "down_blocks.0.a.b": Pair(a, b)}, "made")
    with pytest.raises(InputError, match=r"down_blocks\.0\.a.b and down_blocks\.0\.a.b of the unet have the same name"):
        to_kohya({"unet": found})


@pytest.mark.parametrize("listed", ["[]", "{", '{"unet": 3}', '{"unet": ["a.b", 7]}', '{"unet": ["elsewhere"]}'])
def test_a_list_of_names_that_does_not_fit_changes_nothing(listed):
    tensors, _ = to_kohya(pipeline())
    for name, adapter in from_kohya(tensors, {NAMES: listed}, {}, "file").items():
        same(adapter, pipeline()[name])


def test_clip_without_its_first_step_keeps_its_published_name_in_the_file():
    flat = {"encoder.layers.0.self_attn.q_proj": Pair(torch.ones(2, 3), torch.ones(4, 2))}
    found = {"text_encoder": adapter_of(flat, "made")}
    tensors, metadata = to_kohya(found)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    same(from_kohya(tensors, metadata, {}, "file")["text_encoder"], found["text_encoder"])


# What the other tools' own code makes of it


def small_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def said(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, 10, context).sample


ON_UNET = {
    "target_modules": ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj"],
    "task_type": None,
    "lora_alpha": 6,
    "rank_pattern": {"to_q": 2, "conv1": 3},
}
ALPHAS_DIFFER = {"alpha_pattern": {"to_v": 3}}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_own_loader_makes_the_same_model_of_our_file_as_peft_of_the_adapter(tmp_path, form):
    from diffusers import StableDiffusionPipeline

    options = ON_UNET | (ALPHAS_DIFFER if form == "diffusers" else {})
    lora(small_unet(), tmp_path / "adapter", **options)
    convert_adapter(tmp_path / "adapter", tmp_path / "made.safetensors", form)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name="made.safetensors", return_lora_metadata=True
    )
    assert bool(alphas) == (form == "kohya") and bool(metadata) == (form == "diffusers")
    unet = small_unet()
    plain = said(unet)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    theirs = said(PeftModel.from_pretrained(small_unet(), tmp_path / "adapter"))
    torch.testing.assert_close(said(unet), theirs)
    assert not torch.allclose(plain, theirs, atol=1e-3)


def test_the_loader_of_kohyas_scripts_in_lycoris_makes_the_same_model_of_our_file(tmp_path):
    kohya = pytest.importorskip("lycoris.kohya")
    lora(small_unet(), tmp_path / "adapter", **ON_UNET, **ALPHAS_DIFFER)
    convert_adapter(tmp_path / "adapter", tmp_path / "made.safetensors", "kohya")
    unet = small_unet()
    kohya.LycorisNetworkKohya.apply_preset(
        {"unet_target_module": [], "unet_target_name": []}
    )  # what the file has alone
    network, weights = kohya.create_network_from_weights(1.0, str(tmp_path / "made.safetensors"), None, None, unet)
    network.apply_to(None, unet, apply_text_encoder=False, apply_unet=True)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name]
    theirs = said(PeftModel.from_pretrained(small_unet(), tmp_path / "adapter"))
    torch.testing.assert_close(said(unet), theirs)
    assert len(network.unet_loras) == len(read_adapter(tmp_path / "adapter").modules)


def test_alphas_that_diffusers_misreads_in_a_kohya_file_are_pointed_out(tmp_path):
    lora(small_unet(), tmp_path / "one", **ON_UNET)
    lora(small_unet(), tmp_path / "two", **ON_UNET, **ALPHAS_DIFFER)
    assert not convert_adapter(tmp_path / "one", tmp_path / "one.safetensors", "kohya").notes
    (note,) = convert_adapter(tmp_path / "two", tmp_path / "two.safetensors", "kohya").notes
    assert "alphas" in note and "--to diffusers" in note


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_own_loader_takes_our_text_encoder(tmp_path, form):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    def clip():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return CLIPTextModel(CLIPTextConfig(vocab_size=64, eos_token_id=63, **sizes)).eval()

    lora(clip(), tmp_path / "peft" / "text_encoder", target_modules=["q_proj", "out_proj", "fc1"], task_type=None)
    convert_adapter(tmp_path / "peft", tmp_path / "made.safetensors", form)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name="made.safetensors", return_lora_metadata=True
    )
    encoder, ids = clip(), torch.arange(20)[None]
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, encoder, "text_encoder", metadata=metadata)
    theirs = PeftModel.from_pretrained(clip(), tmp_path / "peft" / "text_encoder")
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state, theirs(ids).last_hidden_state)
        assert not torch.allclose(encoder(ids).last_hidden_state, clip()(ids).last_hidden_state, atol=1e-3)


def test_what_diffusers_saves_is_read(tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    lora(small_unet(), tmp_path / "adapter", **ON_UNET, **ALPHAS_DIFFER)
    model = PeftModel.from_pretrained(small_unet(), tmp_path / "adapter")
    state = {n.removeprefix("base_model.model."): t for n, t in get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", convert_state_dict_to_diffusers(state), unet_lora_adapter_metadata=config
    )
    convert_adapter(tmp_path / "theirs", tmp_path / "back")
    same(read_adapter(tmp_path / "back"), read_adapter(tmp_path / "adapter"))


def test_the_older_names_of_diffusers_are_read_as_diffusers_reads_them():
    pytest.importorskip("diffusers")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    old = {f"{attention}.to_{part}_lora.{half}.weight" for part in ("q", "k", "v", "out") for half in ("down", "up")}
    text = "text_model.encoder.layers.3.self_attn"
    older = {f"{text}.to_{part}_lora.{half}.weight" for part in ("q", "k", "v", "out") for half in ("down", "up")}
    middle = {f"{text}.q_proj.lora_linear_layer.{half}.weight" for half in ("down", "up")}
    for component, names, theirs in (
        ("unet", old, convert_unet_state_dict_to_peft),
        ("text_encoder", older, convert_state_dict_to_peft),
        ("text_encoder", middle, convert_state_dict_to_peft),
    ):
        tensors = {f"{component}.{name}": torch.ones(2, 2) for name in names}
        found = from_diffusers(tensors, {}, "file")[component]
        assert {f"{m}.lora_{half}.weight" for m in found.modules for half in "AB"} == set(
            theirs(dict.fromkeys(names, torch.ones(2, 2)))
        )


def test_sdxl_under_its_original_names_is_read_as_diffusers_reads_it(models):
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    blocks = {"input_blocks_4_1", "input_blocks_8_1", "middle_block_1", "output_blocks_0_1", "output_blocks_5_1"}
    names = [
        f"{b}_transformer_blocks_1_{part}" for b in blocks for part in ("attn1_to_q", "attn2_to_out_0", "ff_net_2")
    ]
    names += [f"{block}_proj_in" for block in blocks]
    resnets = ("input_blocks_1_0", "input_blocks_7_0", "middle_block_0", "middle_block_2", "output_blocks_8_0")
    names += [f"{r}_{part}" for r in resnets for part in ("in_layers_2", "out_layers_3", "emb_layers_1")]
    names += ["input_blocks_4_0_skip_connection", "input_blocks_3_0_op", "output_blocks_2_2_conv", "input_blocks_0_0"]
    names += ["time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2"]
    tensors = {f"lora_unet_{n}.lora_{half}.weight": torch.ones(2, 2) for n in names for half in ("down", "up")}
    found = from_kohya(tensors, {}, {}, "file")["unet"]
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(dict(tensors), models["sdxl"].config)
    )
    theirs = convert_unet_state_dict_to_peft({n.removeprefix("unet."): t for n, t in theirs.items()})
    assert {f"{m}.lora_A.weight" for m in found.modules} == {n for n in theirs if "lora_A" in n}
    assert set(found.modules) <= set(layers(models["sdxl"]))


def test_flux_under_its_original_names_is_cut_as_diffusers_cuts_it(models):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    torch.manual_seed(0)
    sizes = {
        "double_blocks_3_img_attn_qkv": (3 * 3072, 3072),
        "double_blocks_3_txt_attn_qkv": (3 * 3072, 3072),
        "double_blocks_3_img_attn_proj": (3072, 3072),
        "double_blocks_3_txt_mlp_2": (3072, 4 * 3072),
        "double_blocks_3_img_mod_lin": (6 * 3072, 3072),
        "single_blocks_9_linear1": (7 * 3072, 3072),
        "single_blocks_9_linear2": (3072, 5 * 3072),
        "single_blocks_9_modulation_lin": (3 * 3072, 3072),
    }
    tensors = {}
    for name, (d_out, d_in) in sizes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, d_in)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(d_out, 2)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    found = from_kohya(tensors, {}, {}, "file")["transformer"]
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    real = layers(models["flux"])
    assert {f"transformer.{m}.lora_A.weight" for m in found.modules} == {n for n in theirs if "lora_A" in n}
    rows = slice(None, None, 61)
    for module in found.modules:
        assert found.factors(module).shape == real[module]
        a, b = (theirs[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        ours = found.scale(module) * found.factors(module).B[rows] @ found.factors(module).A
        torch.testing.assert_close(ours, b[rows] @ a)


def test_the_last_layer_of_flux_has_its_halves_swapped():
    from diffusers.loaders.lora_conversion_utils import swap_scale_shift

    stem, up = "lora_unet_final_layer_adaLN_modulation_1", torch.randn(8, 2)
    found = from_kohya({f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": up}, {}, {}, "file")
    assert torch.equal(found["transformer"].factors("norm_out.linear").B, swap_scale_shift(up))


def test_the_layers_of_the_early_format_are_those_of_the_real_models(models):
    from lorapack.convert.cloneofsimo import _text_encoder, _unet

    for made, model, wanted in (
        (_unet(), models["sd15"], (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj")),
        (_text_encoder(), models["clip"], (".q_proj", ".k_proj", ".v_proj", ".out_proj")),
    ):
        real = {n.removeprefix("text_model."): s for n, s in layers(model).items() if n.endswith(wanted)}
        assert {n.removeprefix("text_model."): shape for n, shape in made.items()} == real


def test_the_early_format_is_read_by_the_order_of_the_layers_and_refused_for_another_model():
    from lorapack.convert.cloneofsimo import _text_encoder, _unet, from_cloneofsimo

    tensors = {}
    for component, shapes in (("unet", _unet()), ("text_encoder", _text_encoder())):
        for at, (d_out, d_in) in enumerate(shapes.values()):
            tensors[f"{component}:{at}:down"] = torch.full((1, d_in), float(at))
            tensors[f"{component}:{at}:up"] = torch.ones(d_out, 1)
    found = from_cloneofsimo(tensors, "file")
    a = found["unet"].factors("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k").A
    assert (
        a.shape == (1, 768)
        and a[0, 0] == 6 * 9 + 6
        and found["unet"].scale("mid_block.attentions.0.transformer_blocks.0.attn1.to_q") == 1
    )
    assert found["text_encoder"].factors("text_model.encoder.layers.1.self_attn.q_proj").A[0, 0] == 6
    for name, tensor, needle in (
        ("unet:0:up", torch.ones(640, 1), "another model"),
        ("unet:200:up", torch.ones(640, 1), "145 layers"),
        ("<s1>", torch.ones(768), "<s1>"),
    ):
        with pytest.raises(InputError, match=needle):
            from_cloneofsimo(tensors | {name: tensor}, "file")


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, True], [True, True, True]])
def test_loralibs_merged_projections_act_as_in_loralib(enabled):
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layer = loralib.MergedLinear(8, 12, r=2, lora_alpha=5, enable_lora=enabled, bias=False)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8)
    layer.train()
    theirs = layer(x) - x @ layer.weight.T
    state = {f"h.0.attn.c_attn.{n}": t.detach() for n, t in layer.state_dict().items() if "lora" in n}
    found = from_loralib(state, 5.0, enabled, "file")
    torch.testing.assert_close((product(found, "h.0.attn.c_attn").float() @ x.T).T, theirs)
    with pytest.raises(InputError, match="--enable-lora"):
        from_loralib(state, 5.0, None, "file")


def test_a_loralib_file_becomes_a_peft_adapter_with_its_head(tmp_path):
    head = {"classifier.out_proj.weight": torch.ones(3, 4), "classifier.out_proj.bias": torch.ones(3)}
    query = "roberta.encoder.layer.0.attention.self.query"
    torch.save({f"{query}.lora_A": torch.ones(2, 4), f"{query}.lora_B": torch.ones(4, 2), **head}, tmp_path / "x.bin")
    told = refused(run("convert", tmp_path / "x.bin", "-o", tmp_path / "out"))
    assert "--alpha" in told and not (tmp_path / "out").exists()
    done = run("convert", tmp_path / "x.bin", "-o", tmp_path / "out", "--alpha", 16, "--base", "roberta-base")
    assert done.returncode == 0, done.stderr
    found = read_adapter(tmp_path / "out")
    assert found.scale(query) == 8 and found.task_type == "SEQ_CLS" and found.base_model == "roberta-base"
    assert found.config["modules_to_save"] == ["classifier"] and len(found.carried) == 2


def test_mlx_acts_as_in_mlx(tmp_path):
    torch.manual_seed(0)
    sizes = {"model.layers.3.self_attn.q_proj": (8, 6), "model.layers.3.mlp.down_proj": (4, 5)}
    tensors = {}
    for name, (d_in, d_out) in sizes.items():
        tensors |= {f"{name}.lora_a": torch.randn(d_in, 2), f"{name}.lora_b": torch.randn(2, d_out)}
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 4, "model": "some/base"}
    config["lora_parameters"] = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    done = run("convert", tmp_path / "mlx", "-o", tmp_path / "out")
    assert done.returncode == 0 and "mlx to peft, 2 modules" in done.stdout, done.stderr
    found = read_adapter(tmp_path / "out")
    assert found.base_model == "some/base"
    for name, (d_in, _) in sizes.items():
        x = torch.randn(3, d_in, dtype=torch.float64)
        theirs = 20.0 * (x @ tensors[f"{name}.lora_a"].double()) @ tensors[f"{name}.lora_b"].double()
        torch.testing.assert_close(x @ product(found, name).T, theirs)
    with pytest.raises(InputError, match="DoRA"):
        from_mlx({**config, "fine_tune_type": "dora"}, tensors, "mlx")
    with pytest.raises(InputError, match="experts"):
        from_mlx(config, {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(2, 2, 2)}, "mlx")


# GGUF


def test_the_gguf_adapter_on_the_gguf_base_is_the_merged_model_in_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    from engines.gguf_base import write_base
    from transformers import AutoModelForCausalLM

    rank_pattern, alpha_pattern = {"q_proj": 2}, {r"layers\.1\..*": 3}
    options = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": True}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter", target_modules=targets, **options)
    convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base=str(BASE))
    done = run("merge", tmp_path / "adapter", "--base", BASE, "-o", tmp_path / "merged")
    assert done.returncode == 0, done.stderr

    def arrays(path):
        return {t.name: torch.tensor(t.data).double() for t in gguf.GGUFReader(path).tensors}

    base, merged = (arrays(write_base(d, tmp_path / f"{d.name}.gguf")) for d in (BASE, tmp_path / "merged"))
    made = arrays(tmp_path / "a.gguf")
    alpha = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.lora.alpha"].contents()
    touched = {name.removesuffix(".lora_a") for name in made if name.endswith(".lora_a")}
    assert len(touched) == 5 * len(targets) and len(made) == 2 * len(touched)
    for name in touched:
        a, b = made[f"{name}.lora_a"], made[f"{name}.lora_b"]
        torch.testing.assert_close(base[name] + alpha / a.shape[0] * b @ a, merged[name], atol=1e-6, rtol=1e-6)


def test_float16_in_gguf_is_float32_rounded_and_numbers_too_large_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    found = {}
    for dtype in ("float32", "float16"):
        convert_adapter(ADAPTER, tmp_path / f"{dtype}.gguf", base=str(BASE), dtype=dtype)
        found[dtype] = {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors}
    for name, array in found["float32"].items():
        assert (array.astype("float16") == found["float16"][name]).all()
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    (tmp_path / "large").mkdir()
    save_file({n: t * 1e6 for n, t in tensors.items()}, tmp_path / "large" / "adapter_model.safetensors")
    (tmp_path / "large" / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match="too large for float16"):
        convert_adapter(tmp_path / "large", tmp_path / "large.gguf", base=str(BASE), dtype="float16")
    assert not (tmp_path / "large.gguf").exists()


REFUSED_FOR_GGUF = {
    "an embedding tied to the head": ({"target_modules": ["embed_tokens"]}, {}, "tied"),
    "a head tied to the embedding": ({"target_modules": ["lm_head"]}, {}, "tied"),
    "saved modules": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, "lm_head"),
    "another architecture": ({"target_modules": ["q_proj"]}, {"model_type": "mamba"}, "'mamba'"),
    "other heads": ({"target_modules": ["k_proj"]}, {"num_key_value_heads": 7}, "not 7 heads"),
    "no heads": ({"target_modules": ["k_proj"]}, {"num_attention_heads": None}, "num_attention_heads"),
}


@pytest.mark.parametrize("case", REFUSED_FOR_GGUF)
def test_what_llama_cpp_cannot_take_is_refused_by_name(tmp_path, case):
    pytest.importorskip("gguf")
    options, changes, needle = REFUSED_FOR_GGUF[case]
    model = llama(layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lora(model, tmp_path / "adapter", **options)
    (tmp_path / "base").mkdir()
    config = {**model.config.to_dict(), **changes}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=needle):
        convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base=str(tmp_path / "base"))
    assert not (tmp_path / "a.gguf").exists()


def test_without_the_gguf_package_one_line_says_how_to_get_it(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ImportError\n")
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    done = run("convert", ADAPTER, "-o", tmp_path / "a.gguf", "--base", BASE, PYTHONPATH=path)
    assert "pip install 'lorapack[gguf]'" in refused(done)


# What is refused


def half(name: str, *halves: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": torch.ones(2, 2) for part in halves}


OK = half("lora_unet_conv_in", "lora_down.weight", "lora_up.weight")
BAD = {
    "only one half": (half("lora_unet_conv_in", "lora_down.weight"), "lora_up"),
    "LoHa": (OK | half("lora_unet_conv_out", "hada_w1_a"), "LoHa"),
    "DoRA": (OK | half("lora_unet_conv_in", "dora_scale"), "DoRA"),
    "Tucker": (OK | half("lora_unet_conv_in", "lora_mid.weight"), "Tucker"),
    "an alpha of several numbers": (OK | half("lora_unet_conv_in", "alpha"), "one number"),
    "an unknown prefix": (OK | half("other_thing", "lora_down.weight", "lora_up.weight"), "other_thing"),
    "NaN": ({n: t * float("nan") for n, t in OK.items()}, "NaN"),
    "whole numbers": ({n: t.int() for n, t in OK.items()}, "int32"),
    "ranks that differ": (OK | {"lora_unet_conv_in.lora_up.weight": torch.ones(2, 3)}, "rank"),
    "a foreign tensor": ({"unet.conv_in.lora_A.weight": torch.ones(2, 2), "vae.x": torch.ones(1)}, "vae.x"),
    "no format": ({"model.weight": torch.ones(2, 2)}, "no format"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_and_unsupported_files_are_refused_by_name_and_nothing_is_written(tmp_path, case):
    tensors, needle = BAD[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=needle) as told:
        convert_adapter(tmp_path / "x.safetensors", tmp_path / "out")
    assert "\n" not in str(told.value) and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_language_model_has_no_place_in_kohyas_format_and_an_output_is_not_replaced(tmp_path):
    told = refused(run("convert", ADAPTER, "-o", tmp_path / "k.safetensors", "--to", "kohya"))
    assert "model.layers.0" in told
    (tmp_path / "a.gguf").write_text("mine")
    told = refused(run("convert", ADAPTER, "-o", tmp_path / "a.gguf", "--base", BASE))
    assert "exists" in told and (tmp_path / "a.gguf").read_text() == "mine"
    assert "--to" in refused(run("convert", ADAPTER, "-o", tmp_path / "peft"))
    for options, needle in (
        (("--to", "kohya", "--alpha", 4), "loralib"),
        (("--to", "kohya", "--dtype", "float16"), "--dtype"),
        (("--enable-lora", "yes"), "true,false,true"),
    ):
        assert needle in refused(run("convert", ADAPTER, "-o", tmp_path / "out", *options))
