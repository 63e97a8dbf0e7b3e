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
from lorapack.read.files import CONFIG

_MARK = ".lorapack-"  # .OUT.lorapack-XXXX beside OUT, with a lock file that dies with its process
_LOCK = ".lock"
_OLD = "old"


@contextlib.contextmanager
def new_directory(
    out: str | Path, *, overwrite: bool = False, inputs: tuple[str | Path, ...] = (), mark: str = CONFIG
) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends without an error.

    Everything is flushed to the disk before the rename. What killed runs have left beside `out`
    is removed first.

    Args:
        out: the directory to make.
        overwrite: replace an existing one, at the end; only an empty one, or one that holds `mark`.
        inputs: files and directories that must not be written to.
        mark: the file by which a directory of the same kind is known.

    Raises:
        OutputError: `out` exists, lies in an input, or cannot be written; one line.
    """
    out = Path(os.path.abspath(out))
    refuse_overlap(out, *inputs)
    sweep(out)
    _refuse_existing(out, overwrite, mark)
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
            _publish(inside, out, work / _OLD, overwrite, mark)
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


def refuse_overlap(out: str | Path, *inputs: str | Path) -> None:
    """Refuse an output that is, holds or lies in an input; an input that is no path is left to its reader.

    Raises:
        OutputError: names both.
    """
    target = Path(os.path.realpath(out))
    for source in map(Path, map(os.path.realpath, inputs)):
        if source.exists() and (source == target or source in target.parents or target in source.parents):
            raise OutputError(f"{out} and the input {source} overlap; inputs are never changed, choose another output")


def sweep(out: Path) -> None:
    """Remove what killed runs have left beside `out`; a living run holds its lock and is left alone.

    A run that was killed in the middle of replacing `out` has left the old one: it gets its name back.
    """
    for left in out.parent.glob(f".{_escaped(out.name)}{_MARK}*"):
        try:
            descriptor = os.open(left / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            _sweep_unlocked(left)
            continue
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _give_back(left / _OLD, out)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _sweep_unlocked(left: Path) -> None:
    """The lock is the first thing made: without it, a run was killed before that or while removing the rest."""
    with contextlib.suppress(OSError):
        names = {path.name for path in left.iterdir()}
        if not names:
            left.rmdir()
        elif _LOCK not in names:
            shutil.rmtree(left, ignore_errors=True)


def _parents(out: Path) -> list[Path]:
    """Make the directories above `out`; the new ones, the deepest first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(work: Path) -> int:
    descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _refuse_existing(out: Path, overwrite: bool, mark: str) -> None:
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(f"{out} exists; choose another output or pass --overwrite")
        if out.is_symlink() or not out.is_dir():
            raise OutputError(f"{out} is not a directory; choose another output")
        if any(out.iterdir()) and not (out / mark).exists():
            only = "adapters" if mark == CONFIG else "what this command wrote"
            raise OutputError(f"{out} holds no {mark}: --overwrite replaces {only} only, choose another output")


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(inside: Path, out: Path, old: Path, overwrite: bool, mark: str) -> None:
    _refuse_existing(out, overwrite, mark)  # again: another run may have been faster
    try:
        if out.exists():
            out.rename(old)
        inside.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{out} was made by another run in the meantime; choose another output") from None
        raise
    finally:
        _give_back(old, out)
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _give_back(old: Path, out: Path) -> None:
    if old.exists() and not os.path.lexists(out):
        old.rename(out)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
