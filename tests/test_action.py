"""The GitHub Action, run step by step as the runner does it, with GitHub's files and without GitHub."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support import ADAPTER, BASE, CALIBRATION, HELDOUT, as_installed

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
STATUS = re.compile(r"\b(success|always|failure)\(\)")
FAST = "--method rank --metric weight --budget 50% --recover-steps 0 --sample 10"


@dataclass(frozen=True)
class Job:
    """What is left of a run of the action."""

    code: int
    log: str
    summary: str
    outputs: dict[str, str]
    ran: list[str]

    @property
    def errors(self) -> list[str]:
        """The annotations, as GitHub would show them."""
        found = re.findall(r"^::error title=lorapack::(.*)$", self.log, re.M)
        return [text.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%") for text in found]


def evaluated(expression: str, inputs: dict[str, str], outputs: dict[str, dict[str, str]]) -> str:
    """`inputs.NAME`, or `steps.ID.outputs.NAME` (empty where the step did not say it)."""
    match expression.split("."):
        case ["inputs", name]:
            return inputs[name]
        case ["steps", step, "outputs", name]:
            return outputs.get(step, {}).get(name, "")
    raise AssertionError(f"{expression} is nothing that the harness knows")


def filled(text: str, *known) -> str:
    return EXPRESSION.sub(lambda found: evaluated(found[1], *known), text)


def due(condition: str, failed: bool, *known) -> bool:
    """Whether a step runs; a condition without a status function wants success, as on GitHub."""
    status = {"success": not failed, "always": True, "failure": failed}
    parts = condition.split(" && ") if STATUS.search(condition) else ["success()", *condition.split(" && ")]
    for part in filter(None, parts):
        if found := STATUS.fullmatch(part):
            met = status[found[1]]
        else:
            name, literal = re.fullmatch(r"(\S+) != '(.*)'", part).groups()
            met = evaluated(name, *known) != literal
        if not met:
            return False
    return True


def pairs(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def act(workspace: Path, **given: str) -> Job:
    """Run the `run` steps of the action in a workspace; `uses` steps are other people's and are skipped."""
    given = {name.replace("_", "-"): value for name, value in given.items()}
    assert given.keys() <= ACTION["inputs"].keys()
    inputs = {name: given.get(name, entry.get("default", "")) for name, entry in ACTION["inputs"].items()}
    files = Path(tempfile.mkdtemp(dir=workspace.parent))
    summary = files / "summary.md"
    summary.touch()
    environment = as_installed(
        GITHUB_ACTIONS="true",
        GITHUB_ACTION_PATH=str(ROOT),
        GITHUB_STEP_SUMMARY=str(summary),
        RUNNER_TEMP=str(files),
    )
    code, log, ran, outputs = 0, "", [], {}
    for number, step in enumerate(ACTION["runs"]["steps"]):
        if "uses" in step or not due(step.get("if", ""), code != 0, inputs, outputs):
            continue
        assert step["shell"] == "bash" and "${{" not in step["run"], step["name"]
        script, said = files / f"{number}.sh", files / f"{number}.output"
        script.write_text(step["run"])
        said.touch()
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=workspace,
            env={
                **environment,
                **{name: filled(text, inputs, outputs) for name, text in step.get("env", {}).items()},
                "GITHUB_OUTPUT": str(said),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        outputs[step.get("id", step["name"])] = pairs(said)
        ran.append(step["name"])
        log += done.stdout
        code = code or done.returncode
    told = {name: filled(entry["value"], inputs, outputs) for name, entry in ACTION["outputs"].items()}
    return Job(code, log, summary.read_text(), told, ran)


def compress(workspace: Path, options: str, **given: str) -> Job:
    settings = {"adapter": "adapter", "base": "stories260k", "data": "rows.jsonl", "install": "none", **given}
    return act(workspace, options=f"{FAST} {options}", **settings)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A checkout with an adapter, its base and few rows."""
    place = tmp_path_factory.mktemp("runner") / "work space"
    place.mkdir()
    shutil.copytree(ADAPTER, place / "adapter")
    shutil.copytree(BASE, place / "stories260k")
    for source, name, rows in ((CALIBRATION, "rows.jsonl", 40), (HELDOUT, "held out.jsonl", 10)):
        (place / name).write_text("".join(source.read_text().splitlines(keepends=True)[:rows]))
    return place


@pytest.fixture(scope="module")
def good(workspace):
    """The job that made `smaller`."""
    return compress(workspace, "--min-retained 10%", out="smaller/")


def test_a_good_adapter_passes_with_its_figures_in_the_summary(workspace, good):
    assert good.code == 0, good.log
    assert good.outputs == {"out": "smaller", "exit-code": "0"} and good.errors == []
    assert good.ran == ["Run lorapack", "Summarise"], "nothing is installed where `install` is none"
    assert "| LoRA parameters | 92,480 | 46,236 | 50.0% |" in good.summary
    assert "✅ met | --min-retained 10.00%" in good.summary and "**gain retained**" in good.summary
    assert (workspace / "smaller" / "adapter_model.safetensors").exists()
    assert "<html" in (workspace / "smaller.html").read_text()


def test_a_bad_adapter_fails_with_3_and_says_which_figure_missed_which_gate(workspace):
    job = compress(workspace, "--min-retained 99% --max-params 100000 --max-bytes 10KB")
    assert job.code == 3 and job.outputs == {"out": "compressed", "exit-code": "3"}, job.log
    retained, size = job.errors
    figure = r"gain retained 6\d\.\d\d% \[6.*%, 7.*%\], lower bound 6\d\.\d\d% is below it"
    assert re.fullmatch(f"gate not met: --min-retained 99.00%: {figure}", retained)
    assert size.startswith("gate not met: --max-bytes 10,000: LoRA bytes 184,944 is above it")
    assert "❌" in job.summary and "--max-bytes 10,000" in job.summary and "LoRA parameters" in job.summary
    assert (workspace / "compressed.html").exists(), "somebody has to be able to look at it"


def test_what_was_there_before_a_bad_input_is_not_reported_as_its_result(workspace, good):
    job = compress(workspace, "", out=good.outputs["out"])
    assert job.code == 2 and job.outputs == {"out": "", "exit-code": "2"}
    assert len(job.errors) == 1 and "smaller" in job.errors[0] and job.summary == ""


def test_an_adapter_is_evaluated_with_its_figures_in_the_summary(workspace, good):
    given = {"adapter": good.outputs["out"], "base": "stories260k", "data": "held out.jsonl", "install": "none"}
    job = act(workspace, command="evaluate", options="--original adapter --min-retained 99%", **given)
    assert job.code == 3 and job.outputs == {"out": "", "exit-code": "3"}, job.log
    assert len(job.errors) == 1 and "--min-retained 99.00%: gain retained" in job.errors[0]
    assert job.summary.startswith("```text\n") and "gain retained" in job.summary


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": "--method 'rank"}, "options: No closing quotation in "),
        ({"command": "merge"}, "command: merge is none of compress, evaluate"),
        ({"command": "100%\n::error::planted"}, "command: 100%\n::error::planted is none of"),
        ({"adapter": "$(touch planted)`touch planted`; touch planted"}, "touch planted"),
        ({"adapter": "--help"}, "--help"),
        ({"options": "--seed 7 ; touch planted"}, "touch planted"),
        ({"adapter": "100%\n::error::planted"}, "100%"),
    ],
)
def test_no_input_becomes_a_command(workspace, given, said):
    job = act(workspace, **{"adapter": "adapter", "install": "none", **given})
    assert job.code == 2 and len(job.errors) == 1 and said in job.errors[0], job.log
    assert not (workspace / "planted").exists() and "\n::error::" not in job.log
