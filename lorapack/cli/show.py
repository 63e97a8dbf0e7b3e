"""Values as tables on the terminal."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorapack.cli.say import nobody_reads, plain
from lorapack.core.report import Quality, Report
from lorapack.write.card import shown

if TYPE_CHECKING:
    from lorapack.core.plan import Plan
    from lorapack.fleet.summary import Summary
    from lorapack.verify import Verification

VARIANTS = ("base", "original", "compressed")


class Terminal(Console):
    """Rich's console for text that may come from anybody."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(plain(text), **how)

    def on_broken_pipe(self) -> None:
        nobody_reads()


def console() -> Console:
    """Standard output; in a file or a pipe as wide as the table needs, without colours."""
    found = Terminal(highlight=False, markup=False)
    return found if found.is_terminal else Terminal(highlight=False, markup=False, width=120)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first columns are text (to the left) and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return made


def print_report(report: Report) -> None:
    out = console()
    sizes = table("Modules", "type", "modules", "kept", "shared", "dropped", "parameters", "after")
    for row in report.types:
        numbers = (row.modules, row.kept, row.shared, row.dropped, row.parameters_before, row.parameters_after)
        sizes.add_row(row.type, *(f"{n:,}" for n in numbers))
    out.print(sizes)
    before, after = report.before, report.after
    whole = table("Size", "", "before", "after", "left")
    for name, one, two in (
        ("LoRA parameters", before.parameters, after.parameters),
        ("LoRA bytes", before.bytes, after.bytes),
        ("pairs of factors", before.factors, after.factors),
        ("carried bytes (saved modules, embeddings)", before.carried_bytes, after.carried_bytes),
    ):
        whole.add_row(name, f"{one:,}", f"{two:,}", f"{two / one:.1%}" if one else "–")
    out.print(whole)
    steps = table("Steps", "", "seconds", "peak MB")
    for name, step in report.run["steps"].items():
        steps.add_row(name, f"{step['seconds']:.1f}", f"{step['peak_mb']:,}")
    out.print(steps)
    if report.data is None or report.quality is None:
        out.print("Compressed without data: nothing was measured, recovered or evaluated")
        return
    data = report.data
    parts = ", ".join(f"{name} {part['rows']}" for name, part in data["parts"].items())
    columns = ", ".join(f"{role}={column}" for role, column in data["columns"].items())
    out.print(
        f"Data: {columns}; rows: {parts}; {data['rows_unusable']} unusable, {data['rows_cut']} cut", soft_wrap=True
    )
    if refit := report.settings.get("refit"):
        best = refit[refit["kept"]]
        out.print(f"Refit: {refit['before']:.4f} on the selection rows before, {best:.4f} after ({refit['kept']})")
    if report.recovery:
        curve = report.recovery["curve"]
        out.print(
            f"Recovery: {report.recovery['objective']} on the selection rows {curve[0][1]:.4f} at the start, "
            f"{min(value for _, value in curve):.4f} at step {report.recovery['best']} of {report.recovery['steps']}",
            soft_wrap=True,
        )
    print_quality(report.quality)


def print_quality(quality: Quality) -> None:
    out = console()
    variants = [v for v in VARIANTS if any(v in found for found in quality.metrics.values())]
    figures = table(f"Quality on {quality.rows:,} held-out rows (95% intervals)", "", *variants)
    for name, found in quality.metrics.items():
        figures.add_row(name, *(shown(found.get(variant)) for variant in variants))
    if quality.divergence:
        figures.add_row("KL from the original", *["" for _ in variants[:-1]], shown(quality.divergence))
    if quality.agreement:
        figures.add_row("same prediction", *["" for _ in variants[:-1]], shown(quality.agreement, percent=True))
    if quality.retained:
        figures.add_row("gain retained", *["" for _ in variants[:-1]], shown(quality.retained, percent=True))
    out.print()
    out.print(figures)
    if "compressed" in variants and quality.retained is None:
        out.print("Gain retained is not defined: on these rows the original is not measurably better than the base")


def print_plan(plan: "Plan", planned: int, whole: int) -> None:
    out = console()
    rows = table(f"Plan by {plan.method}", "module", "score", "action", "rank", "reason")
    for choice in plan.choices:
        score = "–" if choice.score is None else f"{choice.score:.4f}"
        action = f"share {choice.group}" if choice.group else choice.action
        rows.add_row(choice.module, score, action, "" if choice.rank is None else str(choice.rank), choice.reason)
    out.print(rows)
    out.print(f"{planned:,} of {whole:,} parameters ({planned / whole:.1%})")


def print_verification(found: "Verification") -> None:
    rows = table(f"A and B on {found.outputs:,} outputs ({found.dtype})", "", "")
    allowed = found.tolerance * found.spread
    rows.add_row("greatest difference", f"{found.greatest:.3g} (allowed {allowed:.3g})")
    rows.add_row("mean difference", f"{found.mean:.3g}")
    if found.effect is not None:
        rows.add_row("mean difference that the adapter makes", f"{found.effect:.3g}")
    if found.agreement is not None:
        rows.add_row("same top-1", f"{found.agreement:.1%}")
    rows.add_row("the same", "yes" if found.same else "no")
    console().print(rows)


def print_fleet(summary: "Summary", most: int) -> None:
    """All rows of a small fleet; of one with more than `most` only those that are not done."""
    from lorapack.fleet.summary import totals

    rows = summary.adapters
    small = len(rows) <= most
    found = table(
        "Adapters" if small else "Adapters that are not done",
        "",
        "state",
        "before",
        "after",
        "left",
        "gain retained",
        left=2,
    )
    for row in rows:
        if row.state == "failed":
            found.add_row(row.name, row.state, "–", "–", "–", "–")
        elif small or row.state != "done":
            share = f"{row.bytes_after / row.bytes_before:.1%}" if row.bytes_before else "–"
            retained = shown(row.retained, percent=True)
            found.add_row(row.name, row.state, f"{row.bytes_before:,}", f"{row.bytes_after:,}", share, retained)
    if found.row_count:
        console().print(found)
    console().print(totals(rows), soft_wrap=True)
