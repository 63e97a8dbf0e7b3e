"""The evidence: its page is what its results say, and its figures are what a naive reading gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
QUALITY = ROOT / "benchmarks" / "quality"


def command(script, *arguments):
    return subprocess.run(
        [sys.executable, str(QUALITY / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def figure(run, arm, budget, steps=0):
    return next(f for f in run["figures"] if (f["arm"], f["budget"], f["recovery"]) == (arm, budget, steps))


@pytest.fixture
def quality(monkeypatch):
    """The folder's modules can be imported."""
    monkeypatch.syspath_prepend(str(QUALITY))


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """The fixture's task with two arms that there are, one with no plan so small, and one that is not there."""
    folder = tmp_path_factory.mktemp("evidence")
    arms = ["rank:metric=weight", "lora-drop", "no-such-method"]
    done = command(
        "run.py", "stories260k", 0, "--adapters", folder, "--results", folder / "results", "--budgets", 50, 12.5,
        "--arms", *arms, "--tested", 30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_is_what_the_script_makes_of_the_committed_results(tmp_path):
    made = command("page.py", "-o", tmp_path / "evidence.md")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text(), "run `make docs`"


def test_an_arm_without_a_plan_or_a_method_is_recorded_as_such(tried):
    run = json.loads((tried / "results" / "stories260k-0.json").read_text())
    assert figure(run, "lora-drop", 50.0)["status"] == "done"
    assert figure(run, "lora-drop", 12.5)["status"] == "no plan"
    assert figure(run, "no-such-method", 50.0)["status"] == "no method"
    assert all(f["share"] <= f["budget"] / 100 + 0.001 for f in run["figures"] if f["status"] == "done")


def test_the_page_says_what_has_no_plan_and_what_was_not_run(tried, tmp_path):
    made = command("page.py", "--results", tried / "results", "--retain", tmp_path / "none", "-o", tmp_path / "page.md")
    assert made.returncode == 0, made.stderr
    lines = (tmp_path / "page.md").read_text().splitlines()
    dropped = next(line for line in lines if line.startswith("| `lora-drop` |"))
    run = json.loads((tried / "results" / "stories260k-0.json").read_text())
    kept = 100 * figure(run, "lora-drop", 50.0)["retained"][0]
    assert dropped == f"| `lora-drop` | {kept:.1f} | – |"
    assert "No result of `adaptive` is here yet." in lines


def test_what_nobody_knows_has_no_figure(quality):
    from record import triple

    from lorapack.core.report import Interval

    assert triple(Interval(float("nan"), None, None)) is None
    assert triple(Interval(0.5, 0.4, None)) == [0.5, 0.4, None]


def test_what_was_run_is_not_run_again(tried):
    path = tried / "results" / "stories260k-0.json"
    before = json.loads(path.read_text())
    arguments = ("stories260k", 0, "--adapters", tried, "--results", tried / "results", "--budgets", 50, "--tested", 30)
    done = command("run.py", *arguments, "--arms", "rank:metric=weight")
    assert done.returncode == 0, done.stderr
    assert "rank:metric" not in done.stdout
    assert json.loads(path.read_text())["measure_seconds"] == before["measure_seconds"]


def test_no_row_is_in_two_parts_and_no_meaning_that_was_trained_on_is_tested(tmp_path, quality):
    from tasks import TASKS

    rows = [{"mr": f"name[{n // 3}]", "ref": f"text {n}"} for n in range(60)]
    other = [{"mr": f"name[t{n // 3}]", "ref": f"text {n}"} for n in range(30)]
    folder = tmp_path / "e2e_nlg"
    folder.mkdir()
    for name, found in (("validation", rows), ("test", other)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    parts = TASKS["stories15m-e2e"].cut(tmp_path)
    meanings = {name: [row["prompt"] for row in found] for name, found in parts.items()}
    assert all(meanings.values())
    assert not set(meanings["train"]) & set(meanings["data"])
    assert len(set(meanings["test"])) == len(meanings["test"]) == 10
    for name in ("sst2", "mrpc", "rte", "cola"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("train", "test", "validation"):
            many = [{"sentence": f"{file} {n}", "label": n % 2} for n in range(1500)]
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
        parts = TASKS[name].cut(tmp_path)
        texts = [row["sentence"] for found in parts.values() for row in found]
        assert len(texts) == len(set(texts)) == 3000
        assert not any(row["sentence"].startswith("train") for row in parts["test"])


def test_a_mean_over_seeds_and_a_difference_are_those_of_the_single_rows(tried, tmp_path, quality):
    """Two seeds made of one by changing the losses: naive means beside what pair.py writes."""
    from pair import pair, read_table, write_table

    source = json.loads((tried / "results" / "stories260k-0.json").read_text())
    table = read_table(tried / "scores" / "stories260k-0.npz")
    renamed = {"rank:metric=weight": "adaptive"}
    tables = {}
    for seed, factor in ((0, 1.0), (1, 0.9)):
        figures = [f | {"arm": renamed.get(f["arm"], f["arm"])} for f in source["figures"]]
        if seed:  # as that of a control with a head of its own
            figures = [f | {"divergence": None} if f["arm"] == "lora-drop" else f for f in figures]
        tmp_path.joinpath(f"stories260k-{seed}.json").write_text(json.dumps(source | {"figures": figures}))
        tables[seed] = {
            name.replace("rank:metric=weight", "adaptive"): scores
            if name == "base"
            else type(scores)(**{**vars(scores), "loss": scores.loss * factor})
            for name, scores in table.items()
        }
        write_table(tmp_path / "scores" / f"stories260k-{seed}.npz", tables[seed])
    pair("stories260k", tmp_path, tmp_path / "scores")
    made = json.loads((tmp_path / "stories260k.json").read_text())

    def kept(seed, arm):
        total = {n: s.loss.sum() / s.predictions.sum() for n, s in tables[seed].items()}
        full = total["the full adapter | 100% | 0 steps"]
        return (total["base"] - total[f"{arm} | 50% | 0 steps"]) / (total["base"] - full)

    dropped = figure(made, "lora-drop", 50.0)
    assert dropped["retained"][0] == pytest.approx(np.mean([kept(0, "lora-drop"), kept(1, "lora-drop")]), rel=1e-5)
    assert dropped["divergence"] is None
    assert figure(made, "adaptive", 50.0)["divergence"] > 0
    lead = np.mean([kept(s, "adaptive") - kept(s, "lora-drop") for s in (0, 1)])
    assert dropped["default_better_by"][0] == pytest.approx(lead, rel=1e-5)
    low, high = dropped["default_better_by"][1:]
    assert low < lead < high
    narrow = [b - a for a, b in [dropped["default_better_by"][1:], dropped["retained"][1:]]]
    assert narrow[0] < 4 * narrow[1]  # paired: not the sum of two unrelated intervals
    far = [tables[0][f"{arm} | 50% | 0 steps"] for arm in ("lora-drop", "adaptive")]
    further = [s.divergence.sum() / s.predictions.sum() for s in far]  # the same of both seeds
    assert dropped["default_nearer_by"][0] == pytest.approx(further[0] - further[1], rel=1e-5)


def test_without_a_gain_a_difference_is_in_how_near_the_original_is(tried, tmp_path, quality):
    """The base is made as good as the full adapter; then the KL says what is left of it, not the loss."""
    from pair import pair, read_table, write_table

    source = json.loads((tried / "results" / "stories260k-0.json").read_text())
    renamed = {"rank:metric=weight": "adaptive"}
    figures = [f | {"arm": renamed.get(f["arm"], f["arm"])} for f in source["figures"]]
    (tmp_path / "stories260k-0.json").write_text(json.dumps(source | {"figures": figures}))
    table = {
        name.replace("rank:metric=weight", "adaptive"): scores
        for name, scores in read_table(tried / "scores" / "stories260k-0.npz").items()
    }
    table["base"] = table["the full adapter | 100% | 0 steps"]
    write_table(tmp_path / "scores" / "stories260k-0.npz", table)
    pair("stories260k", tmp_path, tmp_path / "scores")
    dropped = figure(json.loads((tmp_path / "stories260k.json").read_text()), "lora-drop", 50.0)
    assert dropped["retained"] is None
    of = {arm: table[f"{arm} | 50% | 0 steps"] for arm in ("lora-drop", "adaptive")}
    far = {arm: s.divergence.sum() / s.predictions.sum() for arm, s in of.items()}
    nearer, low, high = dropped["default_nearer_by"]
    assert nearer == pytest.approx(far["lora-drop"] - far["adaptive"], rel=1e-5)
    assert low < nearer < high
