"""A single output file that appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorapack.errors import OutputError
from lorapack.write.directory import flush, refusal, refuse_overlap, sweep, workplace


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False, inputs: tuple[str | Path, ...] = ()) -> Iterator[Path]:
    """A temporary file beside `path` that is flushed and takes its name when the block ends without an error.

    What killed runs have left beside `path` is removed first.

    Args:
        path: of the file to make.
        overwrite: replace an existing one.
        inputs: files and directories that must not be written to.

    Raises:
        OutputError: it exists, lies in an input, or cannot be written; one line.
    """
    refuse_existing(path, overwrite, *inputs)
    target = Path(os.path.abspath(path))
    sweep(target)
    with workplace(target) as work:
        temporary = work / "out"
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors puts another file in its place, readable to its owner alone
            flush(temporary)
            _publish(temporary, target, overwrite)
            flush(target.parent)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {refusal(error) or error}") from None


def write_text(text: str, path: str | Path, *, overwrite: bool) -> None:
    """A text as such a file; what no encoding has a letter for is spelled out."""
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def refuse_existing(path: str | Path, overwrite: bool, *inputs: str | Path | None) -> None:
    """Refuse a path that is there, or that overlaps with an input.

    Raises:
        OutputError: names it.
    """
    refuse_overlap(path, *(given for given in inputs if given))
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another output or pass --overwrite")


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give it its name; where it must not replace anything, in one step that another run cannot come between.

    Raises:
        OutputError: another run was faster.
        OSError: the name cannot be given.
    """
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise OutputError(f"{target} was made by another run in the meantime; choose another output") from None
    except OSError:  # a file system without links
        refuse_existing(target, overwrite)
        temporary.replace(target)
