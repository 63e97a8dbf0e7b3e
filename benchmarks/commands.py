"""Every command that writes, small: for the trials of full disks and of signals (`full_disk.py`, `signals.py`)."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
ADAPTER, BASE = FIXTURES / "adapter", FIXTURES / "stories260k"
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
    "export": ["export", "ADAPTER", "--base", "BASE", "--no-verify", "-o", "new/out"],
    "export apart": ["export", "ADAPTER", "--base", "BASE", "--separate", "--no-verify", "-o", "new/out"],
}


def prepare(place: Path) -> dict[str, str]:
    """Import what the commands need, and make the inputs, by their names in `COMMANDS`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = str(place / "cache")
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    import lorapack.cli.main  # noqa: F401

    assert peft and transformers
    torch.set_num_threads(1)
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
    for name, out in (("merge", "full"), ("compress", "smaller")):
        code, said = run([found.get(word, word) for word in [*COMMANDS[name][:-1], out]], place)
        assert code == 0, said
    return found


def run(command: Sequence[str], place: Path) -> tuple[int, str]:
    """The command line in a child, in a directory; its exit code and what it said on stderr."""
    with tempfile.TemporaryFile() as said:
        code = os.waitstatus_to_exitcode(os.waitpid(start(command, place, said.fileno()), 0)[1])
        said.seek(0)
        return code, said.read().decode()


def start(command: Sequence[str], place: Path, said: int) -> int:
    """The command line in a child that has everything imported; `said` becomes its stderr. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 98
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what runs under `nohup` this
        os.chdir(place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        from lorapack.cli import main

        sys.argv = ["lorapack", *command]
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        os._exit(code)
