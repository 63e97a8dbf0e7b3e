"""Read files that may be damaged or hostile: every failure is one clear line, nothing is executed."""

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorapack.core.names import MODEL_ID
from lorapack.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, SAFETENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
REPORT, CARD = "report.json", "README.md"

# bytes of a JSON file, or of a safetensors header (some 60,000 tensors); parsed, it takes up to 27 times as much
LARGEST_JSON = 6_000_000
LFS = b"version https://git-lfs"


def read_text(path: Path) -> str:
    """A small text file.

    Raises:
        InputError: it is missing, unreadable, too large, not UTF-8, or a Git LFS pointer.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if raw.startswith(LFS):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from")
    if len(raw) > LARGEST_JSON:
        raise InputError(f"{path} is larger than {LARGEST_JSON // 1_000_000} MB: that is no configuration")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, in a directory that somebody else may have made.

    Raises:
        InputError: as `read_text`, or not a JSON object.
    """
    refuse_special(path)
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # a ValueError alone: a number of thousands of digits
        where = "nested too deep, or an endless number"
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}: {error.msg}"
        raise InputError(f"{path} is not JSON ({where})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def refuse_special(path: Path) -> None:
    """Refuse a pipe or a device in the place of a file: reading it might never end.

    Raises:
        InputError: it is one.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be read: it is no regular file")


def refuse_elsewhere(source: str) -> None:
    """Refuse a base model that is neither a directory nor an id, such as a URL: no other library is asked for it.

    Raises:
        InputError: it is.
    """
    if not Path(source).exists() and not MODEL_ID.fullmatch(source):
        raise InputError(f"the base model {source} does not exist; name it with --base")


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of an adapter's configuration and tensors, in hexadecimal, by the name of each file that is there."""
    found = {}
    for name in (CONFIG, SAFETENSORS, BIN):
        if (directory / name).is_file():
            with open(directory / name, "rb") as file:
                state = hashlib.sha256()
                while block := file.read(1 << 20):
                    state.update(block)
            found[name] = state.hexdigest()
    return found


def read_safetensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    They are copies: the library's own lie in the file, and a file that is cut off later would end the process.

    Raises:
        InputError: says whether it is cut off, has no valid header, or is an LFS pointer.
    """
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(diagnose(path, error)) from None
    _refuse_odd(tensors, path)
    return tensors, metadata


def _refuse_odd(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """torch stores floats of 8 bits and fewer, but cannot even say whether they are finite; and a complex number
    would lose half of itself where it is taken for a real one.

    Raises:
        InputError: names the tensor.
    """
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() and tensor.element_size() < 2) or tensor.is_complex():
            raise InputError(
                f"{path}: {name} is stored as {tensor.dtype}, which is not computed with: store it as float32, "
                "bfloat16 or float16"
            )


def check_header(path: Path) -> None:
    """Refuse a safetensors header that is larger than a model's, before anything reads it.

    Raises:
        InputError: it is, or it is no regular file.
        OSError: the file cannot be read.
    """
    refuse_special(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) == 8:
        (length,) = struct.unpack("<Q", start)
        if LARGEST_JSON < length <= path.stat().st_size - 8:
            raise InputError(
                f"{path} has a header of {length:,} bytes; lorapack reads up to {LARGEST_JSON:,}, "
                "which is some 60,000 tensors. Split the file"
            )


def diagnose(path: Path, error: Exception) -> str:
    """Why a safetensors file could not be read, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"{path} has a name that is not UTF-8, which the safetensors library cannot open: rename it"
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            length = path.stat().st_size
            if start.startswith(LFS):
                return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
            if len(start) < 8:
                return f"{path} has {length} bytes: it is empty or cut off. Download it again"
            (header,) = struct.unpack("<Q", start[:8])
            if header > length - 8:
                return (
                    f"{path} is cut off or no safetensors file: its header claims {header:,} bytes, "
                    f"the file has {length:,}. Download it again"
                )
            file.seek(8)
            entries = json.loads(file.read(header))
            end = 8 + header + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
            if end > length:
                return f"{path} is cut off: it has {length:,} bytes, its header wants {end:,}. Download it again"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        pass
    return f"{path} is no valid safetensors file ({str(error).splitlines()[0]})"


def read_bin(path: Path) -> dict[str, "Tensor"]:
    """All tensors of a `.bin` file written by `torch.save`; objects other than tensors are refused.

    Raises:
        InputError: unreadable, or something else than a dictionary of tensors.
    """
    import torch  # here: a merge of safetensors does without it

    refuse_special(path)
    _refuse_compressed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise InputError(
                    f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
                ) from None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} cannot be read as tensors only, nothing in it was executed ({first[:120]}). "
            "Ask its author for adapter_model.safetensors"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path} holds something else than named tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: {name} claims more numbers than the file holds")
    _refuse_odd(state, path)
    return dict(state)


def _refuse_compressed(path: Path) -> None:
    """`torch.save` stores its records as they are; compressed ones could unpack to anything.

    Raises:
        InputError: they unpack to more bytes than the file has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > path.stat().st_size:
            raise InputError(
                f"{path} is compressed, {unpacked:,} bytes unpacked, which no checkpoint is: nothing was read"
            )
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # the old format of torch.save, or damaged: its reader says so
