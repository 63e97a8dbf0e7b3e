"""Show how far a step is: a bar on a terminal, a quiet line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from lorapack.processes import first
from lorapack.watch import Item

EVERY = 15.0  # seconds between two lines in a log


def watch(step: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]:
    """Pass the items on and show their count, the rate and the time left on stderr."""
    if not first():
        return items
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    return _bar(step, items, count) if sys.stderr.isatty() else _lines(step, items, count)


def _bar(step: str, items: Iterable[Item], count: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(step, total=count, rate="")
        seen, start = 0, time.monotonic()
        for item in items:
            yield item
            seen += _tokens(item)
            progress.update(task, advance=1, rate=_rate(seen, time.monotonic() - start))


def _lines(step: str, items: Iterable[Item], count: int) -> Iterator[Item]:
    seen, start = 0, time.monotonic()
    said = start
    for number, item in enumerate(items, 1):
        yield item
        seen += _tokens(item)
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            left = (now - start) / number * (count - number)
            rate = f"{_rate(seen, now - start)}, " if seen else ""
            print(f"lorapack: {step} {number}/{count}, {rate}{left:.0f} s left", file=sys.stderr, flush=True)


def _tokens(item: Any) -> int:
    """Of a batch; other items have none."""
    return int(item.attention_mask.sum()) if hasattr(item, "attention_mask") else 0


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""
