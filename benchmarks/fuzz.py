"""Fuzz the readers of files from outside: every reader of tests/readers.py, coverage-guided (atheris).

    python benchmarks/fuzz.py READER…|all SECONDS [--out FILE]

SECONDS are seconds of processor time for each reader, counted from the first input on. A reader runs in a process of
its own, for `SLICE` seconds at a time, from its good file and from what earlier slices found. With --out what is done
is written after every slice, and a later run goes on from there.

A crash is whatever a reader raises other than `InputError`, an input that takes more than `SLOWEST` seconds, and one
that takes more memory than its size and `MOST_MEMORY`. Its bytes are kept in fuzz-crashes/.

Besides the fuzzer's own changes of bytes, places in the JSON of a file are changed and stay JSON, the length of a
safetensors header is kept true, and so are the records around the pickle of a `.bin` file: otherwise nearly all inputs
would end at the first check. Needs `pip install atheris`.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from facts import machine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
CRASHES, CORPUS = ROOT / "fuzz-crashes", ROOT / "fuzz-corpus"
SLICE = 120
SLOWEST = 15  # the time limit of patterns is 5 seconds for each of ranks and alphas
MOST_MEMORY = 200e6
ODD = [None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 1e308, 0.5, float("nan"), float("inf"), "", "\0", "\ud800", [], {}]
ODD += [
    ".*",
    "(a|a)+b",
    "../x",
    "/",
    "a" * 300,
    "F16",
    "I64",
    "F8_E4M3",
    [0, 0],
    [1 << 40, 1 << 40],
    {"": ""},
    [[[[]]]],
]

Mutate = Callable[[bytes, int], bytes]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place of it removed, renamed, doubled or replaced; also inside of JSON in a string."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json.dumps(changed(json.loads(value), rng))
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    other = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = rng.random()
    if kind < 0.1:
        value.pop(key)
    elif kind < 0.2 and isinstance(value, dict):
        value[str(rng.choice(ODD)) if rng.random() < 0.5 else key + "x"] = value.pop(key)
    elif kind < 0.2 and isinstance(value, list):
        value.insert(other, value[key])
    elif kind < 0.3:
        value[key] = value[other]
    else:
        value[key] = changed(value[key], rng)
    return value


def mutated(data: bytes, most: int, seed: int, mutate: Mutate) -> bytes:
    """The bytes, changed somewhere, with what frames them kept true most of the time."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return mutate(data, most)
    if data.startswith(b"PK"):
        with contextlib.suppress(Exception):
            return _mutated_zip(data, most, rng, mutate)
    (length,) = struct.unpack("<Q", data[:8]) if len(data) > 8 else (0,)
    framed = 0 < length <= len(data) - 8
    text, rest = (data[8 : 8 + length], data[8 + length :]) if framed else (data, b"")
    if framed and rest and rng.random() < 0.1:
        return data[: 8 + length] + mutate(rest, most)
    try:
        if rng.random() < 0.3:
            raise ValueError
        new = json.dumps(changed(json.loads(text), rng)).encode()
    except (ValueError, RecursionError):
        new = mutate(text, most)
    return struct.pack("<Q", len(new)) + new + rest if framed else new


def _mutated_zip(data: bytes, most: int, rng: random.Random, mutate: Mutate) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = rng.choice([*old.namelist(), *[n for n in old.namelist() if n.endswith("data.pkl")] * 20])
        for name in old.namelist():
            new.writestr(name, mutate(old.read(name), most) if name == chosen else old.read(name))
    return made.getvalue()


def fuzz(name: str, seconds: float) -> None:
    """Run one reader until its time is up; never returns. The last line on stdout says what was done."""
    import atheris

    with atheris.instrument_imports(include=["lorapack"]):
        from readers import READERS

        from lorapack.errors import InputError
    reader = READERS[name]
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    CRASHES.mkdir(exist_ok=True)
    (corpus / "good").write_bytes(reader.good)
    words = set(re.findall(rb"[\w./-]{2,40}", reader.good))
    (place / "words").write_text("".join(f'"{word.decode()}"\n' for word in sorted(words)))
    (place / "in").mkdir()
    reader.read(reader.good, place / "in")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    inputs, begun = 0, time.process_time()

    def one(data: bytes) -> None:
        nonlocal inputs
        start = time.process_time()
        with contextlib.suppress(InputError):
            reader.read(data, place / "in")
        inputs += 1
        now = time.process_time()
        took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory
        assert now - start <= SLOWEST, f"it took {now - start:.1f} s"
        assert took <= MOST_MEMORY + len(data), f"it took {took / 1e6:.0f} MB"
        if now - begun >= seconds:
            print(json.dumps({"cpu_seconds": round(now - begun, 1), "inputs": inputs}), flush=True)
            subprocess.run(["rm", "-r", str(place)], check=False)
            os._exit(0)

    options = [f"-artifact_prefix={CRASHES}/{name}-", f"-dict={place}/words", "-rss_limit_mb=0", "-timeout=600"]
    options += [f"-max_len={4 * len(reader.good) + 1000}", "-len_control=0", "-reload=0"]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)],
        one,
        custom_mutator=lambda data, most, seed: mutated(data, most, seed, atheris.Mutate)[:most],
    )
    atheris.Fuzz()


def fuzz_on(name: str, seconds: float, before: dict[str, Any]) -> dict[str, Any]:
    """One slice in a process of its own, added to what was done before."""
    command = [sys.executable, "-W", "ignore", __file__, name, str(seconds), "--inside"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout.strip().rpartition("\n")[2]
    made = json.loads(said) if done.returncode == 0 else {"cpu_seconds": 0, "inputs": 0}
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
    return {
        "reader": name,
        "cpu_seconds": round(before["cpu_seconds"] + made["cpu_seconds"], 1),
        "inputs": before["inputs"] + made["inputs"],
        "crashed": done.returncode != 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", metavar="READER")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        fuzz(given.readers[0], given.seconds)
    from readers import READERS

    done = json.loads(given.out.read_text())["readers"] if given.out and given.out.exists() else []
    found = {each["reader"]: each for each in done}
    for name in READERS if given.readers == ["all"] else given.readers:
        now = found.get(name, {"cpu_seconds": 0, "inputs": 0})
        while now["cpu_seconds"] < given.seconds:
            now = found[name] = fuzz_on(name, min(SLICE, given.seconds - now["cpu_seconds"]), now)
            print(json.dumps(now), flush=True)
            if given.out:
                made = {"python": sys.version.split()[0], "atheris": version("atheris")}
                text = {"machine": machine(1), "versions": made, "readers": list(found.values())}
                given.out.write_text(json.dumps(text, indent=1) + "\n")
            if now["crashed"]:
                break


if __name__ == "__main__":
    main()
