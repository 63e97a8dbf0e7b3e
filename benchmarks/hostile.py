"""What a refused file takes: every reader of tests/readers.py with every bomb of its kind (tests/bombs.py).

    python benchmarks/hostile.py READER…|all [--out FILE]

Each is read in a process of its own, forked after a good file was read; peak memory is what it took beyond that, by
/proc. Prints for each reader the most, and the file that took it: it must refuse them, or read them as what they are
(a row of data may hold a list of lists), in at most 200 MB and the size of the file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import machine, versions

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT = 200e6
GREAT = 64 << 20  # bytes of a tensor whose last number is NaN


def memory(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def great() -> bytes:
    """An adapter that is whole but for its last number: it is refused after it was read."""
    import torch
    from readers import PAIRS
    from safetensors.torch import save

    tensors = {**PAIRS, "z": torch.ones(GREAT // 4)}
    tensors["z"][-1] = float("nan")
    return save(tensors)


def trial(reader: Any, data: bytes) -> dict[str, Any]:
    """One file in a child: whether it was refused, the memory and the seconds it took."""
    from lorapack.errors import InputError

    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        found: dict[str, Any] = {"refused": None}
        try:
            with tempfile.TemporaryDirectory() as good, tempfile.TemporaryDirectory() as place:
                reader.read(reader.good, Path(good))
                Path("/proc/self/clear_refs").write_text("5")
                before, start = memory("VmRSS"), time.process_time()
                try:
                    reader.read(data, Path(place))
                except InputError as error:
                    found["refused"] = str(error)[:200]
                found |= {"peak": memory("VmHWM") - before, "seconds": round(time.process_time() - start, 2)}
        except BaseException as error:
            found["fault"] = repr(error)[:300]
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as file:
        return json.loads(file.read() or b'{"fault": "it died"}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", metavar="READER")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from bombs import HEADERS, TEXTS
    from readers import READERS

    bombs = {name: make() for name, make in (HEADERS | TEXTS).items()} | {"a NaN at the end": great()}
    table = []
    for name in READERS if given.readers == ["all"] else given.readers:
        reader = READERS[name]
        of_tensors = reader.good[8:9] == b"{"
        fitting = {n: d for n, d in bombs.items() if (n in TEXTS) != of_tensors}
        found = {bomb: trial(reader, data) for bomb, data in fitting.items()}
        faults = [
            (bomb, each) for bomb, each in found.items() if "fault" in each or each["peak"] > LIMIT + len(fitting[bomb])
        ]
        over = {b: max(0, each["peak"] - len(fitting[b])) for b, each in found.items() if "peak" in each}
        worst = max(over, key=lambda bomb: over[bomb])
        slow = max(each.get("seconds", 0) for each in found.values())
        row = {"reader": name, "files": len(found), "refused": sum(bool(e["refused"]) for e in found.values())}
        row |= {"most_beyond_its_size_mb": round(over[worst] / 1e6), "of": worst, "slowest_s": slow, "faults": faults}
        table.append(row)
        print(json.dumps(row), flush=True)
    if given.out:
        facts = {"machine": machine(), "versions": versions(), "limit_mb": LIMIT / 1e6}
        given.out.write_text(json.dumps({**facts, "readers": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
