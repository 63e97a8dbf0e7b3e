"""A base that does not fit in memory: layers on the disk (`--device split`), and the same results to the last bit."""

import pytest
import torch
from support import attached, llama
from test_measure import texts

from lorapack.core.adapter import Factors
from lorapack.core.statistics import to_tensors
from lorapack.data.batches import batches
from lorapack.evaluate.scores import score
from lorapack.measure.moments import measure_moments
from lorapack.measure.on_base import measure_moments_on_base
from lorapack.model.load import load
from lorapack.model.point import place, point
from lorapack.recover import Settings, recover


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model in memory, and the same with two thirds of it on the disk."""
    path = tmp_path_factory.mktemp("split")
    adapter, whole = attached(llama(3), path, target_modules=["q_proj", "down_proj"])
    with pytest.MonkeyPatch.context() as patch:  # accelerate asks the machine, which has more
        patch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _: {"cpu": 200_000})
        split = load(adapter, str(path / "base"), device="split")
    places = {parameter.device.type for parameter in split.base.parameters()}
    assert places == {"cpu", "meta"}  # "meta": its numbers are on the disk
    return adapter, whole, split


def test_moments_and_scores_are_those_of_the_model_in_memory(case):
    adapter, *models = case
    found = []
    for loaded in models:
        each = batches(texts(), 24, loaded.pad)
        point(loaded, place(adapter, loaded.device))
        alone = to_tensors(measure_moments(loaded, adapter.linear, each, loss=True))[0]
        company = to_tensors(measure_moments_on_base(loaded, {"one": adapter}, each, loss=True)["one"])[0]
        variants = {"original": place(adapter, loaded.device), "base": place(None, loaded.device)}
        losses = {n: torch.from_numpy(s.loss) for n, s in score(loaded, variants, "original", each, 5).items()}
        found.append([alone, company, losses])
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and one
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_recovery_is_that_of_the_model_in_memory(case):
    adapter, *models = case
    learner = adapter.with_pool({n: Factors(p.A, 0.5 * p.B) for n, p in adapter.pool.items()}, adapter.modules)
    how = Settings(steps=3, batch_size=2, learning_rate=1e-2)
    rows = [row for row in texts() if len(row.input_ids) > 1]  # one of a single token predicts nothing, and is no step
    (one, record), (two, other) = (recover(loaded, adapter, learner, rows, rows, how) for loaded in models)
    assert record.curve == other.curve and record.curve[-1][1] < record.curve[0][1]
    assert all(
        torch.equal(pair.A, two.pool[n].A) and torch.equal(pair.B, two.pool[n].B) for n, pair in one.pool.items()
    )
