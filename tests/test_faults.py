"""Faults of the machine, of the files and of the people around it; each outcome is in docs/reliability.md."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from readers import LORA, PAIRS
from safetensors.torch import save_file
from support import ADAPTER, BASE, CALIBRATION, HELDOUT, as_installed, call, edit, refused, run

from lorapack.cli.main import GATE
from lorapack.errors import InputError
from lorapack.export.record import read_record
from lorapack.merge.base import companions
from lorapack.merge.layout import fill
from lorapack.merge.stream import Files, copy
from lorapack.read.files import read_bin, read_json, read_safetensors
from lorapack.read.patterns import check_time

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PLAN = ("--method", "rank", "--metric", "weight", "--budget", "50%")
HALVED = (*PLAN, "--base", BASE)  # without data


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def adapter(path, **changes):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(LORA | changes))
    save_file(PAIRS, path / "adapter_model.safetensors")
    return path


def base(path, **changes):
    shutil.copytree(BASE, path)
    edit(path / "config.json", **changes)
    return path


# The terminal, the pipe, the locale, the path


@pytest.mark.parametrize("command", ["inspect", "plan", "merge"])
def test_what_a_file_says_cannot_move_the_terminal(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "\x1b[31mq\x1b]0;owned\x07\u202e"
    place = adapter(tmp_path / "adapter", base_model_name_or_path=f"\ud800{evil}", task_type=evil)
    named = {name.replace("q_proj", evil): tensor for name, tensor in PAIRS.items()}
    save_file(named, place / "adapter_model.safetensors")
    more = {"plan": PLAN, "merge": ("-o", "out")}
    code, out, err = call(capsys, monkeypatch, command, place, *more.get(command, ()))
    assert code == (2 if command == "merge" else 0), err
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert r"\x1b[31mq" in out + err


@pytest.mark.parametrize(("command", "code"), [("inspect", 0), ("compress", GATE)])
def test_a_reader_that_closes_the_pipe_does_not_change_the_outcome(command, code, tmp_path):
    more = {"compress": (*HALVED, "--max-params", "1", "-o", tmp_path / "out")}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lorapack", command, *map(str, (ADAPTER, *more.get(command, ())))],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == bool(code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lorapack", "inspect", str(ADAPTER)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "lorapack: reading or writing: No space left on device\n"


def test_in_a_locale_without_letters_the_same_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert call(capsys, monkeypatch, "compress", ADAPTER, *HALVED, "-o", "Übung")[0] == 0
    assert call(capsys, monkeypatch, "report", "Übung", "-o", "one.html")[0] == 0
    done = run("report", "Übung", "-o", "two.html", **plain)
    assert done.returncode == 0, done.stderr
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()
    assert not Path("one.html").read_bytes().isascii()


ODD_NAMES = ["with space", "new\nline", "quo'te\"$(touch x);&", "-dash", "Übung 例", "x" * 200]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_may_have_any_name(name, tmp_path, capsys, monkeypatch):
    out = tmp_path / name
    assert call(capsys, monkeypatch, "expand", ADAPTER, "-o", out)[0] == 0
    assert call(capsys, monkeypatch, "inspect", out)[0] == 0
    code, _, err = call(capsys, monkeypatch, "expand", ADAPTER, "-o", out)
    assert code == 2 and err.count("\n") == 1 and "exists" in err
    report = tmp_path / f"{name[:190]}.json"
    assert call(capsys, monkeypatch, "plan", out, *PLAN, "-o", report)[0] == 0
    assert tree(tmp_path) == sorted([name, *(f"{name}/{part}" for part in tree(out)), report.name])


def test_a_path_that_is_no_utf8_is_refused_by_its_reason(tmp_path, capsys, monkeypatch):
    code, _, err = call(capsys, monkeypatch, "expand", ADAPTER, "-o", tmp_path / os.fsdecode(b"\xff"))
    assert code == 2 and "not UTF-8" in err and err.count("\n") == 1
    assert tree(tmp_path) == []


# A base model that an adapter names

NAMES = [
    "../../../../etc",
    "/etc/passwd",
    "https://evil.example/model",
    "file:///etc",
    "$(touch owned)",
    "`touch owned`",
]
NAMES += ["; touch owned", "-rf", "~/model", "a/b/c", "a/b\n", "owner/model", "", "\x1b[2J", "\0", "x" * 5000]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["merge", "measure", "compress", "verify"])
def test_a_base_model_that_is_none_is_refused_in_one_line(name, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = adapter(tmp_path / "adapter", base_model_name_or_path=name)
    data = ("--data", CALIBRATION)
    more = {"merge": ("-o", "out"), "compress": (*data, "-o", "out"), "measure": data, "verify": (place,)}
    code, out, err = call(capsys, monkeypatch, command, place, *more[command])
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("lorapack: ") and err.strip().isprintable()
    assert tree(tmp_path) == ["adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["llama", "theirs"])
def test_code_that_a_base_model_brings_is_not_run(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {f"Auto{what}": f"code.{what}" for what in ("Config", "Model", "ModelForCausalLM", "Tokenizer")}
    place = base(tmp_path / "base", model_type=kind, auto_map=names)
    edit(place / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    (place / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code, _, err = call(capsys, monkeypatch, "measure", ADAPTER, "--base", place, "--data", CALIBRATION, "--sample", 2)
    assert code == (0 if kind == "llama" else 2), err
    assert call(capsys, monkeypatch, "merge", ADAPTER, "--base", place, "-o", "out")[0] == 0
    assert Path("out", "code.py").exists() and not Path("ran").exists()


# Links, pipes, and names of files


def test_inputs_are_read_through_links_and_stay_links(tmp_path, capsys, monkeypatch):
    (tmp_path / "adapter").symlink_to(ADAPTER)
    (tmp_path / "base").mkdir()
    for path in BASE.iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    out = tmp_path / "out"
    assert call(capsys, monkeypatch, "merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", out)[0] == 0
    assert not any(path.is_symlink() for path in out.iterdir())
    assert all(path.is_symlink() for path in (tmp_path / "base").iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_link_out_of_a_model_is_not_copied_into_the_result(name, tmp_path, capsys, monkeypatch):
    place = base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(tmp_path / "secret")
    code, _, err = call(capsys, monkeypatch, "merge", ADAPTER, "--base", place, "-o", tmp_path / "out")
    assert code == 2 and f"{name} is a link to {tmp_path / 'secret'}" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    assert companions(snapshot, ADAPTER) == {"tokenizer.json": snapshot / "tokenizer.json"}


@pytest.mark.parametrize("read", [read_json, read_safetensors, read_bin])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("part", ["slots", "carried"])
@pytest.mark.parametrize("name", ["../../elsewhere.onnx", "/etc/model.onnx", "model.txt", ".."])
def test_an_export_that_names_graphs_elsewhere_is_refused(name, part, tmp_path):
    record = {"lorapack": "1", "task": "CAUSAL_LM", "dtype": "fp32", "adapter": "a", "base": "b", "fingerprint": "f"}
    (tmp_path / "export.json").write_text(json.dumps(record | {part: {name: {}}}))
    with pytest.raises(InputError, match="no plain name"):
        read_record(tmp_path)


def test_a_file_that_is_cut_off_after_it_was_read_changes_nothing(tmp_path):
    save_file({"a": torch.ones(100_000)}, tmp_path / "file.safetensors")
    found = read_safetensors(tmp_path / "file.safetensors")[0]["a"]
    os.truncate(tmp_path / "file.safetensors", 100)  # of a view of the file, the next line would end the process
    assert torch.equal(found, torch.ones(100_000))


def test_a_base_that_is_cut_off_while_it_is_read_is_one_line(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(1000))
    with open(source, "rb") as file, open(target, "wb") as out:
        os.truncate(source, 10)
        with pytest.raises(InputError, match="cut off while it was read"):
            fill(file.fileno(), np.empty(1000, np.uint8), 0)
        with pytest.raises(InputError, match="cut off while it was read"):
            copy(Files(file.fileno(), out.fileno()), 0, 1000, 0)


# Patterns that PEFT itself would match


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern"]
)
@pytest.mark.parametrize("pattern", ["(.|.)*x", "(a|a)+b", "("])
def test_a_pattern_that_never_ends_or_is_none_is_refused_by_its_field(field, pattern, monkeypatch):
    monkeypatch.setattr("lorapack.read.patterns.SECONDS", 0.5)
    given = {pattern: 1} if field == "rank_pattern" else pattern if field.startswith(("target", "ex")) else [pattern]
    with pytest.raises(InputError, match=f"{field}: the pattern .*(takes too long|is no regular expression)"):
        check_time({field: given, "alpha_pattern": {"q_proj": 1}}, ["a" * 40])
    check_time({field: given}, [])


def test_a_verification_does_not_hang_on_a_pattern(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lorapack.read.patterns.SECONDS", 0.5)
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", target_modules="(.|.)*x")
    code, _, err = call(capsys, monkeypatch, "verify", *[tmp_path / "adapter"] * 2, "--base", BASE)
    assert code == 2 and "takes too long" in err and err.count("\n") == 1


# The clock

BACKWARDS = """
import random, sys, time
from datetime import datetime
now, rng = time.time(), random.Random(0)
time.time = lambda: now - rng.uniform(0, 1e6)
from lorapack.cli import main
sys.argv = ["lorapack", *sys.argv[1:]]
main()
"""


def test_a_clock_that_jumps_back_changes_no_figure(tmp_path):
    data = [CALIBRATION, HELDOUT]
    rows = [tmp_path / f"{n}.jsonl" for n in range(len(data))]
    for path, source in zip(rows, data, strict=True):
        path.write_text("".join(source.read_text().splitlines(keepends=True)[:8]))
    arguments = ["compress", ADAPTER, "--base", BASE, "--data", rows[0], "--eval-data", rows[1], "--sample", "2"]
    arguments += ["--method", "rank", "--budget", "50%", "--max-length", "32", "--recover-steps", "2", "--json"]
    made = {}
    for name, command in (("jumps", ["-c", BACKWARDS]), ("even", ["-m", "lorapack"])):
        whole = [sys.executable, *command, *map(str, arguments), "-o", str(tmp_path / name)]
        done = subprocess.run(whole, capture_output=True, text=True, env=as_installed())
        assert done.returncode == 0, done.stderr
        made[name] = json.loads(done.stdout)
        assert all(step["seconds"] >= 0 for step in made[name].pop("run")["steps"].values())
    assert made["jumps"] == made["even"]
    model = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in made]
    assert model[0] == model[1]


# File systems: read-only ones, and full ones

READ_ONLY = """
mount -t tmpfs none "$1" && cp -r "$2" "$1/adapter" && cp -r "$3" "$1/base" && mount -o remount,ro "$1" || exit 77
cd "$4"
"$5" -m lorapack merge "$1/adapter" --base "$1/base" -o out || exit 1
"$5" -m lorapack merge "$1/adapter" --base "$1/base" -o "$1/out"; test $? = 2 || exit 1
"$5" -m lorapack plan "$1/adapter" --method rank --metric weight --budget 50% -o "$1/plan.json"; test $? = 2 || exit 1
"""


def in_a_namespace(script, *arguments):
    """A shell script where mounting is allowed; skips where it is not."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    return done


