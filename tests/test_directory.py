"""An output directory appears whole or not at all, whatever happens and whenever."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import ADAPTER, BASE, CALIBRATION, HELDOUT

from lorapack.errors import OutputError
from lorapack.write import new_directory
from lorapack.write.file import new_file


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def make(out, text="new", **options):
    with new_directory(out, **options) as directory:
        (directory / "adapter_config.json").write_text(text)
        (directory / "below").mkdir()
        (directory / "below" / "two").write_text(text)


def content(out):
    return (out / "adapter_config.json").read_text(), (out / "below" / "two").read_text()


def test_it_appears_at_the_end_and_whole(tmp_path):
    out = tmp_path / "new" / "parents" / "out"
    with new_directory(out) as directory:
        (directory / "adapter_config.json").write_text("1")
        assert not out.exists()
    assert names(out) == ["adapter_config.json"]
    assert names(out.parent) == ["out"]


def test_after_an_error_nothing_is_left_not_even_the_parents_made_for_it(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "new" / "parents" / "out") as directory:
        (directory / "adapter_config.json").write_text("1")
        raise KeyError
    assert names(tmp_path) == []


def test_parents_that_somebody_else_uses_in_the_meantime_stay(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "parent" / "out"):
        (tmp_path / "parent" / "of another").mkdir()
        raise KeyError
    assert names(tmp_path / "parent") == ["of another"]


def test_an_existing_one_is_refused_and_left_as_it_is(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists"):
        make(tmp_path / "out")
    assert content(tmp_path / "out") == ("old", "old")
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_it_at_the_end_and_whole(tmp_path):
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "left").write_text("old")
    with new_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "adapter_config.json").write_text("new")
        assert content(tmp_path / "out") == ("old", "old")
    assert names(tmp_path / "out") == ["adapter_config.json"]
    assert names(tmp_path) == ["out"]


def test_an_error_while_overwriting_leaves_the_old_one(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(KeyError), new_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "adapter_config.json").write_text("new")
        raise KeyError
    assert content(tmp_path / "out") == ("old", "old")
    assert names(tmp_path) == ["out"]


def failing_rename(monkeypatch, fault):
    """Let the rename that publishes the new directory fail, at the worst moment: the old one is out of the way."""
    rename = Path.rename

    def tried(self, target):
        if self.name == "out" and ".lorapack-" in self.parent.name:
            fault()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", tried)


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_rename_that_fails_while_overwriting_leaves_the_old_one(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    failing_rename(monkeypatch, no_space)
    with pytest.raises(OutputError, match="No space left"):
        make(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == ("old", "old")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a directory"])
def test_what_is_no_directory_is_never_replaced(kind, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    out.write_text("mine") if kind == "file" else out.symlink_to("other" if kind.endswith("directory") else "nothing")
    before = os.lstat(out)
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            make(out, overwrite=overwrite)
    assert os.lstat(out).st_ino == before.st_ino
    assert names(tmp_path / "other") == []


@pytest.mark.parametrize("place", [".", "inside", "inside/deeper", ".."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_overlaps_an_input_is_refused(place, overwrite, tmp_path):
    source = tmp_path / "work" / "input"
    (source / "inside").mkdir(parents=True)
    (source / "file").write_text("precious")
    with pytest.raises(OutputError, match="overlap"):
        make(Path(os.path.normpath(source / place)), overwrite=overwrite, inputs=(source,))
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="overlap"):
        make(tmp_path / "link" / "out", overwrite=overwrite, inputs=(source,))
    assert (source / "file").read_text() == "precious" and names(source) == ["file", "inside"]


def test_a_directory_that_holds_an_input_file_is_not_replaced(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="overlap"):
        make(tmp_path / "out", overwrite=True, inputs=(tmp_path / "out" / "adapter_config.json",))
    make(tmp_path / "new", inputs=(tmp_path / "out" / "adapter_config.json", "owner/name", "/nowhere/at/all"))
    assert content(tmp_path / "out") == ("old", "old")


@pytest.mark.parametrize("out", ["/proc/x/out", "/sys/x", "/dev/null/x", "x" * 255])
def test_where_nothing_can_be_made_it_is_one_line(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="cannot be made") as refusal:
        make(out)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == []


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        make(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "adapter_config.json").stat().st_mode & 0o777 == 0o644


# Other processes


CHILDREN = set()


@pytest.fixture(autouse=True)
def _no_child_outlives_its_test():
    yield
    for pid in list(CHILDREN):
        os.kill(pid, signal.SIGKILL)
        code_of(pid)


def child(work):
    """Run `work` in a process of its own; its exit code is what it returns."""
    pid = os.fork()
    if pid:
        CHILDREN.add(pid)
        return pid
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def code_of(pid):
    CHILDREN.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Gate:
    """A pipe: `wait` returns once the other side has called `open`, or is gone."""

    def __init__(self):
        self.read, self.write = os.pipe()

    def open(self):
        os.write(self.write, b"x")

    def wait(self):
        os.read(self.read, 1)


def holding(out, ready, go):
    """A process inside the block: it says so, and goes on when it may."""

    def work():
        try:
            with new_directory(out) as directory:
                (directory / "adapter_config.json").write_text("half")
                ready.open()
                go.wait()
        except OutputError:
            return 3
        return 0

    pid = child(work)
    ready.wait()
    return pid


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path):
    pid = holding(tmp_path / "out", Gate(), Gate())
    os.kill(pid, signal.SIGKILL)
    assert code_of(pid) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".out.lorapack-")
    make(tmp_path / "another")  # not its business
    assert len(names(tmp_path)) == 2
    make(tmp_path / "out")
    assert names(tmp_path) == ["another", "out"]


def test_a_living_run_is_not_swept_and_the_slower_one_is_refused(tmp_path):
    go = Gate()
    pid = holding(tmp_path / "out", Gate(), go)
    make(tmp_path / "out")
    assert len(names(tmp_path)) == 2, "the living run's files are still there"
    go.open()
    assert code_of(pid) == 3
    assert content(tmp_path / "out") == ("new", "new")
    assert names(tmp_path) == ["out"]


def test_a_run_killed_in_the_middle_of_replacing_gives_the_old_one_back(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")

    def work():
        failing_rename(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        make(tmp_path / "out", overwrite=True)
        return 0

    assert code_of(child(work)) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="exists"):
        make(tmp_path / "out")
    assert content(tmp_path / "out") == ("old", "old")
    assert names(tmp_path) == ["out"]


def test_a_run_killed_while_cleaning_up_is_swept_too(tmp_path):
    left = tmp_path / ".out.lorapack-abc"
    (left / "old").mkdir(parents=True)  # its lock file is gone already
    (tmp_path / ".out.lorapack-def").mkdir()  # and this one had none yet
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out*", "[o]ut", "out?"])
def test_only_its_own_leftovers_are_swept(name, tmp_path):
    other = tmp_path / ".outer.lorapack-abc"
    other.mkdir()
    make(tmp_path / name)
    assert names(tmp_path) == sorted([other.name, name])


def test_one_that_appears_after_the_last_look_is_left_as_it_is(tmp_path, monkeypatch):
    out, looked, lexists = tmp_path / "out", [], os.path.lexists

    def look(path):
        found = lexists(path)
        looked.append(path)
        if len(looked) == 2:  # before the work, before the rename: now the other one is done
            (tmp_path / "other" / "below").mkdir(parents=True)
            (tmp_path / "other" / "adapter_config.json").write_text("theirs")
            (tmp_path / "other" / "below" / "two").write_text("theirs")
            (tmp_path / "other").rename(out)
        return found

    monkeypatch.setattr(os.path, "lexists", look)
    with pytest.raises(OutputError, match="was made by another run in the meantime"):
        make(out)
    assert content(out) == ("theirs", "theirs")
    assert names(tmp_path) == ["out"]


def codes_of_many(work):
    """The exit codes of six processes that begin at once: 3 where `work` of its number was refused."""
    start = Gate()

    def begin(number):
        os.close(start.write)
        start.wait()
        try:
            work(number)
        except OutputError:
            return 3
        return 0

    pids = [child(lambda number=number: begin(number)) for number in range(6)]
    os.close(start.write)  # the last one: now all of them start
    codes = [code_of(pid) for pid in pids]
    os.close(start.read)
    return codes


def test_of_many_at_once_exactly_one_wins(tmp_path):
    for attempt in range(12):
        out = tmp_path / f"out{attempt}"
        codes = codes_of_many(lambda number, out=out: make(out, str(number)))
        winner = str(codes.index(0))
        assert sorted(codes) == [0, 3, 3, 3, 3, 3]
        assert content(out) == (winner, winner)
    assert names(tmp_path) == sorted(f"out{attempt}" for attempt in range(12))


# A single file, made in the same way


def test_a_file_that_a_killed_run_left_is_swept_by_the_next(tmp_path):
    def work():
        with new_file(tmp_path / "plan.json") as file:
            save_file({"a": torch.ones(2)}, file)  # which makes files of its own beside it
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert code_of(child(work)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".plan.json.lorapack-")
    put(tmp_path / "plan.json", "new")
    assert names(tmp_path) == ["plan.json"] and (tmp_path / "plan.json").read_text() == "new"


def put(out, text):
    with new_file(out) as file:
        file.write_text(text)


def test_of_many_files_at_once_exactly_one_wins(tmp_path):
    for attempt in range(12):
        out = tmp_path / f"file{attempt}"
        codes = codes_of_many(lambda number, out=out: put(out, str(number)))
        assert sorted(codes) == [0, 3, 3, 3, 3, 3]
        assert out.read_text() == str(codes.index(0))
    assert names(tmp_path) == sorted(f"file{attempt}" for attempt in range(12))


def test_a_file_whose_writer_puts_another_in_its_place_keeps_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "file") as file:
            save_file({"a": torch.ones(2)}, file)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    with new_file(tmp_path / "file", overwrite=True) as file:
        file.write_text("over")
    assert (tmp_path / "file").read_text() == "over"


def test_a_directory_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    claimed, flock = [], fcntl.flock

    def swept(descriptor, how):
        if not claimed:  # as another run's sweep, which came between the two
            claimed.append(next(tmp_path.iterdir()))
            shutil.rmtree(claimed[0])
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", swept)
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"] and claimed


# The real command, killed at random moments. One process imports everything and forks a child for each
# trial; half of the children are killed after a random time, the others when a certain file appears.

KILLER = """
import glob, hashlib, json, os, random, signal, sys, time
import torch, transformers, peft
from pathlib import Path
import lorapack
from lorapack.cli.files import read_report
from lorapack.cli.main import main
from lorapack.core.adapter import digest

