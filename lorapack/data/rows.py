"""Read rows from a file or from a dataset on the Hub."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapack.errors import InputError

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True, eq=False)
class Source:
    """A data source that has been read; it can be sent to where the file is not.

    Attributes:
        given: as it was named, for messages.
        name: what a report calls it, see `source_name`.
        rows: all of them.
    """

    given: str
    name: str
    rows: Sequence[Row]

    def __str__(self) -> str:
        return self.given


def read_source(source: str) -> Source:
    """The rows together with their names. Raises as `read_rows`."""
    return Source(source, source_name(source), read_rows(source))


def read_rows(source: str | Path) -> list[Row]:
    """All rows of a data source, as dictionaries.

    Args:
        source: a ``.jsonl``, ``.json`` (a list of objects), ``.csv`` (with a header), ``.parquet`` or
            ``.txt`` (a line is a row, empty lines are left out) file; or a dataset that the
            `datasets` library can load, written ``ID``, ``ID:SPLIT`` or ``ID:CONFIG:SPLIT``.

    Raises:
        InputError: it does not exist, is of another kind, is damaged (names the line), or is empty.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(f"{path}: {path.suffix or 'a file without ending'} is not one of {' '.join(FORMATS)}")
        try:
            rows = _READERS[path.suffix](path)
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    elif path.suffix in FORMATS:
        raise InputError(f"{path} does not exist")
    else:
        rows = _dataset(str(source))
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


def source_name(source: str) -> str:
    """What a report calls a source: a file's or directory's name without the way to it, a dataset as it was given."""
    place, colon, rest = source.partition(":")
    return f"{Path(place).name}{colon}{rest}" if Path(place).exists() else source


def _jsonl(path: Path) -> list[Row]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_object(line, f"{path} line {number}"))
    return rows


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if isinstance(value, dict) and len(lists := [v for v in value.values() if isinstance(v, list)]) == 1:
        value = lists[0]  # {"data": [...]}
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise InputError(f"{path} is not a list of JSON objects")
    return value


def _csv(path: Path) -> list[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader, rows = csv.DictReader(file), []
        try:
            for row in reader:
                if None in row:
                    raise InputError(
                        f"{path} line {reader.line_num} has more fields than the header: quote fields that hold a comma"
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise InputError(f"{path} is not CSV ({error})") from None
    return rows


def _txt(path: Path) -> list[Row]:
    return [{"text": line.rstrip()} for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'lorapack[datasets]'") from None
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not Parquet ({str(error).splitlines()[0]})") from None
    return rows


def _dataset(source: str) -> list[Row]:
    name, *rest = source.split(":")
    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists():
        raise InputError(f"{source} does not exist")
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source} is no file ({' '.join(FORMATS)}); to load it as a dataset: pip install 'lorapack[datasets]'"
        ) from None
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    try:
        return [dict(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # the library raises its own, the Hub's and pyarrow's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} is neither a file nor a dataset that can be loaded ({reason[:160]})") from None


def _object(text: str, where: str) -> Row:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object")
    return value


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}
