"""A base whose weights are quantised: measured like the same weights as floats, and recovered, through them."""

from types import SimpleNamespace

import pytest
import torch
from support import attached, llama
from test_measure import texts

from lorapack.core.adapter import Factors
from lorapack.core.statistics import to_tensors
from lorapack.data.batches import batches
from lorapack.measure.moments import measure_moments
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.recover import Settings, recover

TYPES = ["q_proj", "v_proj", "down_proj"]
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module", params=[4, 8])
def case(request, tmp_path_factory):
    """A random Llama as a checkpoint of 4 or 8 bits; and one of the floats that those bits stand for."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tmp_path_factory.mktemp(f"bits{request.param}")
    adapter, plain = attached(llama(2), path, target_modules=TYPES)
    how = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if request.param == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    made = AutoModelForCausalLM.from_pretrained(path / "base", quantization_config=how, device_map="cpu")
    made.save_pretrained(path / "quantised")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "quantised" / name).write_bytes((path / "base" / name).read_bytes())
    with torch.no_grad():
        floats = dict(plain.base.named_modules())
        for name, layer in made.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                back = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
                back = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
            else:
                continue
            floats[name].get_submodule("base_layer" if hasattr(floats[name], "base_layer") else "").weight.copy_(back)
    loaded = load(adapter, str(path / "quantised"), device="cpu")
    return SimpleNamespace(bits=request.param, adapter=adapter, plain=plain, loaded=loaded, rows=texts())


def moments(case, loaded):
    point(loaded, place(case.adapter, loaded.device))
    return to_tensors(measure_moments(loaded, case.adapter.linear, batches(case.rows, 24, loaded.pad), loss=True))[0]


def test_the_moments_are_those_of_the_floats_the_bits_stand_for(case):
    quantised, floats = moments(case, case.loaded), moments(case, case.plain)
    for name, moment in floats.items():  # 8 bits: bitsandbytes rounds the inputs of a layer as well
        far = float((quantised[name] - moment).norm() / moment.norm())
        assert far < (1e-4 if case.bits == 4 else 0.05), (name, far)


def test_a_recovery_learns_through_frozen_bits(case):
    shrunk = {name: Factors(pair.A, 0.5 * pair.B) for name, pair in case.adapter.pool.items()}
    learner = case.adapter.with_pool(shrunk, case.adapter.modules)
    before = {name: value.clone() for name, value in case.loaded.base.state_dict().items() if "lora" not in name}
    how = Settings(steps=4, objective="kl", batch_size=4, learning_rate=1e-2)
    made, record = recover(case.loaded, case.adapter, learner, case.rows, case.rows, how)
    assert record.curve[-1][1] < 0.9 * record.curve[0][1]
    for name, pair in learner.pool.items():
        assert not torch.equal(made.pool[name].A, pair.A) and not torch.equal(made.pool[name].B, pair.B), name
    after = case.loaded.base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
