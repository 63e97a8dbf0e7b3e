"""Every command that writes, sent a signal at random moments: its output is whole or absent, and nothing is in the way.

    python benchmarks/signals.py COMMAND…|all TRIALS [--out FILE]

For each command and signal, TRIALS runs are ended at moments drawn from the length of an undisturbed run, and then
one more must succeed and leave nothing but its output. SIGKILL may leave directories with `.lorapack-` in their names,
which that run sweeps; after the others nothing may be left. What is otherwise is printed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import COMMANDS, prepare, start
from facts import machine, versions

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
SAID = {"report.json", "README.md"}  # hold the time; `recover` writes its best so far after a signal


def tree(place: Path) -> dict[str, str]:
    """The files in a directory, with digests of those that are the same in every run; without a recovery's state."""
    return {
        str(p.relative_to(place)): "" if p.name in SAID else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(place.rglob("*"))
        if p.is_file() and p.name != "state"
    }


def ended(command: Sequence[str], place: Path, sent: signal.Signals | None, after: float) -> tuple[int, str]:
    """A run that gets a signal after so many seconds; its exit code and what it said."""
    with tempfile.TemporaryFile() as said:
        pid = start(command, place, said.fileno())
        if sent is not None:
            time.sleep(after)
            os.kill(pid, sent)  # a child that has ended is still there until it is waited for
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read().decode()


def faults(
    code: int, said: str, sent: signal.Signals, found: dict[str, str], whole: dict[str, str], exact: bool
) -> str:
    """What is wrong after one trial; nothing where all is as it should be."""
    left = {name: digest for name, digest in found.items() if ".lorapack-" not in name}
    if left and (left.keys() != whole.keys() or (exact and left != whole)):
        return f"half an output: {sorted(left)}"
    if sent != signal.SIGKILL and len(left) != len(found):
        return f"left behind: {sorted(found)}"
    if code not in (0, -sent, 128 + sent):
        return f"exit code {code}: {said}"
    lines = said.strip().splitlines()
    if code == 128 + sent and not (len(lines) == 1 and "no output is half written" in lines[0]):
        return f"it said {said!r}"
    return ""


def disturb(
    name: str, command: Sequence[str], place: Path, count: int, signals: Sequence[signal.Signals]
) -> dict[str, Any]:
    """All trials of one command."""
    rng = random.Random(0)
    for _ in range(2):  # the first fills the caches
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        begun = time.monotonic()
        code, said = ended(command, place, None, 0)
    length, whole = time.monotonic() - begun, tree(place)
    assert code == 0 and whole, said
    codes: dict[str, dict[int, int]] = {}
    wrong = []
    for sent in signals:
        codes[sent.name] = {}
        for _ in range(count):
            shutil.rmtree(place)
            place.mkdir()
            code, said = ended(command, place, sent, rng.uniform(0, length))
            codes[sent.name][code] = codes[sent.name].get(code, 0) + 1
            fault = faults(code, said, sent, tree(place), whole, exact=not name.startswith("recover"))
            wrong += [f"{sent.name}: {fault}"] if fault else []
            if code == 0 or tree(place).keys() >= whole.keys():
                continue
            (place / "state").unlink(missing_ok=True)  # of `recover`, which does not begin anew over one
            code, said = ended(command, place, None, 0)
            if code or tree(place).keys() != whole.keys():
                wrong.append(f"{sent.name}, the run after: exit code {code}, {said}, {sorted(tree(place))}")
    shutil.rmtree(place)
    return {
        "command": name,
        "seconds": round(length, 2),
        "trials": count * len(signals),
        "codes": codes,
        "faults": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", metavar="COMMAND")
    parser.add_argument("trials", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        inputs = prepare(place)
        table = []
        for name in COMMANDS if given.commands == ["all"] else given.commands:
            command = [inputs.get(word, word) for word in COMMANDS[name]]
            table.append(disturb(name, command, place / "work", given.trials, SIGNALS))
            print(json.dumps(table[-1]), flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if given.out:
        facts = {"machine": machine(), "versions": versions(), "trials": given.trials}
        given.out.write_text(json.dumps({**facts, "commands": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
