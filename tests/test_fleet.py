"""Many adapters in one run: what each gets, what a killed worker changes (nothing), what a second run does again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from support import ADAPTER, BASE, CALIBRATION, bert, descendants, edit, llama, lora, perturbed, run

from lorapack import InputError, compress_adapter, read_adapter
from lorapack.core.report import Report, from_json
from lorapack.data.rows import read_source
from lorapack.fleet import compress_fleet
from lorapack.fleet.local import RETRIES, run_local
from lorapack.fleet.task import Order, Outcome, Task, grouped, named
from lorapack.fleet.work import bench, work
from lorapack.measure.measure import measure_rows_on_base
from lorapack.model.exchange import exchange, layout
from lorapack.model.load import load
from lorapack.model.point import place, point

GOOD = 4
SETTINGS = {
    "base": str(BASE),
    "columns": {},
    "options": {},
    "method": "adaptive",
    "budget": "50%",
    "sample": "20%",
    "seed": 0,
    "recover_steps": 2,
    "batch_size": 4,
    "average": "token",
    "batch_tokens": 4096,
    "device": "cpu",
    "dtype": "auto",
    "max_length": 64,
    "trust_remote_code": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(CALIBRATION.read_text().splitlines(keepends=True)[:40]))
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, rows) -> Callable[..., list[str]]:
    """The command for good adapters and one each cut off, of another base, without a configuration, an evil one."""
    place = tmp_path_factory.mktemp("adapters")
    adapters = perturbed(place, GOOD)
    shutil.copytree(adapters[0], place / "cut-off")
    os.truncate(place / "cut-off" / "adapter_model.safetensors", 200_000)
    lora(llama(), place / "other-base", target_modules=["q_proj"])
    (place / "no-config").mkdir()
    shutil.copytree(adapters[0], place / "evil")
    edit(place / "evil" / "adapter_config.json", task_type="\x1b[31m|\ud800\n# title")
    names = [path.name for path in adapters] + ["cut-off", "other-base", "no-config", "evil"]
    listed = place / "list.txt"
    listed.write_text("# a list\n" + "".join(f"{place / name}\n\n" for name in names))

    def command(out: Path, *more: str) -> list[str]:
        given = ["--adapters", str(listed), "--data", str(rows), "--base", str(BASE), "-o", str(out)]
        return ["fleet", *given, "--budget", "50%", "--recover-steps", "0", "--max-length", "64", *more]

    return command


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fleet) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, run(*fleet(out, "--workers", "2", "--junit", str(out.with_suffix(".xml"))))


def outcomes_in(path: Path) -> dict[str, tuple[str, str]]:
    """Of a JUnit file, by the test's name: what its outcome is, and what is said of it."""
    suite = ET.parse(path).getroot().find("testsuite")
    cases = {case.get("name"): [*case, ET.Element("passed", message="")][0] for case in suite.iter("testcase")}
    counted = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    for count, tag in counted.items():
        assert int(suite.get(count)) == sum(outcome.tag == tag for outcome in cases.values())
    return {name: (outcome.tag, outcome.get("message")) for name, outcome in cases.items()}


def summary(out: Path) -> tuple[str, dict]:
    """The part of the summary that is the same for every run, as text, and the part that is not."""
    text = (out / "fleet.json").read_text()
    same, _, other = text.partition(' "run": ')
    return same, json.loads(other.rstrip()[:-1])


def reported(out: Path) -> Report:
    return from_json((out / "report.json").read_text())


