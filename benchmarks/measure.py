"""What measuring costs, beside the same passes without it: seconds of the processor and of the clock.

    python benchmarks/measure.py --model DIR [--rows 24] [--length 256] [--runs 3] [-o benchmarks/results/measure.json]
    python benchmarks/measure.py --shape 7b --device cuda --rows 16 --length 1024 [-o ...]

A random adapter of rank 16 on all linear layers of a real base (SmolLM2-135M for the figures of the CPU) or of a random
one in bfloat16 (--shape, as phases.py makes it), rows of the fixture's Tiny Shakespeare cut to the same length, the
same batches for all. A run is the whole phase, on a GPU until that is done; the runs of all kinds alternate, and ratios
are of runs that followed each other.

- `output`: the forward moments; `body` is the same forward without hooks, `evaluation` the loop that one writes
  without thinking, with the head for every token.
- `loss`: the backward moments too; `backward` is the same forward and backward without the sums, `training` a plain
  one with PEFT: the model's own loss, gradients of the factors.
- `many output`, `many loss`: eight adapters of rank 8 in one pass of the base; `one output`, `one loss` are single
  passes of one of them, as `output` and `loss` are.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from facts import device_name, machine, spread, tell, versions
from phases import SHAPES
from recovery import RANK, make_adapter

from lorapack.core.adapter import Adapter, Factors
from lorapack.data.batches import Batch, batches
from lorapack.data.encode import Encoded
from lorapack.measure.moments import hooked, measure_moments, pull
from lorapack.measure.on_base import measure_moments_on_base
from lorapack.model.forward import inputs, run_body
from lorapack.model.load import NAME, Loaded, load
from lorapack.model.point import Placed, place, point
from lorapack.read import read_adapter

TEXT = Path(__file__).parents[1] / "fixtures" / "tinyshakespeare" / "train.txt"
MANY, RANK_OF_MANY = 8, 8


def of_rank(adapter: Adapter, rank: int, seed: int) -> Adapter:
    """Another random adapter of the same modules."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(factors: Factors) -> Factors:
        d_out, d_in = factors.shape
        a, b = (torch.randn(*size, generator=generator) for size in ((rank, d_in), (d_out, rank)))
        return Factors(a / d_in**0.5, b * 0.05)

    return adapter.with_pool({name: drawn(f) for name, f in adapter.pool.items()}, dict(adapter.modules))


def rows(loaded: Loaded, count: int, length: int) -> list[Encoded]:
    """Tiny Shakespeare in rows of one length; everything is predicted."""
    ids = loaded.reader.tokenizer(TEXT.read_text()[: 8 * count * length], truncation=False)["input_ids"]
    assert len(ids) >= count * length
    each = [tuple(ids[n * length : (n + 1) * length]) for n in range(count)]
    return [Encoded(n, row, row) for n, row in enumerate(each)]


def kinds(loaded: Loaded, adapter: Adapter, data: list[Batch]) -> dict[str, Callable[[], object]]:
    """What is timed, by its name; each leaves the model as it found it."""
    several = {str(n): of_rank(adapter, RANK_OF_MANY, n) for n in range(MANY)}
    sixteen, eight = place(adapter, loaded.device), place(several["0"], loaded.device)
    trainable = place(adapter, loaded.device, trainable=True)
    modules = adapter.linear

    def with_(placed: Placed, run: Callable[[], object]) -> Callable[[], object]:
        def pointed() -> object:
            point(loaded, placed)
            return run()

        return pointed

    def body() -> None:
        with torch.no_grad():
            for batch in data:
                run_body(loaded, batch)

    def evaluation() -> None:
        with torch.no_grad():
            for batch in data:
                loaded.base(**inputs(batch), labels=batch.labels, use_cache=False).loss.item()

    def backward() -> None:
        def start(_: object, __: object, h: torch.Tensor) -> None:
            if not h.requires_grad:
                h.requires_grad_()

        with hooked({m: (loaded.layers[m].lora_A[NAME], start) for m in modules}):
            for batch in data:
                pull(loaded, batch)

    def training() -> None:
        for batch in data:
            loaded.base(**inputs(batch), labels=batch.labels, use_cache=False).loss.backward()
            for parameter in trainable.trained().values():
                parameter.grad = None

    found = {
        "output": with_(sixteen, lambda: measure_moments(loaded, modules, data)),
        "body": with_(sixteen, body),
        "evaluation": with_(sixteen, evaluation),
        "loss": with_(sixteen, lambda: measure_moments(loaded, modules, data, loss=True)),
        "backward": with_(sixteen, backward),
        "training": with_(trainable, training),
    }
    for what, loss in (("output", False), ("loss", True)):
        found |= {
            f"one {what}": with_(eight, lambda loss=loss: measure_moments(loaded, modules, data, loss=loss)),
            f"many {what}": lambda loss=loss: measure_moments_on_base(loaded, several, data, loss=loss),
        }
    return found


