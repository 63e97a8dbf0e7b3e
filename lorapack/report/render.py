"""Lay a report out: the templates beside this file, everything from a checkpoint escaped."""

import base64
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorapack.core.report import Report
from lorapack.fleet.summary import Summary, totals
from lorapack.report import view
from lorapack.ship.gates import explained
from lorapack.sweep import Point
from lorapack.write.card import shown


def code(text: object) -> str:
    """Text from a checkpoint as Markdown code in a table: nothing in it is markup, a link or a mention."""
    flat = re.sub(r"[\x00-\x1f\x7f`]", "'", str(text)).replace("|", "\\|")
    return f"`{flat}`" if flat.strip() else ""


FILTERS: dict[str, Callable[..., str]] = {
    "count": lambda number: f"{number:,}",
    "percent": lambda share, digits=1: f"{share:.{digits}%}",
    "short": lambda number: f"{number:.4g}",
    "shown": shown,
    "explained": explained,
    "code": code,
    "command": shlex.join,
}


def html(report: Report, sweep: Sequence[Point] = ()) -> str:
    """One HTML file: styles, script and drawings are in it, and its policy allows no request.

    Args:
        report: of a compression or a recovery.
        sweep: points of `lorapack.sweep_adapter`, drawn into size against quality.

    Raises:
        InputError: a part of the report is not what lorapack writes.
    """
    environment = _environment(autoescape=True)
    script = environment.get_template("search.js").render()
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = environment.get_template("style.css").render()
    given = _given(report, sweep) | {"style": Markup(style), "script": Markup(script), "script_hash": hashed}
    return environment.get_template("report.html").render(given)


def markdown(report: Report, sweep: Sequence[Point] = ()) -> str:
    """The same for a pull request or a job summary: tables, no drawings. Arguments as of `html`."""
    return _environment(autoescape=False).get_template("report.md").render(_given(report, sweep))


def fleet_markdown(summary: Summary) -> str:
    """The adapters of a fleet as a table."""
    page = _environment(autoescape=False).get_template("fleet.md")
    return page.render(summary=summary, totals=totals(summary.adapters))


def _environment(autoescape: bool) -> Environment:
    made = Environment(
        loader=PackageLoader("lorapack.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(FILTERS)
    made.globals |= {"shown_layer": lambda number: "–" if number < 0 else str(number)}
    return made


def _given(report: Report, sweep: Sequence[Point]) -> dict[str, Any]:
    return {
        "report": report,
        "choices": {choice.module: choice for choice in report.plan.choices},
        "grid": view.grid(report),
        "spectra": view.spectra(report),
        "sizes": view.size_against_quality(report, sweep),
        "search": view.searched(report),
        "recovery": view.recovered(report),
        "curve": view.recovery(report),
        "variants": [
            v for v in view.VARIANTS if report.quality and any(v in m for m in report.quality.metrics.values())
        ],
    }
