"""Fuzz the readers of files from outside: every reader of tests/readers.py, coverage-guided (atheris), or all of them.

    python benchmarks/fuzz.py READER|all SECONDS [--out FILE]

Each reader runs in a process of its own, from its good file on; what it raises other than `InputError` is a crash,
whose bytes are kept in fuzz-crashes/. Prints, and with --out writes, how many inputs were run in how much CPU time.
Needs `pip install atheris`.
"""

import argparse
import contextlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def fuzz(name: str, seconds: int, keep: Path) -> None:
    """Run one reader until the time is up; never returns."""
    import atheris

    with atheris.instrument_imports(include=["lorapack"]):
        from readers import READERS

        from lorapack.errors import InputError
    reader, place = READERS[name], Path(tempfile.mkdtemp())
    corpus = Path(tempfile.mkdtemp())
    (corpus / "good").write_bytes(reader.good)

    def one(data: bytes) -> None:
        with contextlib.suppress(InputError):
            reader.read(data, place)

    keep.mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={keep}/{name}-", "-rss_limit_mb=2500", "-timeout=30"]
    atheris.Setup([sys.argv[0], *options, f"-max_len={4 * len(reader.good) + 256}", str(corpus)], one)
    atheris.Fuzz()


def report(name: str, seconds: int) -> dict[str, object]:
    """One reader in a process of its own: what it printed at the end, and whether it crashed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, name, str(seconds), "--inside"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    runs = re.findall(r"Done (\d+) runs", done.stderr)
    found = {
        "reader": name,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "inputs": int(runs[0]) if runs else None,
        "crashed": done.returncode != 0,
    }
    print(json.dumps(found), flush=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader")
    parser.add_argument("seconds", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        fuzz(given.reader, given.seconds, ROOT / "fuzz-crashes")
    from readers import READERS

    names = list(READERS) if given.reader == "all" else [given.reader]
    found = [report(name, given.seconds) for name in names]
    if given.out:
        given.out.write_text(json.dumps({"python": sys.version.split()[0], "readers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