def made(given: argparse.Namespace, work: str) -> tuple[Adapter, Loaded]:
    """The adapter and the base, in memory."""
    if given.model:
        make_adapter(given.model, work)
        adapter = read_adapter(work)
        return adapter, load(adapter, given.model, device=given.device, dtype="float32")
    phases = [sys.executable, str(Path(__file__).with_name("phases.py"))]
    shape = ["--shape", given.shape, "--device", given.device, "--place", work, "--make"]
    subprocess.run([*phases, *shape], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    adapter = read_adapter(f"{work}/adapter")
    return adapter, load(adapter, f"{work}/base", device=given.device, dtype="bfloat16")


CLOCKS = ("cpu", "wall")
RATIOS = (
    ("output", "body"),
    ("evaluation", "output"),
    ("loss", "backward"),
    ("loss", "training"),
    ("many output", "one output"),
    ("many loss", "one loss"),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = options.add_mutually_exclusive_group(required=True)
    base.add_argument("--model", help="a Llama-like base model, in float32")
    base.add_argument("--shape", choices=SHAPES, help="of a random one, in bfloat16")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--rows", type=int, default=24)
    options.add_argument("--length", type=int, default=256, help="tokens a row")
    options.add_argument("--batch-tokens", type=int, default=4096)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--kinds", nargs="+", help="only these")
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as work:
        adapter, loaded = made(given, work)
    data = [
        b.to(loaded.device) for b in batches(rows(loaded, given.rows, given.length), given.batch_tokens, loaded.pad)
    ]
    timed = {k: run for k, run in kinds(loaded, adapter, data).items() if not given.kinds or k in given.kinds}
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in timed}
    for n in range(given.runs + 1):
        for kind, run in timed.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            if given.device == "cuda":
                torch.cuda.synchronize()
            found = time.process_time() - cpu, time.perf_counter() - clock
            if n:  # the first round warms up
                seconds[kind].append(found)
            print(n, kind, *(f"{s:.2f}" for s in found), flush=True)
    result = {
        "what": f"{Path(given.model).name if given.model else f'random Llama of {given.shape} shape'}, "
        f"{given.rows} rows of {given.length} tokens, {given.batch_tokens} a batch, "
        f"{'float32' if given.model else 'bfloat16'}, rank {RANK} on {len(adapter.linear)} linear layers; "
        f"{MANY} of rank {RANK_OF_MANY} in one pass",
        "machine": machine(given.threads),
        "device": device_name(given.device),
        "versions": versions(),
        "runs": given.runs,
        "seconds": {
            kind: {"cpu": spread([c for c, _ in s]), "wall": spread([w for _, w in s])} for kind, s in seconds.items()
        },
        "ratios": {
            f"{one} / {other}": {
                clock: spread([a[place] / b[place] for a, b in zip(seconds[one], seconds[other], strict=True)])
                for place, clock in enumerate(CLOCKS)
            }
            for one, other in RATIOS
            if one in seconds and other in seconds
        },
    }
    tell(result, given.out)


if __name__ == "__main__":
    main()
