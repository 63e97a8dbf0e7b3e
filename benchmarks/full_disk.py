"""Every command that writes, on a disk that is full after 1, 2, 3 … blocks, until it has all it needs.

    python benchmarks/full_disk.py COMMAND…|all [--step BLOCKS] [--out FILE]

The disk is a tmpfs, mounted in a namespace of the process's own (`unshare`). On each the command must end with exit
code 2, one line, and nothing left; or, where the disk is large enough, with exit code 0. What is otherwise is printed.
One process imports everything and forks a child for each trial.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
ADAPTER, BASE = FIXTURES / "adapter", FIXTURES / "stories260k"
BLOCK = 4096
PLENTY = 64 << 20
SHORT = ["--base", "BASE", "--data", "ROWS", "--max-length", "32"]
HELD = [*SHORT, "--eval-data", "HELD", "--sample", "2"]
HALVED = ["ADAPTER", "--method", "rank", "--budget", "50%"]
TWO = ["--batch-size", "2"]
RECOVER = ["recover", "SMALLER", "--teacher", "ADAPTER", *HELD, "--steps", "2", *TWO]
COMMANDS: dict[str, list[str]] = {
    "expand": ["expand", "SMALLER", "-o", "new/out"],
    "compact": ["compact", "ADAPTER", "-o", "new/out"],
    "merge": ["merge", "ADAPTER", "--base", "BASE", "-o", "new/out"],
    "merge of .bin": ["merge", "ADAPTER", "--base", "BIN", "-o", "new/out"],
    "merge to bfloat16": ["merge", "ADAPTER", "--base", "BASE", "--dtype", "bfloat16", "-o", "new/out"],
    "convert to PEFT": ["convert", "KOHYA", "-o", "new/out"],
    "convert to diffusers": ["convert", "KOHYA", "--to", "diffusers", "-o", "out.safetensors"],
    "convert to GGUF": ["convert", "ADAPTER", "--base", "BASE", "-o", "out.gguf"],
    "extract": ["extract", "FULL", "BASE", "--rank", "4", "-o", "new/out"],
    "plan": ["plan", *HALVED, "--metric", "weight", "-o", "plan.json"],
    "report": ["report", "SMALLER", "-o", "report.html"],
    "compress without data": ["compress", *HALVED, "--metric", "weight", "--base", "BASE", "-o", "new/out"],
    "measure": ["measure", "ADAPTER", *SHORT, "--method", "rank", "-o", "statistics.safetensors"],
    "compress": ["compress", *HALVED, *HELD, "--recover-steps", "1", *TWO, "-o", "new/out"],
    "recover": [*RECOVER, "-o", "new/out"],
    "recover with a state": [*RECOVER, "--state", "state", "-o", "new/out"],
    "sweep with a plot": ["sweep", "ADAPTER", *HELD, "--method", "rank:metric=weight", "--plot", "plot.png"],
    "evaluate with JUnit": ["evaluate", "ADAPTER", *SHORT, "--max-params", "200000", "--junit", "junit.xml"],
    "push": ["push", "SMALLER", "somebody/smaller", "--dry-run", "--base", "somebody/base"],
    "export": ["export", "ADAPTER", "--base", "BASE", "--no-verify", "-o", "new/out"],
    "export apart": ["export", "ADAPTER", "--base", "BASE", "--separate", "--no-verify", "-o", "new/out"],
}


def prepare(place: Path) -> dict[str, str]:
    """The inputs, by their names in `COMMANDS`."""
    import torch
    from safetensors.torch import load_file, save_file

    inputs = {"ADAPTER": ADAPTER, "BASE": BASE}
    for name, rows in (("ROWS", "calibration"), ("HELD", "heldout")):
        inputs[name] = place / f"{rows}.jsonl"
        lines = (FIXTURES / "tinyshakespeare" / f"{rows}.jsonl").read_text().splitlines(keepends=True)
        inputs[name].write_text("".join(lines[:8]))
    inputs["KOHYA"] = place / "kohya.safetensors"
    pair = {"down": torch.ones(2, 4, 3, 3), "up": torch.ones(320, 2, 1, 1)}
    save_file({f"lora_unet_conv_in.lora_{half}.weight": t for half, t in pair.items()}, inputs["KOHYA"])
    inputs["BIN"] = place / "bin"
    shutil.copytree(BASE, inputs["BIN"], ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(BASE / "model.safetensors"), inputs["BIN"] / "pytorch_model.bin")
    inputs |= {"FULL": place / "full", "SMALLER": place / "smaller"}
    found = {name: str(path) for name, path in inputs.items()}
    for name, changes in (("merge", {"new/out": "FULL"}), ("compress", {"new/out": "SMALLER", "rank": "lora-drop"})):
        code, said = run([found.get(changes.get(w, w), changes.get(w, w)) for w in COMMANDS[name]], place)
        assert code == 0, said
    return found


def run(command: Sequence[str], place: Path) -> tuple[int, str]:
    """The command line in a child, in a directory; its exit code and what it said on stderr."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            code = 98
            try:
                os.chdir(place)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(said.fileno(), 2)
                from lorapack.cli import main

                sys.argv = ["lorapack", *command]
                try:
                    main()
                except SystemExit as end:
                    code = int(end.code or 0)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read().decode()


