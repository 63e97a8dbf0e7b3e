"""A Python that has imported the large libraries, and forks for every command that is to be run.

What it runs is a process of its own as `python -m lorapack` is: its own arguments, folder, output and exit code. Only
the five seconds are gone in which torch, transformers and PEFT are imported.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

# libraries read some of it when they are imported: a command in another environment is no work for this server
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def run(arguments: list[str], cwd: Path | None, timeout: int) -> "subprocess.CompletedProcess[str]":
    """`python -m lorapack` with these arguments in a process of its own, in `ENVIRONMENT`."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        said = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for path in said.values():
            path.touch()
        wanted = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "timeout": timeout}
        server.stdin.write(json.dumps(wanted | {name: str(path) for name, path in said.items()}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in said.values()))


@cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    atexit.register(_end, server)
    return server


def _end(server: "subprocess.Popen[str]") -> None:
    with suppress(BrokenPipeError):
        server.stdin.close()
    server.wait()


def _serve() -> None:
    """Read a line that says what to run, fork, answer with the exit code; until there are no more lines."""
    import peft  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        return
    os.chdir(wanted["cwd"])
    for number, path in ((0, os.devnull), (1, wanted["stdout"]), (2, wanted["stderr"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.alarm(wanted["timeout"])
    sys.path[0], sys.argv = wanted["cwd"], ["lorapack", *wanted["arguments"]]
    runpy.run_module("lorapack", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
