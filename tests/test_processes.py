"""Several real processes (gloo, started by torchrun) against one: the same statistics, plans, figures and adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ADAPTER, BASE, CALIBRATION, HELDOUT, refused, run

from lorapack.compress import compress_adapter
from lorapack.core.plan import to_json
from lorapack.core.report import to_json as report_json
from lorapack.core.statistics import from_tensors, to_tensors
from lorapack.job import plan_adapter
from lorapack.measure import measure_adapter
from lorapack.model.load import load
from lorapack.read import read_adapter
from lorapack.read.files import read_safetensors

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SHARED = {"base": str(BASE), "sample": "13", "batch_tokens": 320}
STEPS = {
    "budget": "30%",
    "recover_steps": 3,
    "objective": "kl",
    "batch_size": 3,
}  # of 7 rows: one step has a single row
SHARD = ("--device", "shard")


def launched(processes, *words):
    """A program in several processes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [*TORCHRUN, str(processes), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def started(processes, *arguments):
    """The command line in several processes."""
    return launched(processes, "-m", "lorapack", *arguments)


def spelled(settings):
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


def ours(stderr):
    """What lorapack said; torchrun has a report of its own, and what is left of gloo's is beside the point."""
    return [line for line in stderr.splitlines() if line.startswith("lorapack: ")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of very different lengths, so that the batches are no multiple of the processes; to evaluate on, others."""
    path = tmp_path_factory.mktemp("data")
    for source, name, count in ((CALIBRATION, "rows.jsonl", 30), (HELDOUT, "others.jsonl", 7)):
        texts = [json.loads(line)["text"] for line in source.read_text().splitlines()[:count]]
        rows = [{"text": text[: 60 + 17 * n]} for n, text in enumerate(texts)]
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def alone(data):
    return measure_adapter(read_adapter(ADAPTER), str(data / "rows.jsonl"), **SHARED)


@pytest.mark.parametrize(("processes", "how"), [(4, ()), (3, SHARD)])  # 11 batches; no width is a multiple of 3
def test_the_statistics_of_several_processes_are_those_of_one_and_so_are_the_plans(
    processes, how, alone, data, tmp_path
):
    out = tmp_path / "statistics"
    arguments = ("measure", ADAPTER, "--data", data / "rows.jsonl", *spelled(SHARED), *how, "-o", out)
    printed, said = (run := started(processes, *arguments)).communicate(timeout=300)
    assert run.returncode == 0, said
    assert printed.count("Wrote") == 1
    expected, _ = to_tensors(alone)
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-12, atol=0.0)
    adapter, theirs = read_adapter(ADAPTER), from_tensors(*read_safetensors(out))
    assert (theirs.weight, theirs.tokens, theirs.samples) == (alone.weight, alone.tokens, alone.samples)
    plans = [to_json(plan_adapter(adapter, each, budget="30%")) for each in (alone, theirs)]
    assert plans[0] == plans[1]


@pytest.fixture(scope="module")
def compressed_alone(data):
    rows, others = (str(data / name) for name in ("rows.jsonl", "others.jsonl"))
    return compress_adapter(read_adapter(ADAPTER), rows, eval_data=others, **SHARED, **STEPS)


@pytest.mark.parametrize("how", [(), (*SHARD, "--checkpointing")])
def test_two_processes_compress_to_what_one_compresses_to(how, compressed_alone, data, tmp_path):
    rows, others = str(data / "rows.jsonl"), str(data / "others.jsonl")
    out = tmp_path / "out"
    arguments = ("compress", ADAPTER, "--data", rows, "--eval-data", others, *spelled(SHARED | STEPS), *how, "-o", out)
    printed, said = (run := started(2, *arguments)).communicate(timeout=300)
    assert run.returncode == 0, said
    assert printed.count(f"Wrote {out}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = compressed_alone
    before, after = json.loads(report_json(made.report)), json.loads((out / "report.json").read_text())
    assert after["plan"] == before["plan"]
    for variant in ("base", "original"):  # the figures of what nobody trained, with their intervals
        assert after["quality"]["metrics"]["loss"][variant] == before["quality"]["metrics"]["loss"][variant]
    curve, other = ([value for _, value in report["recovery"]["curve"]] for report in (before, after))
    assert other == pytest.approx(curve, rel=1e-6)
    assert curve[-1] < 0.99 * curve[0]  # it has learnt something
    trained, alike = made.adapter, read_adapter(out)
    for name, pair in trained.pool.items():
        for left, right in ((pair.A, alike.pool[name].A), (pair.B, alike.pool[name].B)):
            assert (left - right).norm() <= 1e-6 * left.norm(), name


def test_what_is_wrong_with_the_input_is_said_once(tmp_path):
    printed, said = (run := started(2, "compress", tmp_path / "none", "-o", tmp_path / "out")).communicate(timeout=300)
    assert run.returncode != 0
    assert len(ours(said)) == 1 and "none" in ours(said)[0]
    assert not printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [(), SHARD])
def test_one_process_that_dies_ends_all_with_one_line_and_nothing_written(how, data, tmp_path):
    out = tmp_path / "out"
    arguments = ("compress", ADAPTER, "--data", data / "rows.jsonl", "--recover-steps", 10_000, *spelled(SHARED), *how)
    run = started(2, *arguments, "--budget", "30%", "--state", tmp_path / "state", "-o", out)
    until = time.monotonic() + 240
    while not any(path.name.startswith(".out") for path in tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    printed, said = run.communicate(timeout=240)
    assert run.returncode != 0
    assert len(ours(said)) == 1 and "written" in ours(said)[0]
    assert not printed and not list(tmp_path.iterdir())


def test_of_a_base_that_is_cut_each_process_keeps_its_part_of_the_layers_and_the_factors_whole(tmp_path):
    (tmp_path / "keep.py").write_text(
        "import json\n"
        "from lorapack import processes\n"
        "processes.join()\n"
        "from lorapack.model.load import load\n"
        "from lorapack.read import read_adapter\n"
        f"loaded = load(read_adapter({str(ADAPTER)!r}), {str(BASE)!r}, device='shard')\n"
        "kept = {n: getattr(p, '_local_tensor', p).numel() for n, p in loaded.model.named_parameters()}\n"
        "found = processes.gathered(kept)\n"
        "print(json.dumps(found) * processes.first())\n"
        "del loaded\n"
        "processes.others_leave()\n"
    )
    printed, said = (cut := launched(2, tmp_path / "keep.py")).communicate(timeout=300)
    assert cut.returncode == 0, said
    kept = json.loads(printed)
    whole = {n: p.numel() for n, p in load(read_adapter(ADAPTER), str(BASE), device="cpu").model.named_parameters()}
    for name, numbers in whole.items():
        of_layer = ".layers." in name and "lora_" not in name
        assert sum(part[name] for part in kept) == (numbers if of_layer else 2 * numbers), name
    layers = [sum(count for n, count in part.items() if ".layers." in n and "lora_" not in n) for part in kept]
    assert abs(layers[0] - layers[1]) < 0.01 * sum(layers)


def test_a_base_is_cut_over_several_processes_only(data):
    done = run("measure", ADAPTER, "--data", data / "rows.jsonl", "--base", BASE, *SHARD, "-o", data / "none")
    assert "torchrun" in refused(done)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_nothing_of_the_group_outlives_it_whatever_is_imported_between(tmp_path):
    (tmp_path / "leave.py").write_text(
        "from pathlib import Path\n"
        "from lorapack import processes\n"
        "processes.join()\n"
        "import peft, torch\n"
        "from lorapack.model.load import load\n"
        "from lorapack.read import read_adapter\n"
        f"loaded = load(read_adapter({str(ADAPTER)!r}), {str(BASE)!r}, device='shard')\n"
        "loaded.base(input_ids=torch.ones(1, 4, dtype=torch.long))\n"
        "del loaded\n"
        "processes.others_leave()\n"
        "print(*(task.read_text().strip() for task in Path('/proc/self/task').glob('*/comm')))\n"
    )
    printed, said = (run := launched(2, tmp_path / "leave.py")).communicate(timeout=300)
    assert run.returncode == 0, said
    assert "python" in printed and "gloo" not in printed
