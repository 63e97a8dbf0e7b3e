"""PEFT's patterns of module names: the first that matches the end of a name gives the module its rank or alpha."""

import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lorapack.errors import InputError

if TYPE_CHECKING:
    import regex

LONGEST = 10_000  # characters of a pattern; a regular expression of every module's name has fewer
SECONDS = 5.0  # for all the names of one adapter; a real configuration takes milliseconds
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
