"""Outcomes as a JUnit file, which CI systems show as tests."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorapack.core.report import GateOutcome
from lorapack.errors import OutputError
from lorapack.ship.gates import explained


@dataclass(frozen=True)
class Case:
    """One test.

    Attributes:
        name: of what was tested.
        said: one line about it; may be empty where it passed.
        outcome: ``failure`` is of a gate, ``error`` where there is nothing that a gate could be asked of.
        kind: of what went wrong.
        seconds: it took.
    """

    name: str
    said: str = ""
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    kind: str = "gate"
    seconds: float = 0


def of_gates(outcomes: Sequence[GateOutcome]) -> list[Case]:
    """One test a gate."""
    return [Case(each.gate, explained(each), "passed" if each.met else "failure") for each in outcomes]


def junit(cases: Sequence[Case], command: str) -> str:
    """The tests in a suite with the name of the command; what XML has no place for is spelled out."""
    outcomes = [case.outcome for case in cases]
    counts = {"tests": len(cases), "failures": outcomes.count("failure"), "errors": outcomes.count("error")}
    counts |= {"skipped": outcomes.count("skipped")}
    attributes = {name: str(count) for name, count in counts.items()}
    suites = ET.Element("testsuites", attributes)
    suite = ET.SubElement(suites, "testsuite", {"name": command, **attributes})
    for case in cases:
        given = {"classname": command, "name": _plain(case.name), "time": f"{case.seconds:g}"}
        test = ET.SubElement(suite, "testcase", given)
        if case.outcome in ("failure", "error"):
            ET.SubElement(test, case.outcome, {"type": case.kind, "message": _plain(case.said)})
        elif case.outcome == "skipped":
            ET.SubElement(test, "skipped", {"message": _plain(case.said)})
        elif case.said:
            ET.SubElement(test, "system-out").text = _plain(case.said)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def check_target(path: str) -> None:
    """Refuse before the work what could only fail after it. Another JUnit file may be replaced, nothing else.

    Raises:
        OutputError: its directory is not there, or something else stands in its place.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise OutputError(f"--junit {path}: the directory {target.parent} does not exist")
    if target.is_dir():
        raise OutputError(f"--junit {path} is a directory")
    if target.exists() and b"<testsuite" not in target.read_bytes()[:500]:
        raise OutputError(f"--junit {path} exists and is no JUnit file; choose another")
