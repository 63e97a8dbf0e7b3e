"""Gates as a JUnit file, which CI systems show as tests."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from lorapack.core.report import GateOutcome
from lorapack.errors import OutputError
from lorapack.ship.gates import explained


def junit(outcomes: Sequence[GateOutcome], command: str) -> str:
    """One test a gate, in a suite with the name of the command."""
    missed = sum(not outcome.met for outcome in outcomes)
    counts = {"tests": str(len(outcomes)), "failures": str(missed), "errors": "0"}
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", {"name": command, **counts})
    for outcome in outcomes:
        test = ET.SubElement(suite, "testcase", {"classname": command, "name": outcome.gate, "time": "0"})
        if outcome.met:
            ET.SubElement(test, "system-out").text = explained(outcome)
        else:
            ET.SubElement(test, "failure", {"type": "gate", "message": explained(outcome)})
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


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
