"""A fleet on Ray: one task for some adapters of a group, the rows in the object store."""

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from lorapack.errors import InputError
from lorapack.fleet.local import RETRIES
from lorapack.fleet.task import Chunk, Order, Outcome, Task, chunks

CHUNK = 8  # at most so many adapters in one Ray task: it has the base in memory for all but the first
PATIENCE = 10.0  # seconds
NAME = "lorapack fleet"  # of the tasks, in Ray's own tools
_benches: dict[str, Any] = {}  # in a worker: its bench, by the run


def run_ray(order: Order, tasks: Sequence[Task], address: str) -> Iterator[Outcome]:
    """Do the tasks on a Ray cluster; outcomes come as chunks of them are ready.

    Every worker process of Ray keeps a base in memory, and has a GPU of its own where the cluster has some. A
    chunk whose worker died is begun anew by Ray, at most `RETRIES` times; what it had finished it finds finished.
    After that its adapters are tried one by one, so that one that kills its worker takes no other with it.

    Args:
        order: what to do; `out`, the adapters and the base must be what every node sees under these names.
        tasks: which adapters.
        address: of the cluster; ``local`` starts one on this machine.

    Raises:
        InputError: ray is not installed, or there is no cluster at this address.
    """
    ray = _connected(address)
    try:
        run, shared = os.urandom(8).hex(), ray.put(order)
        has_gpu = order.settings.get("device") != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        do = ray.remote(num_cpus=1, num_gpus=int(has_gpu), max_retries=RETRIES)(_chunk).options(name=NAME)
        share = -(-len(tasks) // max(1, int(ray.cluster_resources().get("CPU", 1))))
        most = order.at_once if order.at_once > 1 else min(CHUNK, share)
        running = {do.remote(run, shared, chunk): chunk for chunk in chunks(tasks, most)}
        while running:
            [ready], _ = ray.wait(list(running), num_returns=1)
            chunk = running.pop(ready)
            try:
                yield from ray.get(ready)
            except ray.exceptions.RayTaskError:
                raise  # `work` raises nothing, so this is a worker that cannot even start
            except ray.exceptions.RayError as error:
                if len(chunk) > 1:
                    running |= {do.remote(run, shared, (task,)): (task,) for task in chunk}
                else:
                    yield Outcome(chunk[0].name, f"its Ray worker died {RETRIES + 1} times ({type(error).__name__})")
    finally:
        ray.shutdown()


def _chunk(run: str, order: Order, chunk: Chunk) -> list[Outcome]:
    from lorapack.fleet.work import bench, work

    if run not in _benches:
        _benches.clear()
        _benches[run] = bench(order)
    return work(_benches[run], chunk)


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray: pip install 'lorapack[ray]'") from None
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--ray {address}: no cluster answers there ({reason[:160]})") from None
    return ray


def _knock(address: str) -> None:
    """Open a connection to a ``HOST:PORT``, because Ray ends the whole process where nobody answers."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
