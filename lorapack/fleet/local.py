"""A fleet on one machine: processes that each keep a base in memory, and are replaced when they die."""

import contextlib
import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from lorapack.fleet.task import Chunk, Order, Outcome, Task, chunks

GRACE = 5.0  # seconds for a worker to end
RETRIES = 5  # so often is begun anew what a worker died of


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    chunk: Chunk = ()
    group: int | None = None


def run_local(order: Order, tasks: Sequence[Task], workers: int) -> Iterator[Outcome]:
    """Do the tasks in so many processes; outcomes come as they are ready.

    A worker goes on with the group of its last tasks as long as that has some. One that dies (out of memory, a
    signal) is replaced, and what it was at is begun anew at most `RETRIES` times; several adapters then one by one.

    Raises:
        RuntimeError: a worker cannot even start.
    """
    waiting: dict[int, deque[Chunk]] = {}
    for chunk in chunks(tasks, order.at_once):
        waiting.setdefault(chunk[0].group, deque()).append(chunk)
    died: Counter[Chunk] = Counter()
    crew = [_hire(order, workers) for _ in range(min(workers, len(tasks)))]
    try:
        while True:
            for worker in crew:
                if not worker.chunk and (queue := _queue(waiting, worker.group)):
                    worker.chunk = queue.popleft()
                    worker.group = worker.chunk[0].group
                    with contextlib.suppress(OSError):  # it is dead, which shows below
                        worker.pipe.send(worker.chunk)
            busy = {worker.pipe: worker for worker in crew if worker.chunk}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                chunk, outcomes = worker.chunk, _answer(worker)
                worker.chunk = ()
                if outcomes is None:
                    died[chunk] += 1
                    crew[crew.index(worker)] = _hire(order, workers)
                    if died[chunk] <= RETRIES:
                        waiting[chunk[0].group].appendleft(chunk)
                    elif len(chunk) > 1:
                        waiting[chunk[0].group].extendleft((task,) for task in chunk)
                    else:
                        outcomes = [Outcome(chunk[0].name, _lost(worker))]
                yield from (replace(found, retries=min(died[chunk], RETRIES)) for found in outcomes or ())
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join(GRACE)
            worker.process.kill()


def _queue(waiting: dict[int, deque[Chunk]], group: int | None) -> deque[Chunk]:
    """What is left of a group; where that is nothing, of the one with the most."""
    own = None if group is None else waiting.get(group)
    return own or max(waiting.values(), key=len)


def _hire(order: Order, workers: int) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, order, workers), daemon=True)
    process.start()
    theirs.close()  # so that its death ends the pipe
    return _Worker(process, ours)


def _answer(worker: _Worker) -> list[Outcome] | None:
    """None where it died instead."""
    try:
        return worker.pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, OSError):
        worker.process.join()
    if (worker.process.exitcode or 0) > 0:
        raise RuntimeError(f"a worker ended with exit code {worker.process.exitcode}; what it said stands above")
    return None


def _lost(worker: _Worker) -> str:
    number = -(worker.process.exitcode or 0)
    how = signal.Signals(number).name if number in set(signal.Signals) else "an unknown signal"
    return f"its worker was ended by {how} {RETRIES + 1} times: too little memory for the base, or a crash"


def _serve(pipe: Connection, order: Order, workers: int) -> None:
    """What a worker does: one chunk after the other, until nobody sends any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that sends the tasks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # removes what is half written
    import torch

    from lorapack.fleet.work import bench, work

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    place = bench(order)
    with contextlib.suppress(EOFError, OSError):  # the other end is gone
        while True:
            pipe.send(work(place, pipe.recv()))
