"""Memory that runs out: a layer that asks torch for too much, from so many tokens on, and a process with a limit."""

import logging
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ADAPTER, BASE, CALIBRATION, attached, llama
from test_measure import texts

from lorapack.core.statistics import to_tensors
from lorapack.data.batches import batches
from lorapack.errors import InputError
from lorapack.evaluate.scores import FIELDS, score
from lorapack.measure.gradients import measure_gradients
from lorapack.measure.moments import measure_inputs, measure_moments
from lorapack.measure.omega import learn_omega
from lorapack.model.load import Loaded
from lorapack.model.point import place, point
from lorapack.recover import Settings, recover

LENGTHS = (12, 12, 9, 7, 7, 4, 3, 2)
ROOM = 13  # tokens; the batches below have up to 48


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model in float64: so that how batches are cut does not show in the last bits of float32."""
    path = tmp_path_factory.mktemp("llama")
    adapter, loaded = attached(llama(2), path, target_modules=["q_proj", "v_proj", "down_proj"])
    loaded.model.double()
    return SimpleNamespace(adapter=adapter, loaded=loaded, rows=texts(LENGTHS))


def ask_for_too_much(how):
    if how == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    torch.empty(2**58, dtype=torch.uint8)  # refused by the allocator, in its own words


@contextmanager
def short_of_memory(case, how="cpu", late=False, room=ROOM):
    """The same model, in whose second layer there is no room for more tokens; or not on the way back."""

    def check(x):
        if x.shape[:2].numel() > room:
            ask_for_too_much(how)

    def hook(_, __, x):
        if late and x.requires_grad:
            x.register_hook(check)
        elif not late:
            check(x)

    handle = case.loaded.base.model.layers[1].input_layernorm.register_forward_hook(hook)
    try:
        yield Loaded(**vars(case.loaded))  # another one, as what it has learnt of the memory is its own
    finally:
        handle.remove()


def both(case, work, **how):
    """What `work` makes of a model with all the memory, and of the same with little."""
    plenty = work(Loaded(**vars(case.loaded)))
    with short_of_memory(case, **how) as loaded:
        return plenty, work(loaded)


@pytest.mark.parametrize(("how", "late"), [("cpu", False), ("cpu", True), ("gpu", False)])
def test_moments_are_what_they_are_with_all_the_memory(case, how, late, caplog):
    def moments(loaded):
        point(loaded, place(case.adapter, loaded.device))
        return to_tensors(measure_moments(loaded, case.adapter.linear, batches(case.rows, 48, loaded.pad), loss=True))

    with caplog.at_level(logging.WARNING):
        (plenty, facts), (little, same) = both(case, moments, how=how, late=late)
    assert facts == same  # no token was counted twice
    for name, moment in plenty.items():
        torch.testing.assert_close(little[name], moment, rtol=1e-12, atol=1e-12 * float(moment.abs().max()))
    said = "lorapack: memory ran out; from here on at most {} tokens at once (--batch-tokens)"
    assert [record.getMessage() for record in caplog.records] == [said.format(24), said.format(12)]


def test_the_inputs_of_shared_layers_are_what_they_are_with_all_the_memory(case):
    generator = torch.Generator().manual_seed(0)
    bases = {
        m: torch.randn(3, case.adapter.factors(m).shape[1], generator=generator).double() for m in case.adapter.linear
    }

    def inputs(loaded):
        point(loaded, place(case.adapter, loaded.device))
        return measure_inputs(loaded, bases, batches(case.rows, 48, loaded.pad))

    plenty, little = both(case, inputs)
    for module, moment in plenty.items():
        torch.testing.assert_close(little[module], moment, rtol=1e-12, atol=1e-12 * float(moment.abs().max()))


def test_gradients_and_omega_are_what_they_are_with_all_the_memory(case):
    def learnt(loaded):
        small = batches(case.rows, 48, loaded.pad)
        gradients = measure_gradients(loaded, case.adapter, small)
        omega, _ = learn_omega(loaded, case.adapter, small)
        return [*(part for parts in gradients.values() for part in parts), *omega.values()]

    for plenty, little in zip(*both(case, learnt), strict=True):
        torch.testing.assert_close(little, plenty, rtol=1e-4, atol=1e-6 * float(plenty.abs().max()))


def test_scores_are_what_they_are_with_all_the_memory(case):
    def scores(loaded):
        variants = {"original": place(case.adapter, loaded.device), "base": place(None, loaded.device)}
        return score(loaded, variants, "original", batches(case.rows, 48, loaded.pad), len(case.rows))

    plenty, little = both(case, scores)
    for variant, found in plenty.items():
        assert found.loss.all()
        for field in FIELDS:
            np.testing.assert_allclose(getattr(little[variant], field), getattr(found, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("late", [False, True])
def test_a_recovery_learns_what_it_learns_with_all_the_memory(case, late):
    learner = case.adapter.with_pool(
        {name: type(pair)(pair.A, 0.5 * pair.B) for name, pair in case.adapter.pool.items()}, case.adapter.modules
    )

    def recovered(loaded):
        settings = Settings(steps=3, objective="kl", batch_size=4, learning_rate=1e-2)
        return recover(loaded, case.adapter, learner, case.rows, case.rows, settings, batch_tokens=48)

    (plenty, record), (little, other) = both(case, recovered, late=late)
    assert record.curve[-1][1] < 0.9 * record.curve[0][1]
    assert [value for _, value in other.curve] == pytest.approx([value for _, value in record.curve], rel=1e-6)
    for name, pair in plenty.pool.items():
        torch.testing.assert_close(little.pool[name].B, pair.B, rtol=1e-4, atol=1e-6)


def test_a_row_that_does_not_fit_is_named(case):
    point(case.loaded, place(case.adapter, case.loaded.device))
    with short_of_memory(case, room=11) as loaded, pytest.raises(InputError, match="a single row of 12 tokens"):
        measure_moments(loaded, case.adapter.linear, batches(case.rows, 48, loaded.pad))


LIMITED = """
import re, resource, sys
import torch
from pathlib import Path
from lorapack.data.batches import batches
from lorapack.data.prepare import prepare
from lorapack.measure.moments import measure_moments
from lorapack.model.load import load
from lorapack.read import read_adapter

torch.set_num_threads(1)
adapter_path, base, data, spare = sys.argv[1:]
adapter = read_adapter(adapter_path)
loaded = load(adapter, base, device="cpu")
rows = prepare(loaded.reader, data, sample="12", seed=0, most_recovery=0).calibration

def trace(tokens):
    found = measure_moments(loaded, adapter.linear, batches(rows, tokens, loaded.pad), loss=True)
    print(found.tokens, *(float(m.forward.trace()) for m in found.modules.values()))

trace(512)
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(spare), size + int(spare)))
trace(100_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, by /proc")
def test_a_process_with_a_limit_goes_on_with_less():
    """A dozen rows in one batch want several hundred megabytes more than 512 tokens do, and there are sixty."""
    command = [sys.executable, "-c", LIMITED, str(ADAPTER), str(BASE), str(CALIBRATION), str(60 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = (np.array([float(word) for word in line.split()]) for line in done.stdout.splitlines())
    assert before[0] == after[0]
    np.testing.assert_allclose(after, before, rtol=1e-5)  # the base computes in float32
    said = [line for line in done.stderr.splitlines() if line.startswith("lorapack: memory ran out")]
    assert said and len(said) < 8
