"""Plots, with matplotlib where it is installed."""

from collections.abc import Sequence
from pathlib import Path

from lorapack.errors import InputError
from lorapack.sweep import Point
from lorapack.write.file import new_file

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Refuse before the work what could only fail after it.

    Raises:
        InputError: no matplotlib, or another ending.
    """
    if Path(path).suffix not in FORMATS:
        raise InputError(f"--plot {path}: the ending is not one of {' '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'lorapack[plot]'") from None


def draw_sweep(points: Sequence[Point], path: str) -> None:
    """Gain retained over the share of the parameters, a line with its intervals a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(point.method for point in points):
        found = sorted(
            (point.share, kept.value, kept.low, kept.high)
            for point in points
            if point.method == method and point.quality and (kept := point.quality.retained)
        )
        if found:
            shares, values, lows, highs = zip(*found, strict=True)
            (line,) = axes.plot(shares, values, marker="o", markersize=4, label=method)
            axes.fill_between(shares, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("share of the parameters")
    axes.set_ylabel("gain retained")
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix.removeprefix("."))
