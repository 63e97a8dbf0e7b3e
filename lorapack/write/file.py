"""A single output file that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorapack.errors import OutputError
from lorapack.write.directory import refuse_overlap


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False, inputs: tuple[str | Path, ...] = ()) -> Iterator[Path]:
    """A temporary file beside `path` that is flushed and takes its name when the block ends without an error.

    Args:
        path: of the file to make.
        overwrite: replace an existing one.
        inputs: files and directories that must not be written to.

    Raises:
        OutputError: it exists, lies in an input, or cannot be written; one line.
    """
    refuse_existing(path, overwrite, *inputs)
    target = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}") from None
    temporary = Path(name)
    try:
        yield temporary
        os.fsync(descriptor)
        temporary.chmod(0o644)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # the library wraps the operating system's error in text
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path} cannot be written: {reason}") from None
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def refuse_existing(path: str | Path, overwrite: bool, *inputs: str | Path | None) -> None:
    """Refuse a path that is there, or that overlaps with an input.

    Raises:
        OutputError: names it.
    """
    refuse_overlap(path, *(given for given in inputs if given))
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another output or pass --overwrite")