def test_inputs_may_be_read_only_and_outputs_say_that_they_cannot(tmp_path):
    for name in ("mount", "work"):
        (tmp_path / name).mkdir()
    done = in_a_namespace(READ_ONLY, tmp_path / "mount", ADAPTER, BASE, tmp_path / "work", sys.executable)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("lorapack: ") for line in lines)
    assert all("cannot be made: Read-only file system" in line for line in lines)
    assert "adapter_config.json" not in tree(tmp_path / "work" / "out")
    assert read_json(tmp_path / "work" / "out" / "config.json") == read_json(BASE / "config.json")


SAMPLED = ["expand", "merge", "merge of .bin", "convert to PEFT", "convert to GGUF", "extract", "plan", "report"]
SAMPLED += ["compress without data", "measure"]


@pytest.fixture(scope="module")
def full_disks():
    """Trials of `benchmarks/full_disk.py`, which does all commands and all sizes."""
    in_a_namespace('mount -t tmpfs none "$1" || exit 77', "/mnt")
    sizes = [f"--size={share}" for share in (0.3, 0.97)]
    done = run_benchmark("full_disk.py", *SAMPLED, "--inside", *sizes, before=("unshare", "-rm"))
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_benchmark(name, *arguments, before=()):
    done = subprocess.run(
        [*before, sys.executable, "-W", "ignore", str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        env=as_installed(),
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("command", SAMPLED)
def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(command, full_disks):
    found = [each for each in full_disks if each["command"] == command]
    assert found[0]["code"] == 0, "it does not work on a disk with room"
    for each in found[1:]:
        if each["code"] == 0:  # the disk was large enough
            continue
        lines = each["said"].splitlines()
        assert each["code"] == 2 and len(lines) == 1 and lines[0].startswith("lorapack: "), each
        assert "cannot be" in lines[0] or "No space left" in lines[0], each
        assert each["left"] == [], each
    assert len(found) > 1 and (found[0]["taken"] <= 4096 or found[1]["code"] == 2)


def test_a_push_without_room_for_its_copy_is_one_line(tmp_path, capsys, monkeypatch):
    assert call(capsys, monkeypatch, "compress", ADAPTER, *HALVED, "-o", tmp_path / "out")[0] == 0
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "lorapack", "push", "out", "somebody/out", "--base", "somebody/base"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert "File too large" in refused(done)
    assert tree(tmp_path) == before


def test_a_signal_at_any_moment_leaves_a_whole_output_or_none():
    done = run_benchmark("signals.py", "merge", "convert to GGUF", "plan", "2")
    for line in done.stdout.splitlines():
        assert json.loads(line)["faults"] == []
