"""Ctrl-C and SIGTERM while it trains: stop training, keep the best so far, and go on to the end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorapack.processes import first


@contextmanager
def on_signal() -> Iterator[Callable[[], bool]]:
    """What it gives says whether a signal came. The second one ends the run."""
    asked = False

    def handle(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if first():
            print(
                "lorapack: stopping after this step; the best state so far is evaluated and written (again: abort)",
                file=sys.stderr,
                flush=True,
            )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
