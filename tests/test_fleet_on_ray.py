"""A hundred adapters on a Ray cluster of two nodes whose workers are killed at random (`make ray`)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import BASE, CALIBRATION, descendants, perturbed, run

from lorapack.core.report import from_json
from lorapack.fleet.on_ray import NAME

pytest.importorskip("ray", reason="Ray is not installed: `make ray` installs it")
from ray.cluster_utils import Cluster

COUNT = 100
BETWEEN = 5  # results between two kills, in the mean


@pytest.fixture(scope="module")
def cluster():
    """Two raylets, each with workers of its own, on this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What to run for an output; the same adapters each time."""
    place = tmp_path_factory.mktemp("fleet")
    adapters = perturbed(place / "adapters", COUNT)
    (place / "list.txt").write_text("\n".join(map(str, adapters)))
    (place / "rows.jsonl").write_text("".join(CALIBRATION.read_text().splitlines(keepends=True)[:30]))

    def words(out, *more):
        given = ["--adapters", place / "list.txt", "--data", place / "rows.jsonl", "--base", BASE, "-o", out]
        return ["fleet", *given, "--budget", "50%", "--recover-steps", "0", "--max-length", "64", *more]

    return words


def started(words: list) -> subprocess.Popen:
    line = [sys.executable, "-m", "lorapack", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def same(out: Path) -> str:
    return (out / "fleet.json").read_text().partition(' "run": ')[0]


def killed_at_random(process: subprocess.Popen, out: Path, seed: int) -> list[int]:
    """Until the process ends: SIGKILL for one of the busy Ray workers whenever some more results are there."""
    dice, killed, wanted = random.Random(seed), [], 1
    while process.poll() is None:
        time.sleep(dice.uniform(0, 0.3))
        busy = sorted(pid for pid, line in descendants(os.getpid()).items() if line.startswith(f"ray::{NAME}"))
        if busy and len(list(out.glob("adapter-*"))) >= wanted:
            killed.append(dice.choice(busy))
            os.kill(killed[-1], signal.SIGKILL)
            wanted = len(list(out.glob("adapter-*"))) + dice.randint(1, 2 * BETWEEN - 1)
    return killed


def test_a_fleet_of_a_hundred_on_two_nodes_loses_none_with_workers_killed_at_random(cluster, command, tmp_path):
    out, calm = tmp_path / "out", tmp_path / "calm"
    process = started(command(out, "--ray", cluster.address))
    killed = killed_at_random(process, out, seed=0)
    assert process.returncode == 0, process.stderr.read()
    rows = json.loads((out / "fleet.json").read_text())["adapters"]
    assert [row["state"] for row in rows] == ["done"] * COUNT
    assert len(killed) >= 10
    assert not list(out.glob(".*"))
    for row in rows:
        report = from_json((out / row["name"] / "report.json").read_text())
        assert report.adapter["compressed"] == row["compressed"]
    process = started(command(calm, "--ray", cluster.address))
    assert process.wait(timeout=1800) == 0, process.stderr.read()
    assert same(out) == same(calm)
    print(f"{len(killed)} workers killed, {COUNT} adapters made, the summary is that of a run without")


def test_what_is_finished_is_not_done_again_and_processes_give_what_ray_gives(cluster, command, tmp_path):
    short = command(tmp_path / "out")
    short[2] = tmp_path / "list.txt"  # after `fleet --adapters`
    short[2].write_text("\n".join(command(tmp_path)[2].read_text().splitlines()[:6]))
    assert run(*short, "--workers", "2").returncode == 0
    before = same(tmp_path / "out")
    (tmp_path / "out" / "adapter-003").rename(tmp_path / "away")
    done = run(*short, "--ray", cluster.address)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "out") == before
    made = json.loads((tmp_path / "out" / "fleet.json").read_text())["run"]["finished_before"]
    assert made == [f"adapter-{n:03d}" for n in (0, 1, 2, 4, 5)]


def test_no_cluster_is_one_line(command, tmp_path):
    done = run(*command(tmp_path / "out", "--ray", "127.0.0.1:1"))
    assert done.returncode == 2 and "no cluster answers there" in done.stderr.splitlines()[-1], done.stderr
