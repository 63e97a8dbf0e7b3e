"""Gates on the command line: read with the options, told at the end."""

from collections.abc import Sequence
from typing import Any

from lorapack.cli.say import say
from lorapack.core.report import GateOutcome
from lorapack.errors import InputError
from lorapack.ship.gates import Gates, demand, explained
from lorapack.ship.junit import Case, check_target, junit, of_gates


def take_gates(
    settings: dict[str, Any], quality: bool, without: str, tests_without: bool = False
) -> tuple[Gates, str | None]:
    """Take `options.GATES` out of a command's settings, and refuse at once what could only fail after the work.

    Args:
        settings: of the command; the gates are removed from it.
        quality: whether there will be figures of quality.
        without: the option that would bring them.
        tests_without: whether a JUnit file has something to say without a gate.

    Raises:
        InputError: a gate that cannot be decided, or a JUnit file without gates or in a bad place.
    """
    names = ("min_retained", "max_loss_increase", "max_bytes", "max_params")
    gates = Gates(**{name: settings.pop(name) for name in names})
    target: str | None = settings.pop("junit")
    if gates.of_quality and not quality:
        raise InputError(f"{gates.of_quality[0]} needs {without}")
    if target is not None:
        if not gates and not tests_without:
            raise InputError("--junit has nothing to say without a gate, for example --min-retained 99%")
        check_target(target)
    return gates, target


def settle(
    outcomes: Sequence[GateOutcome], target: str | None, command: str, tell: bool, written: str | None = None
) -> None:
    """Write the JUnit file, tell the outcomes, and end with an error where one is not met.

    Args:
        outcomes: of `lorapack.ship.gates.judge`.
        target: the JUnit file, or None.
        command: what to call the suite.
        tell: say on standard output which gates are met.
        written: what stays although a gate is not met.

    Raises:
        GateError: a gate is not met.
    """
    if target is not None:
        write_junit(of_gates(outcomes), target, command)
    for outcome in outcomes:
        if tell and outcome.met:
            say(f"Gate met: {explained(outcome)}")
    demand(outcomes, written)


def write_junit(cases: Sequence[Case], target: str, command: str) -> None:
    """Write the JUnit file, in place of an earlier run's."""
    from lorapack.write.file import write_text

    write_text(junit(cases, command), target, overwrite=True)
