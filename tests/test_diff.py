"""Two reports compared."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lorapack.cli.main import cli
from lorapack.core.adapter import Size
from lorapack.core.plan import Plan
from lorapack.core.report import VERSION, Interval, Quality, Report, to_json
from lorapack.errors import InputError
from lorapack.ship.diff import MORE_IS_BETTER, compare

figures = (
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted).map(lambda t: Interval(t[1], t[0], t[2]))
)


LOSS = Interval(2.0, 1.9, 2.1)


def report(parameters=1000, loss=LOSS, retained=None, rows=("a", "b"), **changes):
    quality = Quality(2, 9, {"loss": {"base": Interval(9, 9, 9), "compressed": loss}}, retained=retained)
    size = Size(2, 2, parameters, 4 * parameters, 0, 0)
    data = {"parts": {"evaluation": {"rows": len(rows), "fingerprints": list(rows)}}}
    adapter = {"name": "a", "original": "1", "compressed": "2"}
    plan = Plan(method="by hand", choices=(), groups={}, options={})
    run = {"steps": {}}
    made = Report(
        VERSION, "0.1.0", "base", "CAUSAL_LM", adapter, size, size, (), plan, {}, {}, run, data, None, quality
    )
    return replace(made, **changes)


def verdicts(old, new):
    return {change.figure: change.verdict for change in compare(old, new).changes}


@given(figures, figures)
def test_disjoint_intervals_decide_and_swapping_the_reports_swaps_the_verdict(one, two):
    found = verdicts(report(loss=one, retained=one), report(loss=two, retained=two))
    back = verdicts(report(loss=two, retained=two), report(loss=one, retained=one))
    swap = {"better": "worse", "worse": "better"}
    assert {name: swap.get(verdict, verdict) for name, verdict in found.items()} == back
    overlap = one.low <= two.high and two.low <= one.high
    wanted = "same" if one == two else "unclear" if overlap else "better" if two.low > one.high else "worse"
    assert found["gain retained"] == wanted and "gain retained" in MORE_IS_BETTER
    assert found["loss"] == swap.get(wanted, wanted)


def test_fewer_parameters_are_better_and_a_figure_that_one_report_lacks_is_said():
    found = verdicts(report(1000), report(999, retained=Interval(0.9, 0.8, 1.0)))
    assert found["LoRA parameters"] == found["LoRA bytes"] == "better" and found["carried bytes"] == "same"
    assert found["gain retained"] == "new"
    assert verdicts(report(), report(quality=None))["loss"] == "gone"


def test_a_figure_without_an_interval_is_never_better():
    assert verdicts(report(), report(loss=Interval(None, None, None)))["loss"] == "unclear"


def test_it_says_whether_like_was_compared_with_like():
    other = report(adapter={"name": "b", "original": "3", "compressed": "4"}, rows=("c",))
    found = compare(report(), other)
    assert (found.same_original, found.same_rows) == (False, False)
    assert (compare(report(), report()).same_original, compare(report(), report()).same_rows) == (True, True)
    assert compare(report(), report(quality=None)).same_rows is None
    for change in ({"base_model": "another"}, {"task": "SEQ_CLS"}):
        with pytest.raises(InputError, match="cannot be compared"):
            compare(report(), report(**change))


def test_the_command_reads_directories_and_files_and_prints_both_ways(tmp_path):
    (tmp_path / "report.json").write_text(to_json(report(1000)))
    (tmp_path / "new.json").write_text(to_json(report(2000, rows=("c",))))
    arguments = ["diff", str(tmp_path), str(tmp_path / "new.json")]
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert said.exit_code == 0 and "different rows" in said.output
    line = next(line for line in said.output.splitlines() if "LoRA parameters" in line)
    assert line.split() == ["LoRA", "parameters", "1,000", "2,000", "worse"]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).output)
    assert found["changes"][0] | {"verdict": "worse", "figure": "LoRA parameters"} == found["changes"][0]
    with pytest.raises(InputError, match="does not exist"):
        CliRunner().invoke(cli, ["diff", str(tmp_path), str(tmp_path / "nowhere")], catch_exceptions=False)
