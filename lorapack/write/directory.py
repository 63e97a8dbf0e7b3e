"""An output directory that appears whole or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lorapack.errors import OutputError
from lorapack.read.files import CONFIG

_MARK = ".lorapack-"  # .OUT.lorapack-XXXX beside OUT, with a lock file that dies with its process
_LOCK = ".lock"
_OLD = "old"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


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
    with _parents(out), workplace(out) as work:
        inside = work / "out"
        try:
            inside.mkdir(mode=0o777)
            yield inside
            for path in [*inside.rglob("*"), inside]:
                flush(path)
            _publish(inside, out, work / _OLD, overwrite, mark)
        except (OSError, SafetensorError) as error:
            if reason := refusal(error):
                raise OutputError(f"{out} cannot be written: {reason}") from None
            raise


def refusal(error: OSError | SafetensorError) -> str | None:
    """What the system said when something could not be written; None where the error is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror if error.errno in _DISK else None
    said = str(error)  # safetensors wraps the system's error in text; of numpy's `tofile` this is all that is known
    if isinstance(error, SafetensorError):
        return said if "I/O error" in said else None
    return f"the disk took less than it was given ({said})" if "requested and" in said else None


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A directory beside `out` for what is to become it, locked, gone at the end.

    Raises:
        OutputError: it cannot be made; one line.
    """
    work = lock = None
    try:
        try:
            work, lock = _claimed(out)
        except OSError as error:
            raise OutputError(f"{out} cannot be made: {error.strerror}") from None
        yield work
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
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


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the directories above `out`; those of them that stay empty are removed at the end."""
    try:
        missing = [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}") from None
    try:
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _claimed(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and its lock; another one where a sweep took it before it was locked."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}{_MARK}", dir=out.parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = _locked(work)
            if os.fstat(lock).st_nlink:
                return work, lock
            os.close(lock)


def _locked(work: Path) -> int:
    descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
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


def flush(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk.

    Raises:
        OSError: the disk did not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(inside: Path, out: Path, old: Path, overwrite: bool, mark: str) -> None:
    _refuse_existing(out, overwrite, mark)  # again: another run may have been faster
    try:
        if overwrite and out.exists():
            out.rename(old)
        inside.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{out} was made by another run in the meantime; choose another output") from None
        raise
    finally:
        _give_back(old, out)
    flush(out.parent)


def _give_back(old: Path, out: Path) -> None:
    if old.exists() and not os.path.lexists(out):
        old.rename(out)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