def trial(command: Sequence[str], mount: Path, size: int) -> dict[str, Any]:
    """One command on a disk of so many bytes: how it ended, what it said, what is left, how much it took."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "none", str(mount)], check=True)
    os.environ["TMPDIR"] = str(mount)
    try:
        code, said = run(command, mount)
        left = sorted(str(p.relative_to(mount)) for p in mount.rglob("*"))
        free = os.statvfs(mount)
        taken = (free.f_blocks - free.f_bfree) * free.f_bsize
    finally:
        del os.environ["TMPDIR"]
        subprocess.run(["umount", str(mount)], check=True)
    return {"size": size, "code": code, "said": said, "left": left, "taken": taken}


def is_fault(found: dict[str, Any]) -> bool:
    """Whether a trial ended otherwise than it should: done, or refused in one line with nothing left."""
    if found["code"] == 0:
        return any(".lorapack-" in name for name in found["left"])
    lines = found["said"].strip().splitlines()
    one = len(lines) == 1 and lines[0].startswith("lorapack: ") and "fault" not in lines[0]
    return found["code"] != 2 or not one or bool(found["left"])


def inside(names: Sequence[str], step: int, sizes: Sequence[float]) -> None:
    """All trials of some commands, a line of JSON each; in a namespace where mounting is allowed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    import peft
    import torch
    import transformers

    import lorapack.cli.main  # noqa: F401

    assert peft and transformers
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = str(place / "cache")
    try:
        inputs = prepare(place)
        mount = place / "mount"
        mount.mkdir()
        for name in names:
            command = [inputs.get(word, word) for word in COMMANDS[name]]
            roomy = trial(command, mount, PLENTY)
            print(json.dumps({"command": name, **roomy}), flush=True)
            blocks = math.ceil(roomy["taken"] / BLOCK)
            for count in [round(blocks * part) for part in sizes] or range(1, 2 * blocks, step):
                found = trial(command, mount, max(1, count) * BLOCK)
                print(json.dumps({"command": name, **found}), flush=True)
                if found["code"] == 0:
                    break
    finally:
        shutil.rmtree(place, ignore_errors=True)


def trials(names: Sequence[str], step: int = 1, sizes: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Run the trials in a namespace.

    Args:
        names: of `COMMANDS`.
        step: in blocks, from one disk to the next.
        sizes: instead, only these shares of what the command takes.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        raise PermissionError("mounting is not allowed here")
    given = [*names, "--step", str(step), "--inside", *(f"--size={part}" for part in sizes)]
    command = ["unshare", "-rm", sys.executable, "-W", "ignore", __file__, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
    for name in names:
        found = trials([name], given.step)
        faults = [each for each in found if is_fault(each)]
        enough = min((each["size"] for each in found if each["code"] == 0 and each["size"] < PLENTY), default=None)
        table.append({"command": name, "disks": len(found), "enough_bytes": enough, "faults": len(faults)})
        print(json.dumps(table[-1]), *(f"\n  {each}" for each in faults[:3]), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"block": BLOCK, "step": given.step, "commands": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
