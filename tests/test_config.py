"""`lorapack.toml`: what a file may set, how it is refused, and that the command line wins."""

import json
import shlex

import click
import pytest
from support import ADAPTER, refused, run

from lorapack.cli.config import Config, defaults, options_of
from lorapack.cli.main import cli
from lorapack.cli.options import MethodCommand
from lorapack.core import report as reports
from lorapack.errors import InputError
from lorapack.plan import METHODS

CUT = '[compress]\nmethod = "rank"\nbudget = "50%"\n[compress.rank]\nmetric = "weight"\n'


def checked(**tables):
    return defaults(Config("file", tables), cli, cli.commands)


def example(option: click.Option):
    """Some value that the option takes."""
    kinds = {click.types.BoolParamType: True, click.types.IntParamType: 3, click.types.FloatParamType: 0.5}
    texts = {"columns": "text=body", "retain": "90%", "min_retained": "90%", "max_bytes": "5KB"}
    texts |= {"weights": "0.7,0.3", "enable_lora": "true,false,true"}
    value = next((v for kind, v in kinds.items() if isinstance(option.type, kind)), texts.get(option.name, "50%"))
    value = option.type.choices[0] if isinstance(option.type, click.Choice) else value
    return [value] if option.multiple else value


@pytest.mark.parametrize("name", [n for n, command in cli.commands.items() if options_of(command)])
def test_every_option_of_every_command_can_stand_in_the_file(name):
    options = options_of(cli.commands[name])
    options.pop("trust-remote-code", None)
    table = {key: example(option) for key, option in options.items()}
    assert checked(**{name: table}) == {name: {options[key].name: value for key, value in table.items()}}
    if isinstance(cli.commands[name], MethodCommand):
        for method, found in METHODS.items():
            for option, declared in found.options.items():
                value = declared.choices[0] if declared.choices else declared.kind(1)
                read = checked(**{name: {method: {option.replace("_", "-"): value}}})
                assert found.parse(method, read[name][method]) == {option: value}


@pytest.mark.parametrize(
    ("tables", "needle"),
    [
        ({"comprss": {}}, "[comprss] is no command with options; did you mean compress?"),
        ({"seed": 1}, "seed stands in no table"),
        ({"compress": 1}, "write [compress]"),
        ({"config": {"file": "x"}}, "[config] is no command"),
        (
            {"compress": {"recover_steps": 1}},
            "compress.recover_steps is no option of compress; did you mean recover-st",
        ),
        ({"inspect": {"rank": {}}}, "inspect.rank is no option of inspect"),
        ({"compress": {"seed": "7"}}, "compress.seed: '7' is not a whole number"),
        ({"compress": {"seed": True}}, "compress.seed: True is not a whole number"),
        ({"compress": {"overwrite": 1}}, "compress.overwrite: 1 is not true or false"),
        ({"compress": {"learning-rate": "low"}}, "compress.learning-rate: 'low' is not a number"),
        ({"compress": {"retain": 0.9}}, "compress.retain: 0.9 is not text in quotes"),
        ({"compress": {"retain": "most"}}, "compress.retain: --retain 'most' is not a share"),
        ({"compress": {"store": "int5"}}, "compress.store: 'int5' is not one of"),
        ({"sweep": {"budget": "50%"}}, "sweep.budget: '50%' is no list"),
        ({"sweep": {"budget": [50]}}, "sweep.budget: 50 is not text in quotes"),
        ({"compress": {"rnk": {}}}, "compress.rnk is no method; did you mean rank?"),
        ({"compress": {"rank": {"metrik": "loss"}}}, "compress.rank.metrik is no option of rank; did you mean metric?"),
        ({"compress": {"rank": {"metric": "lost"}}}, "compress.rank.metric: 'lost' is none of weight"),
        ({"compress": {"rank": {"share": "all"}}}, "compress.rank.share: 'all' is not a number"),
        ({"compress": {"trust-remote-code": True}}, "a file must not decide that code is run"),
    ],
)
def test_what_cannot_be_is_refused_with_file_key_and_the_nearest_name(tables, needle):
    with pytest.raises(InputError) as said:
        checked(**tables)
    assert str(said.value).startswith("file: ") and needle in str(said.value) and "\n" not in str(said.value)


def test_the_command_line_wins_over_the_file_and_the_report_says_the_command_in_full(tmp_path):
    (tmp_path / "lorapack.toml").write_text('[compress]\nretain = "90%"\nseed = 5\n' + CUT.removeprefix("[compress]\n"))
    edited = (tmp_path / "lorapack.toml").read_text().replace('budget = "50%"\n', "")
    (tmp_path / "lorapack.toml").write_text(edited)  # retain and budget exclude each other
    done = run("compress", ADAPTER, "--budget", "25%", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = reports.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.settings["seed"] == 5 and report.plan.options["metric"] == "weight"
    assert report.after.parameters <= 0.25 * report.before.parameters
    said = shlex.join(report.run["command"])
    assert said == f"lorapack compress {ADAPTER} --out out --method rank --budget 25% --seed 5 --metric weight"
    (tmp_path / "lorapack.toml").unlink()
    again = [word if word != "out" else "again" for word in report.run["command"][1:]]
    assert run(*again, cwd=tmp_path).returncode == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "again"))
    assert one.pop("run") and two.pop("run") and one == two


def test_options_of_another_method_than_the_files_stay_out(tmp_path):
    (tmp_path / "lorapack.toml").write_text(CUT + "[compress.vera]\nrank = 9\n[compress.adalora]\n")
    run("compress", ADAPTER, "-o", "out", cwd=tmp_path)
    report = reports.from_json((tmp_path / "out" / "report.json").read_text())
    assert (
        report.plan.method == "rank" and "--metric" in report.run["command"] and "--rank" not in report.run["command"]
    )


def test_the_file_is_found_named_or_left_out(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert "there is no lorapack.toml" in refused(run("config", "check", cwd=tmp_path))
    (tmp_path / "pyproject.toml").write_text("[tool.lorapack.inspect]\njson = true\n")
    assert json.loads(run("inspect", ADAPTER, cwd=tmp_path).stdout)["format"] == "PEFT LoRA"
    assert "pyproject.toml [tool.lorapack] is good: inspect 1" in run("config", "check", cwd=tmp_path).stdout
    (tmp_path / "lorapack.toml").write_text("[inspct]\n")  # nearer than pyproject.toml
    assert "did you mean inspect?" in refused(run("inspect", ADAPTER, cwd=tmp_path))
    assert "did you mean inspect?" in refused(run("config", "check", cwd=tmp_path))
    assert run("inspect", "--help", cwd=tmp_path).returncode == 0
    (tmp_path / "empty.toml").write_text("")
    assert "PEFT LoRA, " in run("--config", "empty.toml", "inspect", ADAPTER, cwd=tmp_path).stdout
    (tmp_path / "cut.toml").write_text("[inspect")
    assert "cut.toml is no TOML" in refused(run("--config", "cut.toml", "inspect", ADAPTER, cwd=tmp_path))
    assert "no.toml cannot be read" in refused(run("--config", "no.toml", "inspect", ADAPTER, cwd=tmp_path))
