"""The job for GitLab, its lines run by a shell as the runner does it, and without GitLab."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.support import ADAPTER, BASE, CALIBRATION, as_installed

ROOT = Path(__file__).parent.parent
JOB = yaml.safe_load((ROOT / "integrations" / "gitlab.yml").read_text())[".lorapack"]
SETTINGS = """
[compress]
data = "rows.jsonl"
base = "stories260k"
budget = "50%"
method = "rank"
recover-steps = 0
sample = "10"

[compress.rank]
metric = "weight"
"""


def job(workspace: Path, **given: str) -> tuple[int, str]:
    """Run a job that extends `.lorapack`: before_script and script in one shell, after_script in another.

    Returns:
        The exit code, which the after_script has no say in, and the log.
    """
    variables = {**JOB["variables"], **given}
    here = {name: text.replace("$CI_PROJECT_DIR", str(workspace)) for name, text in variables.items()}
    codes, log = [], ""
    for lines in ([*JOB["before_script"], *JOB["script"]], JOB["after_script"]):
        done = subprocess.run(
            ["sh", "-e", "-c", "\n".join(lines)],
            cwd=workspace,
            env=as_installed(CI_PROJECT_DIR=str(workspace), **here),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        codes.append(done.returncode)
        log += done.stdout
    return codes[0], log


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    place = tmp_path_factory.mktemp("gitlab")
    shutil.copytree(ADAPTER, place / "my adapter")
    shutil.copytree(BASE, place / "stories260k")
    (place / "rows.jsonl").write_text("".join(CALIBRATION.read_text().splitlines(keepends=True)[:40]))
    (place / "lorapack.toml").write_text(SETTINGS)
    return place


def artifacts(workspace: Path, out: str) -> list[Path]:
    """What the job keeps; each has to be there."""
    kept = [*JOB["artifacts"]["paths"], JOB["artifacts"]["reports"]["junit"]]
    found = [workspace / name.replace("$LORAPACK_OUT", out) for name in kept]
    assert JOB["artifacts"]["when"] == "always" and all(path.exists() for path in found), found
    return found


@pytest.mark.parametrize(("bound", "code", "failures"), [("10%", 0, 0), ("99%", 3, 1)])
def test_a_job_ends_as_its_gates_do_and_keeps_what_there_is_to_look_at(workspace, bound, code, failures):
    out = f"result {bound[:-1]}"
    gates = f"--min-retained {bound} --max-params 100000"
    found, log = job(
        workspace, LORAPACK_INSTALL="none", LORAPACK_ADAPTER="my adapter", LORAPACK_OUT=out, LORAPACK_GATES=gates
    )
    assert found == code, log
    result, page, junit = artifacts(workspace, out)
    assert len(json.loads((result / "report.json").read_text())["gates"]) == 2
    assert "<html" in page.read_text()
    suite = ElementTree.parse(junit).getroot()
    assert len(list(suite.iter("testcase"))) == 2 and len(list(suite.iter("failure"))) == failures
    assert bool(re.search("gate not met: --min-retained", log)) == bool(failures)


def test_no_variable_becomes_a_command(workspace):
    planted = "; touch planted $(touch planted) `touch planted` *"
    for name in ("LORAPACK_ADAPTER", "LORAPACK_GATES"):
        code, log = job(workspace, **{"LORAPACK_INSTALL": "none", "LORAPACK_OUT": "none", name: planted})
        assert code == 2 and not (workspace / "planted").exists() and "rows.jsonl" not in log, log
