"""A base whose weights are quantised: measured like the same weights as floats, and recovered, through them."""

from types import SimpleNamespace

import pytest
import torch
from support import attached, llama
from test_measure import texts
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from lorapack.core.adapter import Factors
from lorapack.core.statistics import to_tensors
from lorapack.data.batches import batches
from lorapack.footprint import plan_memory
from lorapack.measure.moments import measure_moments
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.recover import Settings, recover

TYPES = ["q_proj", "v_proj", "down_proj"]


def nf4():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return how, lambda weight: bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def int8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=True), lambda weight: weight.CB.float() * weight.SCB[:, None] / 127


def torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig()), lambda weight: weight.dequantize()


@pytest.fixture(scope="module", params=[(nf4, 1e-4), (int8, 0.05), (torchao, 1e-4)], ids=["nf4", "int8", "torchao"])
def case(request, tmp_path_factory):
    """A random Llama as a quantised checkpoint; the floats that its bits stand for; and how far apart they may be.

    LLM.int8 rounds the inputs of a layer as well.
    """
    make, tolerance = request.param
    how, floats_of = make()
    path = tmp_path_factory.mktemp(make.__name__)
    adapter, plain = attached(llama(2), path, target_modules=TYPES)
    made = AutoModelForCausalLM.from_pretrained(path / "base", quantization_config=how, device_map="cpu")
    made.save_pretrained(path / "quantised")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "quantised" / name).write_bytes((path / "base" / name).read_bytes())
    floats = dict(plain.base.named_modules())
    with torch.no_grad():
        for name, layer in made.model.named_modules(prefix="model"):
            if isinstance(layer, nn.Linear):
                getattr(floats[name], "base_layer", floats[name]).weight.copy_(floats_of(layer.weight))
    loaded = load(adapter, str(path / "quantised"), device="cpu")
    return SimpleNamespace(adapter=adapter, plain=plain, loaded=loaded, rows=texts(), tolerance=tolerance)


def moments(case, loaded):
    point(loaded, place(case.adapter, loaded.device))
    return to_tensors(measure_moments(loaded, case.adapter.linear, batches(case.rows, 24, loaded.pad), loss=True))[0]


def bits(loaded):
    state = loaded.base.state_dict()
    return {name: getattr(value, "qdata", value).clone() for name, value in state.items() if "lora" not in name}


def test_the_moments_are_those_of_the_floats_the_bits_stand_for(case):
    quantised, floats = moments(case, case.loaded), moments(case, case.plain)
    for name, moment in floats.items():
        assert (quantised[name] - moment).norm() < case.tolerance * moment.norm(), name


def test_a_recovery_learns_through_frozen_bits(case):
    shrunk = {name: Factors(pair.A, 0.5 * pair.B) for name, pair in case.adapter.pool.items()}
    learner = case.adapter.with_pool(shrunk, case.adapter.modules)
    before = bits(case.loaded)
    how = Settings(steps=4, objective="kl", batch_size=4, learning_rate=1e-2)
    made, record = recover(case.loaded, case.adapter, learner, case.rows, case.rows, how)
    assert record.curve[-1][1] < 0.9 * record.curve[0][1]
    for name, pair in learner.pool.items():
        assert not torch.equal(made.pool[name].A, pair.A) and not torch.equal(made.pool[name].B, pair.B), name
    after = bits(case.loaded)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_plan_of_the_memory_knows_packed_weights(case):
    floats = plan_memory(case.adapter, case.plain.base_model, device="cpu").steps["measure"]
    quantised = plan_memory(case.adapter, case.loaded.base_model, device="cpu").steps["measure"]
    assert quantised["base"] < floats["base"]
    assert quantised["activations"] == pytest.approx(floats["activations"], rel=0.1)