def test_a_bad_adapter_is_a_line_of_the_summary_and_the_others_are_made(undisturbed):
    out, done = undisturbed
    assert done.returncode == 2, done.stderr
    rows = {row["name"]: row for row in json.loads((out / "fleet.json").read_text())["adapters"]}
    assert [row["state"] for row in rows.values()] == ["done"] * GOOD + ["failed"] * 4
    for name, said in (
        ("cut-off", "cut off"),
        ("other-base", "in the base model"),
        ("no-config", "does not exist"),
        ("evil", "task_type"),
    ):
        assert said in rows[name]["problem"], rows[name]
        assert not (out / name).exists()
    tests = outcomes_in(out.with_suffix(".xml"))
    assert [tag for tag, _ in tests.values()] == ["passed"] * GOOD + ["error"] * 4
    assert tests["no-config"][1] == rows["no-config"]["problem"] and "x1b" in tests["evil"][1]
    for name in list(rows)[:GOOD]:
        assert read_adapter(out / name).linear
        assert rows[name]["compressed"] == reported(out / name).adapter["compressed"]
        assert rows[name]["retained"]["low"] > 0.5
        assert name in (out / "fleet.md").read_text()
    assert "\x1b" not in (out / "fleet.md").read_text() and "\n# title" not in (out / "fleet.md").read_text()
    assert done.stderr.strip().splitlines()[-1].startswith("lorapack: 4 of 8 adapters failed, the first is cut-off: ")


