"""What the GitHub Action runs: one lorapack command, its error as annotations, its exit code kept."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

COMMANDS = ("compress", "evaluate")
WRITTEN = (0, 3)  # exit codes with which compress has written its result
GATE = "gate not met: "


def words(inputs: Mapping[str, str]) -> list[str]:
    """The command line for the action's inputs.

    Args:
        inputs: COMMAND, ADAPTER, DATA, BASE, OPTIONS, OUT; empty where not given.

    Raises:
        ValueError: an unknown command, or a quote that OPTIONS does not close.
    """
    command = inputs["COMMAND"]
    if command not in COMMANDS:
        raise ValueError(f"command: {command} is none of {', '.join(COMMANDS)}")
    try:
        options = shlex.split(inputs["OPTIONS"])
    except ValueError as error:
        raise ValueError(f"options: {error} in {inputs['OPTIONS']}") from None
    data = ["--data", inputs["DATA"]] if inputs["DATA"] else []
    base = ["--base", inputs["BASE"]] if inputs["BASE"] else []
    out = ["--out", inputs["OUT"]] if command == "compress" else []
    return ["lorapack", command, *data, *base, *out, *options, "--", inputs["ADAPTER"]]


def run(command: list[str]) -> tuple[int, str]:
    """Run a command, its standard error passed on as it comes; its exit code, and the last thing that lorapack said."""
    said = f"{shlex.join(command)} failed"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            said = line.removeprefix("lorapack: ").rstrip() if line.startswith("lorapack: ") else said
    return process.returncode, said


def annotations(said: str) -> list[str]:
    """GitHub's workflow commands for an error, one for each gate that is not met."""
    gates = re.split(r"; (?=--)", said.removeprefix(GATE)) if said.startswith(GATE) else []
    return [f"::error title=lorapack::{escaped(text)}" for text in [GATE + gate for gate in gates] or [said]]


def escaped(text: str) -> str:
    """Text as a workflow command holds it: on one line, without a percent sign of its own."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def main() -> int:
    """Run what the environment asks for; the exit code of lorapack, 2 where it could not be asked."""
    try:
        code, said = run(words(os.environ))
    except (ValueError, OSError) as error:  # OSError: no lorapack on the PATH
        code, said = 2, str(error)
    with Path(os.environ["GITHUB_OUTPUT"]).open("a") as outputs:
        outputs.write(f"exit-code={code}\n")
        if os.environ["COMMAND"] == "compress" and code in WRITTEN:
            outputs.write(f"out={os.environ['OUT'].rstrip('/')}\n")
    if code:
        print(*annotations(said), sep="\n", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
