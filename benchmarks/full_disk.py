"""Every command that writes, on a disk that is full after 1, 2, 3 … blocks, until it has all it needs.

    python benchmarks/full_disk.py COMMAND…|all [--step BLOCKS] [--out FILE]

The disk is a tmpfs, mounted in a namespace of the process's own (`unshare`). On each the command must end with exit
code 2, one line, and nothing left; or, where the disk is large enough, with exit code 0. What is otherwise is printed.
One process imports everything and forks a child for each trial.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from commands import COMMANDS, prepare, run
from facts import machine, versions

BLOCK = 4096
PLENTY = 64 << 20


def trial(command: Sequence[str], mount: Path, size: int) -> dict[str, Any]:
    """One command on a disk of so many bytes: how it ended, what it said, what is left, how much it took."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "none", str(mount)], check=True)
    os.environ["TMPDIR"] = str(mount)
    try:
        code, said = run(command, mount)
        left = sorted(str(p.relative_to(mount)) for p in mount.rglob("*") if p.name != ".ses")  # ONNX Runtime's
        free = os.statvfs(mount)
        taken = (free.f_blocks - free.f_bfree) * free.f_bsize
    finally:
        del os.environ["TMPDIR"]
        subprocess.run(["umount", str(mount)], check=True)
    return {"size": size, "code": code, "said": said, "left": left, "taken": taken}


def is_fault(found: dict[str, Any]) -> bool:
    """Whether a trial ended otherwise than it should: done, or refused in one line with nothing left.

    A recovery's state is a whole one, from which it goes on.
    """
    if found["code"] == 0 or found["size"] == PLENTY:
        return found["code"] != 0 or any(".lorapack-" in name for name in found["left"])
    lines = found["said"].strip().splitlines()
    one = len(lines) == 1 and lines[0].startswith("lorapack: ") and "fault" not in lines[0]
    return found["code"] != 2 or not one or not set(found["left"]) <= {"state"}


def inside(names: Sequence[str], step: int, sizes: Sequence[float]) -> None:
    """All trials of some commands, a line of JSON each; in a namespace where mounting is allowed."""
    place = Path(tempfile.mkdtemp())
    try:
        inputs = prepare(place)
        mount = place / "mount"
        mount.mkdir()
        for name in names:
            command = [inputs.get(word, word) for word in COMMANDS[name]]
            roomy = trial(command, mount, PLENTY)
            print(json.dumps({"command": name, **roomy}), flush=True)
            if roomy["code"]:
                continue
            blocks = math.ceil(roomy["taken"] / BLOCK)
            for count in [round(blocks * part) for part in sizes] or itertools.count(1, step):
                found = trial(command, mount, max(1, count) * BLOCK)
                print(json.dumps({"command": name, **found}), flush=True)
                if found["code"] == 0:
                    break
    finally:
        shutil.rmtree(place, ignore_errors=True)


def trials(names: Sequence[str], step: int) -> Iterator[dict[str, Any]]:
    """The trials of `inside`, run in a namespace."""
    given = [*names, "--step", str(step), "--inside"]
    command = ["unshare", "-rm", sys.executable, "-W", "ignore", __file__, *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield from map(json.loads, running.stdout)
    if running.returncode:
        sys.exit("the trials were broken off; is mounting allowed here?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", metavar="COMMAND")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=float, action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = list(COMMANDS) if given.commands == ["all"] else given.commands
    if given.inside:
        inside(names, given.step, given.size)
        return
    table = []
    for name, of_name in itertools.groupby(trials(names, given.step), key=lambda each: each["command"]):
        found = list(of_name)
        faults = [each for each in found if is_fault(each)]
        enough = min((each["size"] for each in found if each["code"] == 0 and each["size"] < PLENTY), default=None)
        table.append({"command": name, "disks": len(found) - 1, "enough_bytes": enough, "faults": len(faults)})
        print(json.dumps(table[-1]), *(f"\n  {each}" for each in faults[:3]), flush=True)
    if given.out:
        facts = {"machine": machine(), "versions": versions(), "block": BLOCK, "step": given.step}
        given.out.write_text(json.dumps({**facts, "commands": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
