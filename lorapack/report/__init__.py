"""`report.json` as pages: one HTML file that needs no network, and Markdown for a pull request."""

from lorapack.report.render import html, markdown

__all__ = ["html", "markdown"]
