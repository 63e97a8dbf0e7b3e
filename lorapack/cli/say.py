"""Printing of text from files and paths, to a terminal or to a pipe that may be closed."""

import os
import sys

import click


def say(text: str, nl: bool = True) -> None:
    """Print on standard output."""
    try:
        click.echo(plain(text), nl=nl)
    except BrokenPipeError:
        nobody_reads()


def plain(text: str) -> str:
    r"""The text with what a terminal would obey, or has no letter for, spelled out: ``\x1b``, ``\u202e``."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def spell_out_letters() -> None:
    """Let standard output spell out letters that its encoding lacks, rather than fail."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def nobody_reads() -> None:
    """Standard output was closed by its reader, as by ``| head``: what is still printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
