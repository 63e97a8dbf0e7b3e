"""What is to be done: the adapters by name and group, and the order that holds for all of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapack.data.rows import Source, source_name
from lorapack.errors import InputError
from lorapack.hub import find_adapter_config
from lorapack.model.exchange import FREE
from lorapack.read.files import read_json

SUMMARY, PAGE = "fleet.json", "fleet.md"  # beside the results
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Task:
    """One adapter.

    Attributes:
        name: of its directory in the output.
        source: a directory or a Hub id.
        group: the same for adapters that one base in memory serves.
    """

    name: str
    source: str
    group: int = 0


Chunk = tuple[Task, ...]  # of one group, done by one worker


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        name: of the task.
        problem: why there is no result, in one line; empty where there is one.
        skipped: an earlier run had finished it.
        retries: how often its worker died before that.
    """

    name: str
    problem: str = ""
    skipped: bool = False
    retries: int = 0


@dataclass(frozen=True, eq=False)
class Order:
    """What holds for every adapter; it travels to the workers.

    Attributes:
        here: the working directory, to which relative paths relate.
        out: the directory of the results.
        settings: arguments of `lorapack.compress_adapter`.
        data, eval_data: the rows; None as there.
        overwrite: replace results of other adapters or other settings.
        at_once: how many adapters of a group are measured in one pass of the base alone; 1 measures each by itself.
    """

    here: str
    out: str
    settings: Mapping[str, Any]
    data: Source | None = None
    eval_data: Source | None = None
    overwrite: bool = False
    at_once: int = 1

    def asked(self) -> dict[str, Any]:
        """The settings as JSON, with digests of the rows: results with the same ones need not be made again."""
        base = self.settings["base"]
        said = {name: value for name, value in self.settings.items() if name != "trust_remote_code"}
        said |= {
            "measure_at_once": self.at_once,
            "base": base and source_name(base),
            "data": _digest(self.data),
            "eval_data": _digest(self.eval_data),
        }
        return json.loads(json.dumps(said, default=str, sort_keys=True))  # type: ignore[no-any-return]


def named(given: Iterable[str], listed: Iterable[str] = ()) -> list[Task]:
    """Adapters by the name that each gets, which no two may share.

    Args:
        given: directories and Hub ids; a directory gets its own name, ``owner/name`` becomes ``owner--name``.
        listed: lines of a list: the same, or ``NAME<tab>ADAPTER``; empty lines and those with # are left out.

    Raises:
        InputError: two have one name, or a name cannot be a directory's.
    """
    lines = [line.strip() for line in listed]
    pairs = [line.rpartition("\t") for line in lines if line and not line.startswith("#")]
    found: dict[str, Task] = {}
    for name, _, source in [*(("", "", source) for source in given), *pairs]:
        task = Task(name.strip() or _name(source), source.strip())
        if not _NAME.fullmatch(task.name) or task.name in (SUMMARY, PAGE):
            raise InputError(
                f"{source}: {task.name!r} cannot name a directory; give it a name in the list, NAME<tab>PATH"
            )
        if task.name in found:
            both = f"{found[task.name].source} and {task.source}"
            raise InputError(f"{both} are both called {task.name}; give one another name in the list, NAME<tab>PATH")
        found[task.name] = task
    return list(found.values())


def grouped(tasks: Sequence[Task], base: str | None) -> tuple[list[Task], list[Outcome]]:
    """The tasks with their groups, and those whose configuration cannot be read. Nothing else is read of them.

    Args:
        tasks: of `named`.
        base: the base model of all of them, whatever they say themselves.
    """
    groups: dict[str, int] = {}
    good, bad = [], []
    for task in tasks:
        try:
            kind = _kind(read_json(find_adapter_config(task.source)), base)
        except InputError as error:
            bad.append(Outcome(task.name, str(error)))
        else:
            good.append(Task(task.name, task.source, groups.setdefault(kind, len(groups))))
    return good, bad


def chunks(tasks: Sequence[Task], most: int) -> list[Chunk]:
    """The tasks of each group, so many together."""
    groups: dict[int, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    return [tuple(group[n : n + most]) for group in groups.values() for n in range(0, len(group), most)]


def _kind(config: Mapping[str, Any], base: str | None) -> str:
    settings = {key: value for key, value in config.items() if key not in FREE}
    targets = config.get("target_modules")
    settings["target_modules"] = sorted(map(str, targets)) if isinstance(targets, list) else targets
    settings["base"] = base or [config.get("base_model_name_or_path"), config.get("revision")]
    return json.dumps(settings, sort_keys=True)


def _name(source: str) -> str:
    path = Path(source)
    if path.exists():
        return path.name or path.resolve().name
    return source.replace("/", "--") if source.count("/") == 1 else path.name


def _digest(source: Source | None) -> str | None:
    if source is None:
        return None
    return hashlib.sha256(json.dumps(source.rows, default=str).encode()).hexdigest()
