"""The pre-commit hook that refuses large adapters, as git and pre-commit run it."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ADAPTER, as_installed, edit, run

ROOT = Path(__file__).parent.parent
HOOK = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
LIMIT = "50KB"
COMPRESS = ["--method", "rank", "--metric", "weight", "--budget", "50%", "--recover-steps", "0"]


def git(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    return subprocess.run(
        ["git", *identity, *words], cwd=place, env=as_installed(), capture_output=True, text=True, timeout=120
    )


def repository(place: Path) -> Path:
    place.mkdir()
    assert git(place, "init", "--quiet").returncode == 0
    return place


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A compressed adapter, still above the limit."""
    out = tmp_path_factory.mktemp("smaller") / "adapter"
    done = run("compress", ADAPTER, *COMPRESS, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "adapter_model.safetensors").stat().st_size > 50_000
    return out


@pytest.fixture
def checkout(tmp_path):
    """A git repository whose hook runs the entry on the staged files that it is for, with a limit."""
    place = repository(tmp_path / "checkout")
    assert HOOK["language"] == "script"
    hook = place / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        "#!/bin/sh\n"
        f"git diff --cached --name-only --diff-filter=d | grep -E '{HOOK['files']}' |\n"
        f"xargs -r -d '\\n' '{ROOT / HOOK['entry']}' --max-bytes {LIMIT}\n"
    )
    hook.chmod(0o755)
    return place


def commit(place: Path) -> subprocess.CompletedProcess[str]:
    assert git(place, "add", "--all").returncode == 0
    return git(place, "commit", "--quiet", "--message", "An adapter")


def test_a_large_adapter_is_refused_and_its_compression_is_not(checkout, smaller):
    shutil.copytree(ADAPTER, checkout / "my adapter")
    done = commit(checkout)
    assert done.returncode != 0
    said = "my adapter/adapter_model.safetensors: 37.,... bytes, more than 50,000, and not made by lorapack: .*"
    assert re.fullmatch(said, done.stderr.strip()), done.stderr
    shutil.rmtree(checkout / "my adapter")
    shutil.copytree(smaller, checkout / "my adapter")
    assert commit(checkout).returncode == 0


def test_a_report_lets_pass_only_the_bytes_it_was_written_with(checkout, smaller):
    shutil.copytree(smaller, checkout / "adapter")
    shutil.copy(ADAPTER / "adapter_model.safetensors", checkout / "adapter")
    assert "not made by lorapack" in commit(checkout).stderr


def test_the_compact_format_needs_no_report(checkout, smaller):
    shutil.copytree(smaller, checkout / "adapter")
    (checkout / "adapter" / "report.json").write_text("[no report")
    assert commit(checkout).returncode != 0
    edit(checkout / "adapter" / "adapter_config.json", peft_type="LORAPACK")
    assert commit(checkout).returncode == 0


def test_small_adapters_and_other_files_are_not_looked_at(checkout):
    (checkout / "adapter_model.safetensors").write_bytes(bytes(50_000))
    (checkout / "model.safetensors").write_bytes(bytes(60_000))
    assert commit(checkout).returncode == 0
    (checkout / "adapter_model.bin").write_bytes(bytes(50_001))
    assert commit(checkout).returncode != 0


def test_a_size_that_is_none_is_refused():
    done = subprocess.run([ROOT / HOOK["entry"], "--max-bytes", "large"], capture_output=True, text=True)
    assert done.returncode == 2 and "'large' is not a size like 10MB" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("pre_commit") is None, reason="pre-commit is not installed")
def test_pre_commit_runs_it(tmp_path, monkeypatch, smaller):
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    hooks = repository(tmp_path / "hooks")
    (hooks / "integrations").mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    shutil.copy(ROOT / HOOK["entry"], hooks / HOOK["entry"])
    assert commit(hooks).returncode == 0
    place = repository(tmp_path / "checkout")
    hook = {"id": HOOK["id"], "args": ["--max-bytes", LIMIT]}
    used = {"repo": str(hooks), "rev": git(hooks, "rev-parse", "HEAD").stdout.strip(), "hooks": [hook]}
    (place / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [used]}))
    for source, refused in ((ADAPTER, True), (smaller, False)):
        shutil.copytree(source, place / "adapter", dirs_exist_ok=True)
        git(place, "add", "--all")
        command = [sys.executable, "-m", "pre_commit", "run"]
        done = subprocess.run(command, cwd=place, env=as_installed(), capture_output=True, text=True, timeout=120)
        assert done.returncode == int(refused) and ("not made by lorapack" in done.stdout) == refused, done.stdout
