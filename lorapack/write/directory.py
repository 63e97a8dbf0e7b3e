"""An output directory that appears whole or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorapack.errors import OutputError

_MARK = ".lorapack-"  # .OUT.lorapack-XXXX beside OUT, with a lock file that dies with its process
_LOCK = ".lock"


@contextlib.contextmanager
def new_directory(out: str | Path, *, overwrite: bool = False, inputs: tuple[str | Path, ...] = ()) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends without an error.

    Everything is flushed to the disk before the rename. What killed runs have left beside `out`
    is removed first.

    Args:
        out: the directory to make.
        overwrite: replace an existing one, at the end.
        inputs: directories that must not be written to.

    Raises:
        OutputError: `out` exists, lies in an input, or cannot be written; one line.
    """
    out = Path(os.path.abspath(out))
    for source in inputs:
        source = Path(os.path.realpath(source))
        target = Path(os.path.realpath(out))
        if source.is_dir() and (source == target or source in target.parents or target in source.parents):
            raise OutputError(f"{out} and the input {source} overlap; inputs are never changed, choose another output")
    _refuse_existing(out, overwrite)
    sweep(out)
    work = lock = None
    made: list[Path] = []
    try:
        try:
            made = _parents(out)
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}{_MARK}", dir=out.parent))
            lock = _locked(work)
            inside = work / "out"
            inside.mkdir(mode=0o777)
        except OSError as error:
            raise OutputError(f"{out} cannot be made: {error.strerror}") from None
        try:
            yield inside
            _flush(inside)
            _publish(inside, out, work / "old", overwrite)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
                raise OutputError(f"{out} cannot be written: {error.strerror}") from None
            raise
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in made:  # those that stayed empty
            with contextlib.suppress(OSError):
                parent.rmdir()
        if lock is not None:
            os.close(lock)


def sweep(out: Path) -> None:
    """Remove what killed runs have left beside `out`; a living run holds its lock and is left alone."""
    for left in out.parent.glob(f".{_escaped(out.name)}{_MARK}*"):
        try:
            descriptor = os.open(left / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            # killed between mkdtemp and the lock, or a run that is just there: give it a rename's time
            if left.is_dir() and not any(left.iterdir()):
                with contextlib.suppress(OSError):
                    left.rmdir()
            continue
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _parents(out: Path) -> list[Path]:
    """Make the directories above `out`; the new ones, the deepest first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(work: Path) -> int:
    descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(f"{out} exists; choose another output or pass --overwrite")
        if out.is_symlink() or not out.is_dir():
            raise OutputError(f"{out} is not a directory; choose another output")


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(inside: Path, out: Path, old: Path, overwrite: bool) -> None:
    _refuse_existing(out, overwrite)  # again: another run may have been faster
    if out.exists():
        out.rename(old)
    try:
        inside.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{out} was made by another run in the meantime; choose another output") from None
        raise
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
