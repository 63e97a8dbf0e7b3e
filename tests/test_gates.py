"""Gates: what passes, what does not, and what a CI system gets to see of it."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ADAPTER, BASE, HELDOUT, refused, run

from lorapack import read_adapter
from lorapack.cli.options import parse_bytes
from lorapack.core import report as reports
from lorapack.core.adapter import Size, digest
from lorapack.core.report import Interval, Quality
from lorapack.errors import GateError, InputError
from lorapack.evaluate.metrics import quality
from lorapack.evaluate.scores import Scores
from lorapack.ship.gates import Gates, demand, judge
from lorapack.ship.junit import junit, of_gates

SIZE = Size(2, 2, 1000, 4000, 50, 200)
finite = st.floats(-2, 2)


def measured(retained=None, increase=None):
    return Quality(9, 99, {"loss": {"original": Interval(1, 1, 1), "compressed": Interval(1, 1, 1)}}, None, None,
                   retained, increase)  # fmt: skip


@given(st.tuples(finite, finite, finite).map(sorted), finite)
def test_the_bound_that_speaks_against_the_result_decides(three, limit):
    low, value, high = three
    found = measured(Interval(value, low, high), Interval(value, low, high))
    least, most = judge(Gates(min_retained=limit, max_loss_increase=limit), SIZE, found)
    assert least.met == (low >= limit) and most.met == (high <= limit)
    assert (least.bound, most.bound) == (low, high)


def test_sizes_are_those_of_the_low_rank_factors_and_a_limit_may_be_reached():
    found = judge(Gates(max_bytes=4000, max_params=999), SIZE, None)
    assert [(each.gate, each.met) for each in found] == [("max-bytes", True), ("max-params", False)]


@pytest.mark.parametrize(
    "figure", [None, Interval(math.nan, None, None), Interval(None, None, None), Interval(0.5, None, None)]
)
def test_a_figure_that_is_not_defined_or_has_no_bound_does_not_pass(figure):
    for gates in (Gates(min_retained=0.0), Gates(max_loss_increase=9.0)):
        outcome = judge(gates, SIZE, measured(figure, figure))
        with pytest.raises(GateError, match="gate not met"):
            demand(outcome)


def test_a_gate_on_quality_without_figures_is_refused_and_so_are_limits_that_are_none():
    with pytest.raises(InputError, match="--min-retained"):
        judge(Gates(min_retained=0.9), SIZE, None)
    for bad in ({"min_retained": math.nan}, {"max_loss_increase": math.inf}, {"max_params": -1}):
        with pytest.raises(InputError, match="finite"):
            Gates(**bad)


def test_every_missed_gate_stands_in_the_one_line_with_its_figure_and_its_bound():
    found = measured(Interval(0.95, 0.93, 0.97), Interval(0.02, 0.01, 0.03))
    with pytest.raises(GateError) as said:
        demand(judge(Gates(0.99, 0.025, 5000, 500), SIZE, found), "out")
    line = str(said.value)
    assert "\n" not in line and "max-bytes" not in line and "out was written and stays" in line
    for part in ("--min-retained 99.00%", "95.00% [93.00%, 97.00%]", "lower bound 93.00%", "upper bound 0.03", "1,000"):
        assert part in line


def test_sizes_are_read_as_people_write_them():
    for text, number in (("200KB", 200_000), ("1.5mb", 1_500_000), ("64", 64), ("5000B", 5000)):
        assert parse_bytes(None, None, text) == number
    for text in ("half", "KB", "1e999"):
        with pytest.raises(InputError, match="--max-bytes"):
            parse_bytes(None, None, text)


def test_the_loss_increase_is_paired_row_by_row():
    """A rise of the same size on every row is the same on every resample: the interval is a point."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 9, 40).astype(float)
    base = tokens * generator.random(40)
    zeros = np.zeros(40)

    def made(rise):
        return Scores(tokens, base + rise * tokens, zeros, zeros, zeros, zeros)

    found = quality({"original": made(0), "compressed": made(0.25)}, None, 0).increase
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert quality({"original": made(0)}, None, 0).increase is None


def test_the_junit_file_counts_and_names_what_failed():
    text = junit(of_gates(judge(Gates(max_bytes=1, max_params=1000), SIZE, None)), "lorapack compress")
    suite = ET.fromstring(text)
    assert suite.attrib == {"tests": "2", "failures": "1", "errors": "0", "skipped": "0"}
    failed = {case.get("name"): [f.get("message") for f in case.iter("failure")] for case in suite.iter("testcase")}
    assert failed["max-params"] == [] and "4,000" in failed["max-bytes"][0]


# The commands

CUT = ("--method", "rank", "--metric", "weight", "--budget", "50%")  # needs no model


def test_compress_writes_its_result_and_then_exits_3(tmp_path):
    out, file = tmp_path / "out", tmp_path / "gates.xml"
    done = run("compress", ADAPTER, *CUT, "-o", out, "--max-params", 100, "--max-bytes", "1MB", "--junit", file)
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "--max-params 100" in lines[0] and str(out) in lines[0]
    assert "Gate met: --max-bytes 1,000,000" in done.stdout
    report = reports.from_json((out / "report.json").read_text())
    assert {gate.gate: gate.met for gate in report.gates} == {"max-bytes": True, "max-params": False}
    assert report.adapter["compressed"] == digest(read_adapter(out))
    assert ET.parse(file).getroot().get("failures") == "1"
    done = run("compress", ADAPTER, *CUT, "-o", out, "--overwrite", "--max-params", "50000", "--json", "--junit", file)
    assert done.returncode == 0 and done.stderr == ""
    assert [gate["met"] for gate in json.loads(done.stdout)["gates"]] == [True]
    assert ET.parse(file).getroot().get("failures") == "0"


def test_evaluate_decides_on_what_it_measured(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:8]))
    run("compress", ADAPTER, *CUT, "-o", tmp_path / "small")
    common = ("evaluate", tmp_path / "small", "--original", ADAPTER, "--base", BASE, "--data", rows, "--json")
    done = run(*common, "--max-length", 48, "--min-retained", "99.9%", "--max-loss-increase", 50)
    assert done.returncode == 3 and "--min-retained 99.90%: gain retained" in done.stderr
    found = json.loads(done.stdout)
    least, most = found["gates"]
    assert not least["met"] and least["bound"] == found["quality"]["retained"]["low"] < 0.999
    assert most["met"] and most["bound"] == found["quality"]["increase"]["high"] < 50


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--min-retained", "99%"], "--data"),
        (["--min-retained", "most"], "--min-retained"),
        (["--max-loss-increase", "nan", "--data", "x"], "finite"),
        (["--max-bytes", "much"], "--max-bytes"),
        (["--junit", "gates.xml"], "without a gate"),
        (["--max-params", "1", "--junit", "no/gates.xml"], "does not exist"),
        (["--max-params", "1", "--junit", "mine"], "no JUnit file"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_the_work(arguments, needle, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert needle in refused(run("compress", ADAPTER, *CUT, "-o", "out", *arguments, cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine").read_text() == "precious"
