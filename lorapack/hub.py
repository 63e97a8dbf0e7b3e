"""Adapters by path or by Hub id."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorapack.errors import InputError
from lorapack.read.files import BIN, CONFIG, REPORT, SAFETENSORS

if TYPE_CHECKING:
    from lorapack.core.adapter import Adapter

# what of a base model a merge reads or takes along: weights, configuration, tokenizer, code that is never run
WEIGHTS, BIN_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


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
    if path.exists() or not _ID.match(str(source)):
        if revision is not None:
            raise InputError(f"--revision is for adapters on the Hub; {source} is a path")
        return path
    return _snapshot(str(source), revision, [CONFIG, SAFETENSORS, BIN, REPORT])


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
    if not _ID.match(str(source)) and not re.match(r"^\w[\w.-]*$", str(source)):  # such as gpt2
        raise InputError(f"the base model {source} does not exist; name it with --base")
    found = _snapshot(str(source), revision, [WEIGHTS, "model.safetensors.index.json", *TEXTS])
    if not any(found.glob(WEIGHTS)):
        found = _snapshot(str(source), revision, [BIN_WEIGHTS, "pytorch_model.bin.index.json", *TEXTS])
    return found


def find_base_config(source: str | Path) -> Path:
    """The base model's `config.json`; of one on the Hub that file alone is fetched.

    Raises:
        InputError: neither a directory nor a repository within reach.
    """
    path = Path(source)
    return (path if path.exists() else _snapshot(str(source), None, ["config.json"])) / "config.json"


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=patterns)
    except LocalEntryNotFoundError:
        raise InputError(f"{source} is no directory, and not in the Hub cache while the Hub is out of reach") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} is no directory, and the Hub does not give it out ({reason[:160]})") from None
    return Path(found)


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
