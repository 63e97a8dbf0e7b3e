"""What the objective of the recovery is worth, and what more rows are: the embedded adapter, 100 steps each.

    python benchmarks/objectives.py [-o benchmarks/results/objectives.json]

The few rows are `calibration.jsonl`, as in `make demo`; the many are these and the passages of `train.txt`, on which
the adapter was trained. Everything is evaluated on `heldout.jsonl`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from facts import machine, tell, versions

import lorapack

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = FIXTURES / "tinyshakespeare"
sys.path.insert(0, str(FIXTURES))
from prepare_text import LONGEST, passages  # noqa: E402

# rows, budget, rows a step, learning rate, objectives
RUNS = (
    ("few", "50%", 8, 3e-3, ("kl", "both")),
    ("many", "50%", 32, 3e-3, ("kl", "both", "task")),
    ("many", "25%", 32, 1.5e-2, ("both", "task")),
    ("many", "25%", 128, 2e-2, ("both",)),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    adapter = lorapack.read_adapter(FIXTURES / "adapter")
    found = []
    with tempfile.TemporaryDirectory() as place:
        data = {"few": TEXT / "calibration.jsonl", "many": Path(place, "many.jsonl")}
        texts = [text for text in passages((TEXT / "train.txt").read_text()) if len(text) <= LONGEST]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        data["many"].write_text(data["few"].read_text() + rows)
        for name, budget, batch_size, rate, objectives in RUNS:
            for objective in objectives:
                how: dict[str, Any] = {"budget": budget, "batch_size": batch_size, "learning_rate": rate}
                made = lorapack.compress_adapter(
                    adapter,
                    str(data[name]),
                    str(FIXTURES / "stories260k"),
                    eval_data=str(TEXT / "heldout.jsonl"),
                    objective=objective,
                    **how,
                )
                quality, parts = made.report.quality, made.report.data["parts"]
                assert quality is not None
                learnt = sum(parts[part]["rows"] for part in ("calibration", "recovery"))
                figures = {name: asdict(getattr(quality, name)) for name in ("retained", "divergence")}
                found.append({"rows": learnt, **how, "objective": objective, **figures})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    tell({"machine": machine(1), "versions": versions(), "found": found}, given.out)


if __name__ == "__main__":
    main()
