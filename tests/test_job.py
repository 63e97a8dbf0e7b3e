"""What is built on one job: the smallest size for a share of the gain, sweeps, runs without data."""

import itertools
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from support import ADAPTER, BASE, CALIBRATION, FIXTURES, HELDOUT

from lorapack import compress_adapter, read_adapter, sweep_adapter
from lorapack.choose import ALIKE, FIRST, best_plan, nearest, not_behind, smallest_plan
from lorapack.core.adapter import digest, size
from lorapack.core.plan import parameters
from lorapack.core.report import from_json, to_json
from lorapack.data.encode import IGNORED
from lorapack.data.prepare import prepare
from lorapack.errors import InputError
from lorapack.job import Job, chosen_method, figures, measure, packed
from lorapack.measure.measure import measure_rows_on_base
from lorapack.model.load import load
from lorapack.plan import METHODS
from lorapack.sweep import parse_method
from lorapack.write.card import card


@pytest.fixture(scope="module")
def adapter():
    return read_adapter(ADAPTER)


@pytest.fixture(scope="module")
def job(adapter):
    loaded = load(adapter, str(BASE), device="cpu", max_length=48)
    prepared = prepare(loaded.reader, str(CALIBRATION), sample="30", seed=0, most_recovery=0)
    return Job(adapter, loaded, prepared)


def test_the_smallest_plan_keeps_the_share_and_a_slightly_smaller_one_does_not(job, adapter):
    method, share = chosen_method("rank", {})[0], 0.6
    statistics = measure(job, {"backward"})
    plan, search = smallest_plan(job, statistics, method, {}, share)
    found = figures(job, job.prepared.selection, packed(job, plan, statistics)).retained
    assert found.low >= share
    count = parameters(plan, adapter)
    assert count < size(adapter).parameters
    failed = [tried for tried, low in search.tried if low < share]
    assert failed and max(failed) < count <= max(failed) * 1.05
    assert all(low >= share for tried, low in search.tried if tried >= count)


def test_a_share_that_even_the_whole_adapter_does_not_keep_is_refused(job):
    with pytest.raises(InputError, match="even the whole adapter"):
        smallest_plan(job, measure(job, {"forward"}), chosen_method("lora-drop", {})[0], {}, 1.5)


def test_a_sweep_keeps_to_the_budgets_and_says_what_is_too_small(adapter):
    points = sweep_adapter(
        adapter,
        str(CALIBRATION),
        str(BASE),
        methods=["rank:metric=output,allocation=uniform", "lora-drop"],
        budgets=["50%", "5%"],
        eval_data=str(HELDOUT),
        sample="10",
        max_length=32,
        device="cpu",
    )
    assert [(p.method.partition(":")[0], p.budget) for p in points] == [
        ("rank", "50%"),
        ("rank", "5%"),
        ("lora-drop", "50%"),
        ("lora-drop", "5%"),
    ]
    for point in points[:3]:
        assert 0 < point.share <= float(point.budget[:-1]) / 100
        assert point.share == point.parameters / size(adapter).parameters
    assert points[0].quality.retained.value > points[1].quality.retained.value
    assert points[3].quality is None and "too small for lora-drop" in points[3].reason


@pytest.mark.parametrize(
    ("text", "what"),
    [("nothing", "no method"), ("rank:threshold=1", "rank has no --threshold"), ("rank:loss", "name:option=value")],
)
def test_a_method_that_cannot_be_is_refused_before_anything_is_loaded(adapter, text, what):
    with pytest.raises(InputError, match=what):
        sweep_adapter(adapter, "no such file", "no such base", methods=[text])


def test_options_of_a_method_are_read_as_numbers_where_they_are():
    assert parse_method("rank:allocation=per-module,share=0.5") == (
        "rank",
        {"allocation": "per-module", "share": 0.5},
    )


def test_where_a_method_leaves_something_to_try_the_nearest_to_the_original_is_taken(job):
    statistics = measure(job, {"backward"})
    method, limit = replace(chosen_method("adaptive", {})[0], again=False), size(job.adapter).parameters // 16
    best, measured = best_plan(job, statistics, method, limit, {})
    assert measured is statistics
    distances = {}
    for peak, metric in itertools.product((None, 1.0), ("fisher", "loss")):
        plan = method.run(job.adapter, statistics, limit, {"peak": peak, "metric": metric})
        found = figures(job, job.prepared.selection, packed(job, plan, statistics)).divergence
        distances[peak, metric] = found.value
    assert len(set(distances.values())) > 1
    assert (best.options["peak"], best.options["metric"]) == min(distances, key=distances.get)
    given = {"peak": 1.0, "metric": "loss"}
    assert best_plan(job, statistics, method, limit, given)[0] == method.run(job.adapter, statistics, limit, given)


def raced(job, adapters):
    """The place of the nearest, and on how many rows the model was run to find it."""
    looked = []
    watched = replace(job, watch=lambda _, batches: (looked.append(batch) or batch for batch in batches))
    place, seen = nearest(watched, adapters)
    rows = sum(len(batch.places) for batch in looked)
    assert sum(len(part.divergence) for part in seen) == rows
    return place, rows


