"""Adapters by path or by Hub id."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lorapack.core.names import MODEL_ID
from lorapack.errors import InputError
from lorapack.read.files import BIN, CARD, CONFIG, REPORT, SAFETENSORS, file_digests, read_json, refuse_elsewhere

if TYPE_CHECKING:
    from lorapack.core.adapter import Adapter

# what of a base model a merge reads or takes along: weights, configuration, tokenizer, code that is never run
WEIGHTS, BIN_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a model's id on the Hub."""
    return bool(MODEL_ID.fullmatch(name))


def adapter_name(source: str) -> str:
    """What a report calls an adapter: a directory's name, or the Hub id."""
    return Path(source).name if Path(source).exists() else source


def find_adapter(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of an adapter; one on the Hub is put into the Hub's own cache.

    Offline settings (``HF_HUB_OFFLINE``), ``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT`` are respected.

    Args:
        source: a directory, or ``owner/name`` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: neither a directory nor a repository within reach.
    """
    path = Path(source)
    if not _on_hub(path):
        if revision is not None:
            raise InputError(f"--revision is for adapters on the Hub; {source} is a path")
        return path
    found = _snapshot(str(source), revision, [CONFIG, SAFETENSORS, BIN, REPORT, CARD])
    _check_files(found, str(source))
    return found


def find_adapter_config(source: str | Path) -> Path:
    """The `adapter_config.json` of an adapter, of which nothing else is fetched.

    Raises:
        InputError: neither a directory nor a repository within reach.
    """
    if not _on_hub(Path(source)):
        return Path(source) / CONFIG
    return _snapshot(str(source), None, [CONFIG]) / CONFIG


def find_base(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of a base model; one on the Hub is put into the Hub's own cache.

    Args:
        source: a directory, or ``owner/name`` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: neither a directory nor a repository within reach.
    """
    path = Path(source)
    if path.exists():
        return path
    refuse_elsewhere(str(source))
    found = _snapshot(str(source), revision, [WEIGHTS, "model.safetensors.index.json", *TEXTS])
    if not any(found.glob(WEIGHTS)):
        found = _snapshot(str(source), revision, [BIN_WEIGHTS, "pytorch_model.bin.index.json", *TEXTS])
    return found


def find_base_config(source: str | Path, revision: str | None = None) -> Path:
    """The `config.json` of a base model, of which nothing else is needed.

    Raises:
        InputError: neither a directory nor a repository within reach, or it has none.
    """
    place = Path(source)
    if not place.exists():
        if not is_hub_id(str(source)):
            raise InputError(f"the base model {source} does not exist")
        place = _snapshot(str(source), revision, ["config.json"])
    if not (place / "config.json").is_file():
        raise InputError(f"{source} has no config.json: it is not a model directory")
    return place / "config.json"


def _on_hub(source: Path) -> bool:
    """Whether an adapter is meant that lies on the Hub: nothing here has this name, and it has an owner."""
    return not source.exists() and _ID.fullmatch(str(source)) is not None


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    from lorapack.ship.retry import persist

    def download() -> str:
        try:
            return snapshot_download(source, revision=revision, allow_patterns=patterns)
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                raise InputError(
                    f"{source} is no directory, and not in the Hub cache while the Hub is out of reach"
                ) from None
            raise

    try:
        return Path(persist(download, source, tries=3))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} is no directory, and the Hub does not give it out ({reason[:160]})") from None


def _check_files(directory: Path, source: str) -> None:
    """Compare the files that came with the digests in lorapack's report, where there is one."""
    if not (directory / REPORT).exists():
        return
    report = read_json(directory / REPORT)
    wanted, found = report.get("files"), file_digests(directory)
    if "lorapack" not in report or not isinstance(wanted, dict):
        return
    for name, sha in wanted.items():
        if found.get(name) != sha:
            raise InputError(
                f"{source}: {name} is not the file that {REPORT} was written with: damaged, or changed by hand"
            )


def pull_adapter(repo: str, out: str | Path, revision: str | None = None, *, overwrite: bool = False) -> list[str]:
    """Copy an adapter from the Hub into a new directory, compared with its report and read.

    Args:
        repo: ``owner/name``.
        out: the directory to make.
        revision: branch, tag or commit.
        overwrite: replace an existing directory.

    Returns:
        The files.

    Raises:
        InputError: it is not within reach, damaged, or no adapter.
    """
    from huggingface_hub import HfApi

    from lorapack.read.adapter import read_adapter as read_directory
    from lorapack.ship.retry import persist
    from lorapack.write import new_directory

    if Path(repo).exists() or not _ID.fullmatch(repo):
        raise InputError(f"{repo!r} is no Hub id; write owner/name")
    with new_directory(out, overwrite=overwrite) as directory:
        # by its commit: for a branch the client gives out an older one from its cache when the Hub is busy
        head = persist(lambda: HfApi().repo_info(repo, revision=revision).sha, repo)
        source = find_adapter(repo, head)
        for name in (CONFIG, SAFETENSORS, BIN, REPORT, CARD):
            if (source / name).exists():
                shutil.copyfile(source / name, directory / name)
        _check_files(directory, repo)
        read_directory(directory)
        return sorted(path.name for path in directory.iterdir())


def read_adapter(source: str | Path, revision: str | None = None) -> "Adapter":
    """Read an adapter from a directory or from the Hub.

    Args:
        source: a directory with PEFT's or the compact format, or ``owner/name`` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: what is missing, damaged or not supported, in one line.
    """
    from lorapack.read.adapter import read_adapter as read_directory

    return read_directory(find_adapter(source, revision))
