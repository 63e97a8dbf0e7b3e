"""Beside other work: how long a compression takes whose threads wait spinning, and one whose threads soon sleep.

    python benchmarks/busy.py [--runs 3] [--steps 20] [-o benchmarks/results/busy.json]

`lorapack compress` on the embedded fixture with as many threads as there are cores, alone and beside one busy loop a
core. GNU's OpenMP lets a thread that waits for the others spin for so many rounds before it sleeps: 300,000 where
nothing is said (`library`), 10,000 where `lorapack` is started without a word on it (`lorapack`). They take turns.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from facts import machine, spread, tell, versions

FIXTURES = Path(__file__).parents[1] / "fixtures"
WAYS = {"lorapack": {}, "library": {"GOMP_SPINCOUNT": "300000"}}
DATA = FIXTURES / "tinyshakespeare" / "calibration.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of recovery")
    parser.add_argument("-o", type=Path, dest="out")
    given = parser.parse_args()
    cores = os.cpu_count() or 1
    result = {
        "machine": machine(cores),
        "versions": versions(),
        "runs": given.runs,
        "steps": given.steps,
        "seconds": {},
    }
    for others in (0, cores):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with busy(others):
            for _ in range(given.runs):
                for way, environment in WAYS.items():
                    seconds[way].append(compress(given.steps, environment))
                    print(f"{others} other processes, {way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
        ratios = [slow / fast for slow, fast in zip(seconds["library"], seconds["lorapack"], strict=True)]
        result["seconds"][f"{others} other processes"] = {
            **{way: spread(found) for way, found in seconds.items()},
            "library / lorapack": spread(ratios),
        }
    tell(result, given.out)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compress(steps: int, environment: dict[str, str]) -> float:
    unsaid = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lorapack", "compress", str(FIXTURES / "adapter"), "--budget", "50%"]
        command += ["--base", str(FIXTURES / "stories260k"), "--data", str(DATA)]
        command += ["--recover-steps", str(steps), "--out", str(Path(folder) / "out")]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=unsaid | environment)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
