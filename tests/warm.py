"""A Python that has imported what takes long, and forks for every command that is to be run.

What it runs is a process of its own as `python -m lorapack` is: its own arguments, folder, output and exit code. Only
the seconds are gone in which torch, transformers and PEFT are imported.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LARGE = ("peft", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama")
TIMEOUT = 300  # seconds


@contextmanager
def server(environment: Mapping[str, str], modules: Sequence[str] = LARGE) -> Iterator["subprocess.Popen[str]"]:
    """One that has imported these modules in this environment, some of which libraries read when they are imported."""
    command = [sys.executable, __file__, *modules]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield started
    started.stdin.close()
    started.wait(60)


def run(
    server: "subprocess.Popen[str]", arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """`python -m lorapack` with these arguments in a process of its own; its environment is the server's and this."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        wanted = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "said": list(map(str, said))}
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in said))


def serve() -> None:
    """Read a line that says what to run, fork, answer with the exit code; until there are no more lines."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(wanted: dict) -> None:
    os.environ.update(wanted["environment"])
    os.chdir(wanted["cwd"])
    for number, path in enumerate([os.devnull, *wanted["said"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(TIMEOUT)
    sys.path[0], sys.argv = wanted["cwd"], ["lorapack", *wanted["arguments"]]
    runpy.run_module("lorapack", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