def test_a_killed_worker_changes_nothing_in_the_summary(undisturbed, fleet, tmp_path):
    """SIGKILL as soon as the first result is there: the other worker is in the middle of an adapter."""
    command = [sys.executable, "-m", "lorapack", *fleet(tmp_path / "out", "--workers", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = 0
    while process.poll() is None and not killed:
        time.sleep(0.02)
        if list((tmp_path / "out").glob("adapter-*")):
            for pid, line in descendants(process.pid).items():
                if "spawn_main" in line:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
    assert process.wait(120) == 2
    same, other = summary(tmp_path / "out")
    assert killed == 2 and sum(other["retries"].values()) in (1, 2)  # one may have been between two adapters
    assert same == summary(undisturbed[0])[0]
    assert not list((tmp_path / "out").glob(".*")), "what killed workers left is gone"


def test_a_second_run_leaves_what_is_finished_and_makes_the_rest(undisturbed, fleet):
    out, _ = undisturbed
    before, _ = summary(out)
    kept = {path.name: path.stat().st_ino for path in out.glob("adapter-*")}
    shutil.rmtree(out / "adapter-001")
    (out / "adapter-002" / "adapter_config.json").write_text("{}")  # somebody has been at it
    done = run(*fleet(out, "--workers", "1", "--overwrite", "--junit", str(out.with_suffix(".xml"))))
    assert done.returncode == 2, done.stderr
    tags = [tag for tag, _ in outcomes_in(out.with_suffix(".xml")).values()]
    assert tags == ["skipped", "passed", "passed", "skipped"] + ["error"] * 4
    after, other = summary(out)
    assert after == before
    assert other["finished_before"] == ["adapter-000", "adapter-003"]
    assert all(((out / name).stat().st_ino == kept[name]) == (name[-1] in "03") for name in kept)


def test_a_missed_gate_is_exit_code_3_and_a_state_of_its_own(tmp_path):
    """Without data, by which no base is loaded."""
    adapter, out = perturbed(tmp_path, 1)[0], tmp_path / "out"
    command = f"fleet {adapter} --method rank --metric weight --budget 50% --max-params 10 -o {out} --junit {out}.xml"
    done = run(*command.split())
    assert done.returncode == 3 and "gate not met: by 1 of 1 adapters" in done.stderr, done.stderr
    assert json.loads((out / "fleet.json").read_text())["adapters"][0]["state"] == "gate missed"
    assert read_adapter(out / adapter.name).linear
    tag, said = outcomes_in(Path(f"{out}.xml"))[adapter.name]
    assert tag == "failure" and said.startswith("--max-params 10: ")


def test_one_base_in_memory_gives_each_adapter_what_a_base_of_its_own_gives(rows, tmp_path):
    """Also after one that needs other layers, for which the base is loaded anew, and after a recovery."""
    first, second = perturbed(tmp_path / "in", 2)
    base = load(read_adapter(ADAPTER), str(BASE), device="cpu").base
    narrow = lora(base.__class__(base.config), tmp_path / "in" / "narrow", target_modules=["q_proj", "v_proj"])
    place = bench(Order(".", str(tmp_path / "out"), SETTINGS, read_source(str(rows))))
    for source in (first, second, narrow, first):
        task = Task(f"{source.name}-{len(list((tmp_path / 'out').glob('*')))}", str(source))
        assert work(place, (task,)) == [Outcome(task.name)]
        alone = compress_adapter(read_adapter(source), str(rows), name=task.name, **SETTINGS)
        found = reported(tmp_path / "out" / task.name)
        assert found.adapter == alone.report.adapter
        assert found.quality == from_json(json_of(alone.report)).quality


def json_of(report: Report) -> str:
    from lorapack.core.report import to_json

    return to_json(report)


def test_the_base_is_loaded_once_for_adapters_of_one_layout(rows, tmp_path):
    place = bench(Order(".", str(tmp_path / "out"), SETTINGS | {"recover_steps": 0}, read_source(str(rows))))
    seen = set()
    for source in perturbed(tmp_path / "in", 3):
        assert work(place, (Task(source.name, str(source)),)) == [Outcome(source.name)]
        seen.add(id(place.ready[0].base))
    assert len(seen) == 1


def test_adapters_measured_at_once_get_the_plans_of_the_bases_own_activations(rows, tmp_path):
    """Whatever else is in the chunk, and the same again where one of them is done anew."""
    first, second = perturbed(tmp_path / "in", 2)
    shutil.copytree(first, tmp_path / "in" / "cut-off")
    os.truncate(tmp_path / "in" / "cut-off" / "adapter_model.safetensors", 200_000)
    settings = SETTINGS | {"recover_steps": 0, "method": "rank"}
    chunk = tuple(Task(path.name, str(path)) for path in (tmp_path / "in" / "cut-off", first, second))
    place = bench(Order(".", str(tmp_path / "out"), settings, read_source(str(rows)), at_once=3))
    bad, *good = work(place, chunk)
    assert "cut off" in bad.problem and good == [Outcome(first.name), Outcome(second.name)]
    for path in (first, second):
        adapter = read_adapter(path)
        loaded, prepared = place.ready
        statistics = measure_rows_on_base(loaded, {"it": adapter}, prepared, "backward")["it"]
        alone = compress_adapter(adapter, str(rows), statistics=statistics, **settings)
        found = reported(tmp_path / "out" / path.name)
        assert [c.rank for c in found.plan.choices] == [c.rank for c in alone.report.plan.choices]
        own = compress_adapter(adapter, str(rows), **settings)
        assert [c.score for c in found.plan.choices] != [c.score for c in own.report.plan.choices]
    made = reported(tmp_path / "out" / second.name).files
    shutil.rmtree(tmp_path / "out" / second.name)
    again = bench(Order(".", str(tmp_path / "out"), settings, read_source(str(rows)), at_once=3))
    assert work(again, chunk)[1:] == [Outcome(first.name, skipped=True), Outcome(second.name)]
    assert reported(tmp_path / "out" / second.name).files == made


def test_a_classifiers_head_goes_with_its_adapter(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "lora_only"}
    one, two = (read_adapter(lora(bert(seed=seed), tmp_path / str(seed), seed=seed, **settings)) for seed in (1, 2))
    assert layout(one) == layout(two)
    loaded, fresh = (load(adapter, str(tmp_path / "base"), device="cpu") for adapter in (one, two))
    exchange(loaded, two)
    point(loaded, place(two, loaded.device))
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.base(ids).logits, fresh.base(ids).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"bias": "all"}},
        {"modules": 1},
        {"carried": {"base_model.model.classifier.bias": torch.zeros(3)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_base_in_memory_has_no_place_for_is_not_exchanged(change):
    adapter = read_adapter(ADAPTER)
    if "config" in change:
        other = replace(adapter, config={**adapter.config, **change["config"]})
    elif "carried" in change:
        other = replace(adapter, carried=change["carried"])
    else:
        kept = dict(list(adapter.modules.items())[1:])
        other = replace(adapter, modules=kept, pool={name: adapter.pool[name] for name in kept})
    assert layout(other) != layout(adapter)
    assert layout(replace(adapter, config={**adapter.config, "r": 4, "lora_alpha": 1})) == layout(adapter)


def test_an_adapter_whose_worker_dies_every_time_is_given_up(tmp_path):
    """Whatever runs is killed at once."""
    order = Order(".", str(tmp_path / "out"), SETTINGS)
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(run_local(order, [Task("bad", "bad")], 1)))
    thread.start()
    killed = set()
    while thread.is_alive():
        for process in active_children():
            if process.pid and process.pid not in killed:
                killed.add(process.pid)
                process.kill()  # which knows where it has died already
        time.sleep(0.005)
    [outcome] = found
    assert f"SIGKILL {RETRIES + 1} times" in outcome.problem and outcome.retries == RETRIES
    assert len(killed) >= RETRIES + 1


def test_two_adapters_of_one_name_are_refused_before_anything_is_done(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "adapter").mkdir(parents=True)
    paths = [str(tmp_path / parent / "adapter") for parent in ("one", "two")]
    with pytest.raises(InputError, match="both called adapter"):
        named(paths)
    assert [task.name for task in named([], [paths[0], f"second\t{paths[1]}", "# not this", ""])] == [
        "adapter",
        "second",
    ]
    assert named(["owner/name"]) == [Task("owner--name", "owner/name")]


@pytest.mark.parametrize("name", ["..", "../up", ".hidden", "a/b", "-o", "fleet.json"])
def test_a_name_that_would_lead_elsewhere_is_refused(name):
    with pytest.raises(InputError, match="cannot name a directory"):
        named([], [f"{name}\towner/adapter"])


def test_at_the_start_only_configurations_are_read_and_groups_are_of_one_base(tmp_path):
    for number, (base, rank, targets) in enumerate(
        [("one", 4, ["q", "v"]), ("one", 8, ["v", "q"]), ("two", 4, ["q", "v"]), ("one", 4, ["q"])]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        config = {"peft_type": "LORA", "r": rank, "target_modules": targets, "base_model_name_or_path": base}
        (path / "adapter_config.json").write_text(json.dumps(config))
    tasks = named(str(path) for path in sorted(tmp_path.iterdir()))
    good, bad = grouped(tasks, None)
    assert [task.group for task in good] == [0, 0, 1, 2] and not bad
    assert [task.group for task in grouped(tasks, "the same")[0]] == [0, 0, 0, 1]
    edit(tmp_path / "1" / "adapter_config.json", base_model_name_or_path="two")
    assert [task.group for task in grouped(tasks, None)[0]] == [0, 1, 1, 2]


def test_results_of_other_settings_are_kept_unless_overwrite_is_given(rows, tmp_path):
    adapter = perturbed(tmp_path / "in", 1)[0]
    task, source = Task("it", str(adapter)), read_source(str(rows))
    settings = SETTINGS | {"recover_steps": 0}
    out = str(tmp_path / "out")
    smaller = settings | {"budget": "25%"}

    def outcome(settings, **more) -> Outcome:
        return work(bench(Order(".", out, settings, source, **more)), (task,))[0]

    assert outcome(settings) == Outcome("it")
    assert outcome(settings) == Outcome("it", skipped=True)
    before = (tmp_path / "out" / "it" / "report.json").read_bytes()
    assert "--overwrite" in outcome(smaller).problem
    assert "--overwrite" in outcome(settings, at_once=2).problem
    assert (tmp_path / "out" / "it" / "report.json").read_bytes() == before
    assert outcome(smaller, overwrite=True) == Outcome("it")
    found = reported(tmp_path / "out" / "it")
    assert found.after.parameters <= found.before.parameters / 4


def test_files_of_others_are_not_taken_for_a_summary(tmp_path):
    (tmp_path / "fleet.json").write_text('{"ships": 3}')
    with pytest.raises(InputError, match="is not of a fleet"):
        compress_fleet([], str(tmp_path), lambda *_: iter(()), data=None, base=None, method="rank", options={})
    assert (tmp_path / "fleet.json").read_text() == '{"ships": 3}'
