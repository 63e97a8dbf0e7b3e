"""How often `--retain 99%` keeps its promise on rows it has not seen: the fixture, ten seeds.

    python benchmarks/retain.py [--seeds 10] [--share 0.99] [--method adaptive] [-o benchmarks/results/retain.json]

A seed decides which rows are calibrated on and which the search for the smallest size looks at. The promise
is kept where the gain retained on the evaluation rows, without recovery, is at least the share.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from facts import machine, versions

from lorapack.choose import smallest_plan
from lorapack.core.adapter import size
from lorapack.data.prepare import prepare
from lorapack.errors import InputError
from lorapack.job import Job, chosen_method, figures, measure, packed
from lorapack.model.load import load
from lorapack.read import read_adapter
from lorapack.sweep import parse_method

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = FIXTURES / "tinyshakespeare"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--share", type=float, default=0.99)
    options.add_argument("--method", default="adaptive", help="name:option=value,...")
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    try:
        method, chosen = chosen_method(*parse_method(given.method))
    except InputError as error:
        sys.exit(str(error))
    adapter = read_adapter(FIXTURES / "adapter")
    loaded = load(adapter, str(FIXTURES / "stories260k"))
    whole = size(adapter).parameters
    rows = []
    for seed in range(given.seeds):
        started = time.time()
        calibration, heldout = str(TEXT / "calibration.jsonl"), str(TEXT / "heldout.jsonl")
        prepared = prepare(loaded.reader, calibration, eval_data=heldout, sample="20%", seed=seed, most_recovery=0)
        job = replace(Job(adapter, loaded, prepared), seed=seed)
        statistics = measure(job, {method.needs(chosen)})
        plan, search = smallest_plan(job, statistics, method, chosen, given.share)
        smaller = packed(job, plan, statistics)
        found = figures(job, prepared.evaluation, smaller).retained
        assert found is not None and found.value is not None
        rows.append(
            {
                "seed": seed,
                "parameters": size(smaller).parameters,
                "share": size(smaller).parameters / whole,
                "retained": [found.value, found.low, found.high],
                "kept": found.value >= given.share,
                "tried": len(search.tried),
                "seconds": round(time.time() - started, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": f"--retain {given.share:.0%} --method {given.method} on the fixture, {given.seeds} seeds",
        "kept": sum(row["kept"] for row in rows),
        "of": len(rows),
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "seeds": rows,
    }
    print(f"{result['kept']} of {result['of']} seeds keep the promise")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