def test_rows_are_not_spent_on_what_is_clearly_farther_or_no_different(job):
    statistics = measure(job, {"backward"})
    whole, ranks = size(job.adapter).parameters, ("weight", "output", "loss")
    eighths = [METHODS["rank"].run(job.adapter, statistics, whole // 8, {"metric": metric}) for metric in ranks]
    far = [packed(job, plan, statistics) for plan in eighths]
    near = packed(job, METHODS["rank"].run(job.adapter, statistics, whole * 3 // 4, {}), statistics)
    assert len(job.prepared.selection) > 2 * FIRST
    assert raced(job, [*far, near]) == (3, FIRST)
    assert raced(job, [near, near]) == (0, FIRST)
    assert raced(job, [near]) == (0, 0)
    row = job.prepared.selection[0]
    long = replace(row, input_ids=row.input_ids * 5, labels=row.labels * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = replace(job, prepared=replace(job.prepared, selection=[long]))
        assert raced(one, [*far, near]) == (3, 1), "one row too"
    distances = [figures(job, job.prepared.selection, adapter).divergence.value for adapter in far]
    assert distances[raced(job, far)[0]] <= min(distances) * (1 + ALIKE)


def test_the_race_goes_on_between_those_that_may_still_be_the_nearest():
    each = np.random.default_rng(0).normal(size=(3, 16))
    close, other, far = 10 + 0.1 * each[0], 10 + 3 * each[1], 20 + each[2]
    assert not_behind({4: far, 7: close, 9: other}) == [7, 9]
    assert not_behind({7: close, 4: far}) == [7]
    assert not_behind({7: close, 9: close + 1e-3}) == [7], "it would not matter"
    assert not_behind({7: close, 9: close + 0.5}) == [7]


def test_a_classifier_with_one_prediction_a_row_is_looked_at_on_all_rows(job):
    rows = job.prepared.selection
    one_each = [replace(row, labels=(IGNORED,) * (len(row.labels) - 1) + row.labels[-1:]) for row in rows]
    job = replace(job, prepared=replace(job.prepared, selection=one_each))
    assert raced(job, [job.adapter, job.adapter]) == (0, len(rows))


@pytest.mark.parametrize("given", [{}, {"peak": None, "metric": "fisher"}])
def test_measured_again_with_what_is_left_the_default_keeps_more_and_never_less_of_the_selection_rows(job, given):
    statistics = measure(job, {"backward"})
    method, limit = chosen_method("adaptive", {})[0], size(job.adapter).parameters // 8
    found = []
    for again in (False, True):
        plan, measured = best_plan(job, statistics, replace(method, again=again), limit, given)
        smaller = packed(job, plan, measured)
        assert size(smaller).parameters <= limit
        rows = job.prepared.selection, job.prepared.evaluation
        found.append([figures(job, part, smaller).divergence.value for part in rows])
    (selection, unseen), (selection_again, unseen_again) = found
    assert selection_again < selection
    assert unseen_again < unseen


def test_an_adapter_measured_with_others_in_one_pass_is_not_measured_again(job):
    statistics = measure_rows_on_base(job.loaded, {"": job.adapter}, job.prepared, "backward")[""]
    _, measured = best_plan(job, statistics, chosen_method("adaptive", {})[0], size(job.adapter).parameters // 8, {})
    assert measured is statistics


def test_the_default_cuts_in_the_metric_that_decided_its_ranks(job):
    """Without a limit, and with nothing to share, `loss` is then the method `rank` in that metric."""
    statistics = measure(job, {"backward"})
    half = size(job.adapter).parameters // 2
    plans = [METHODS[name].run(job.adapter, statistics, half, {"metric": "loss"}) for name in ("adaptive", "rank")]
    one, other = (packed(job, plan, statistics) for plan in plans)
    assert not plans[0].groups and digest(one) == digest(other)


def test_single_elements_are_not_recovered_for_that_would_fill_the_zeros(adapter):
    how = {"method": "snip", "budget": "30%", "options": {"unit": "element"}, "sample": "8", "max_length": 32}
    with pytest.raises(InputError, match="give --recover-steps 0"):
        compress_adapter(adapter, str(CALIBRATION), str(BASE), recover_steps=1, **how)


def test_without_data_nothing_is_loaded_and_the_report_says_so(adapter):
    options = {"metric": "weight"}
    made = compress_adapter(adapter, None, "no such base", method="rank", budget="25%", options=options)
    assert size(made.adapter).parameters <= size(adapter).parameters // 4
    assert made.report.quality is None and made.report.data is None
    assert from_json(to_json(made.report)).after == size(made.adapter)
    assert "quality was not measured" in card(made.adapter, made.report)
    with pytest.raises(InputError, match="adaptive needs measurements: give --data"):
        compress_adapter(adapter, None)


def test_the_steps_in_the_readme_work_as_they_stand(tmp_path, monkeypatch):
    readme = (FIXTURES.parent / "README.md").read_text()
    steps = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    exec(steps, {})
    halved = read_adapter(tmp_path / "halved")
    assert 0 < size(halved).parameters <= size(read_adapter(ADAPTER)).parameters // 2 and halved.groups
