"""PEFT's patterns of module names: the first that matches the end of a name gives the module its rank or alpha."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lorapack.errors import InputError

if TYPE_CHECKING:
    import regex

LONGEST = 10_000  # characters of a pattern; a regular expression of every module's name has fewer
SECONDS = 5.0  # for all the names of one adapter; a real configuration takes milliseconds
# how PEFT matches the patterns of each field with a module's name
FRAMES = {"target_modules": "^(…)$", "exclude_modules": "^(…)$"}
FRAMES |= dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?(…)$")
FRAMES |= {"modules_to_save": r"(^|.*\.)…($|\..*)", "layers_pattern": r"(?:^|.*?\.)…\.(?P<idx>\d+)\."}
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for name in names:
        re.match(pattern, name)
"""
_LITERAL = re.compile(r"\^?(?:[\w-]|\\[.-])+")  # nothing but a name, as `re.escape` writes it


def check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: says why.
    """
    if not _LITERAL.fullmatch(pattern):
        _compiled(pattern)


def _compiled(pattern: str) -> "regex.Pattern[str]":
    """The pattern as PEFT matches it against a module's name, with a matcher that knows a time limit."""
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, at most {LONGEST:,} are read")
    import regex  # here: nearly all patterns are names

    whole = rf"(.*\.)?({pattern})$"
    try:
        re.compile(whole)  # PEFT's own matcher must take it too
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def first_match(patterns: Mapping[str, float], where: str) -> Callable[[str], float | None]:
    """A look-up of module names: the value of the first pattern that matches, None where none does.

    Keys that are names, as nearly all are, are found by the name's endings and not tried one by one: an adapter
    with thousands of modules and as many patterns is read in no time. The others may be made to take
    for ever; together they get `SECONDS`.

    Args:
        patterns: in the order in which they are tried.
        where: what to call them in a message.

    Raises:
        InputError: by the look-up, when the time is up; names the pattern.
    """
    endings: dict[str, int] = {}
    wholes: dict[str, int] = {}
    tried: list[tuple[int, str, regex.Pattern[str]]] = []
    values = list(patterns.values())
    for place, pattern in enumerate(patterns):
        if _LITERAL.fullmatch(pattern):
            names = wholes if pattern.startswith("^") else endings
            names.setdefault(pattern.removeprefix("^").replace("\\", ""), place)
        else:
            tried.append((place, pattern, _compiled(pattern)))
    left = SECONDS

    def look_up(module: str) -> float | None:
        nonlocal left
        parts = module.split(".")
        found = [endings.get(".".join(parts[n:]), len(values)) for n in range(len(parts))]
        first = min(*found, wholes.get(module, len(values)))
        for place, pattern, matcher in tried:
            if place > first:
                break
            start = time.monotonic()
            try:
                matches = matcher.match(module, timeout=max(left, 1e-3))
            except TimeoutError:
                raise InputError(f"{where}: the pattern {pattern!r} takes too long on the name {module!r}") from None
            finally:
                left -= time.monotonic() - start
            if matches:
                first = place
        return values[first] if first < len(values) else None

    return look_up


def check_time(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse a configuration with a pattern that takes too long on these names.

    PEFT matches with `re`, which knows no time limit, and may take for ever where `regex` does not: it is tried as it
    is, in a process that can be ended.

    Args:
        config: `adapter_config.json`.
        names: of the modules that PEFT will try it on.

    Raises:
        InputError: names the field and the pattern; also where it is no regular expression.
    """
    tried = [
        (field, pattern, frame.replace("…", pattern))
        for field, frame in FRAMES.items()
        for pattern in _given(config, field)
        if not _LITERAL.fullmatch(pattern)
    ]
    if not tried:
        return
    asked = json.dumps([[whole for *_, whole in tried], list(names)]).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY], input=asked, capture_output=True, timeout=SECONDS
        )
        if not done.returncode:
            return
        said, reason = done.stdout, "is no regular expression"
    except subprocess.TimeoutExpired as late:
        said, reason = late.stdout or b"", "takes too long on the names of the base model's modules"
    field, pattern, _ = tried[max(0, len(said.split()) - 1)]
    raise InputError(f"{field}: the pattern {pattern[:80]!r} {reason}")


def _given(config: Mapping[str, Any], field: str) -> list[str]:
    given = config.get(field) or ()
    return [given] if isinstance(given, str) else [pattern for pattern in given if isinstance(pattern, str)]