torch.set_num_threads(1)
adapter, base, data, held, folder = sys.argv[1:]
out = Path(folder) / "out"
arguments = ["lorapack", "compress", adapter, "--base", base, "--data", data, "--eval-data", held, "--sample", "2",
             "--method", "lora-drop", "--max-length", "32", "--recover-steps", "1", "--batch-size", "2",
             "-o", str(out), "--overwrite"]
transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # import what is lazy
transformers.AutoModelForCausalLM.from_pretrained(base)
transformers.AutoTokenizer.from_pretrained(base)
import lorapack.cli.progress, lorapack.cli.show, lorapack.compress, lorapack.write  # noqa

def start():
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = arguments
    try:
        main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(98)

def state():
    return {p: hashlib.sha256(Path(p).read_bytes()).hexdigest()
            for d in (adapter, base) for p in sorted(glob.glob(d + "/*"))}

def whole():
    found = lorapack.read_adapter(out)
    report = read_report(out)
    assert report is not None and report.adapter["compressed"] == digest(found)
    assert sorted(os.listdir(out)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "report.json"]

begin = time.perf_counter()
code = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
duration = time.perf_counter() - begin
assert code == 0, code
whole()
import shutil
shutil.rmtree(out)

generator = random.Random(0)
before, trials = state(), []
triggers = [None, "adapter_config.json", None, "adapter_model.safetensors", None, "report.json", None, "README.md"]
for number in range(20):
    trigger = triggers[number % len(triggers)]
    had = out.exists()
    pid = start()
    wait = generator.uniform(0, duration) if trigger is None else 60
    deadline = time.perf_counter() + wait
    if trigger is None:
        time.sleep(max(0, deadline - time.perf_counter()))
    else:
        ended = False
        while not glob.glob(f"{folder}/.out.lorapack-*/out/{trigger}") and time.perf_counter() < deadline:
            pass
        time.sleep(generator.choice([0, 0, 0.002, 0.01]))
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if trigger is None and code == 0:
        duration = wait  # it was done before: a run takes no longer than that now, whatever ran beside the first
    if out.exists():
        whole()
    left = [n for n in os.listdir(folder) if n != "out"]
    kept = any((Path(folder) / n / "old").exists() for n in left)
    assert out.exists() or not had or kept, "what was there is gone"
    assert state() == before, "the input was changed"
    assert len(left) <= 1, left  # what earlier trials had left is swept
    trials.append({"trigger": trigger, "code": code, "out": out.exists(), "left": len(left)})
code = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
assert code == 0, code
whole()
assert os.listdir(folder) == ["out"], os.listdir(folder)
print(json.dumps({"duration": duration, "trials": trials}))
"""


def test_a_compression_killed_at_any_moment_leaves_a_whole_directory_or_none(tmp_path):
    rows = {"data.jsonl": CALIBRATION, "held.jsonl": HELDOUT}
    for name, source in rows.items():
        (tmp_path / name).write_text("".join(source.read_text().splitlines(keepends=True)[:8]))
    folder = tmp_path / "folder"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, (ADAPTER, BASE, *(tmp_path / name for name in rows), folder))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trials = json.loads(done.stdout)["trials"]
    killed = [trial for trial in trials if trial["code"] == -signal.SIGKILL]
    assert len(trials) == 20 and len(killed) >= 15, trials
    assert sum(trial["left"] for trial in killed) >= 10, "most kills must hit a run at work"
    assert {trial["trigger"] for trial in killed if trial["left"]} >= {"adapter_config.json", "report.json"}, trials


def test_overwrite_never_replaces_what_is_no_adapter(tmp_path):
    """A slip of the hand (`-o ~`) must not cost a home directory."""
    home = tmp_path / "home"
    home.mkdir()
    make(home, overwrite=True)  # an empty one holds nothing to lose
    (home / "adapter_config.json").unlink()
    (home / "letters").write_text("dear")
    with pytest.raises(OutputError, match="replaces adapters only"):
        make(home, overwrite=True)
    assert (home / "letters").read_text() == "dear" and names(tmp_path) == ["home"]
