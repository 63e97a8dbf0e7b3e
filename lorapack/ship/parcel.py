"""What of a directory goes to the Hub: checked, in the format asked for, with a report that is for these bytes."""

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorapack.core.adapter import Adapter, digest
from lorapack.core.report import Report, from_json, to_json
from lorapack.errors import InputError
from lorapack.hub import is_hub_id
from lorapack.merge.base import refuse_foreign
from lorapack.read.adapter import read_adapter
from lorapack.read.files import CARD, CONFIG, REPORT, SAFETENSORS, file_digests, read_json, read_text
from lorapack.write.adapter import put_adapter
from lorapack.write.card import card_metadata, card_part

Format = Literal["compact", "peft"]


@dataclass(frozen=True)
class Item:
    """One file to send.

    Attributes:
        source: its bytes, or where they lie.
        size: in bytes.
        sha256, sha1: the digests by which the Hub's large file storage and Git know it.
    """

    source: Path | bytes
    size: int
    sha256: str
    sha1: str

    def is_at(self, found: tuple[int, str] | None) -> bool:
        """Whether the Hub's size and digest are those of these bytes."""
        return found in ((self.size, self.sha256), (self.size, self.sha1))


def item(source: Path | bytes) -> Item:
    """Measure and digest a file, block by block."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            sha1.update(block)
    return Item(source, size, sha256.hexdigest(), sha1.hexdigest())


@dataclass(frozen=True)
class Parcel:
    """Files to send, and of what the card is made.

    Attributes:
        directory: holds exactly the files that are sent, but for the card.
        items: those files, by name.
        metadata, part: lorapack's share of the card.
        card: the directory's own, as it stands; empty where there is none.
        left: what of the directory is not sent.
    """

    directory: Path
    items: Mapping[str, Item]
    metadata: dict[str, Any]
    part: str
    card: str
    left: tuple[str, ...]


@contextlib.contextmanager
def packed(directory: str | Path, repo: str, form: Format = "compact", base: str | None = None) -> Iterator[Parcel]:
    """Check a directory and lay out what of it is sent, in a temporary place; the directory is not changed.

    Args:
        directory: what `lorapack compress` wrote.
        repo: the Hub id it will have, for the card.
        form: as it is, or expanded to plain PEFT LoRA.
        base: the Hub id of the base model, instead of what the adapter says.

    Raises:
        InputError: the adapter does not read, the report is missing or not for these bytes, or the base
            model is no Hub id; or the card is a link to somewhere else.
    """
    directory = Path(directory)
    adapter = read_adapter(directory)
    report = _report(directory, adapter)
    base = _base(base, adapter, report)
    report = replace(report, base_model=base, run=_local_names(report.run), data=_local_names(report.data))
    refuse_foreign(directory / CARD)
    card = read_text(directory / CARD) if (directory / CARD).exists() else ""
    with tempfile.TemporaryDirectory(prefix="lorapack-push-") as place:
        parcel = Path(place)
        adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": base})
        if form == "peft":
            put_adapter(adapter, parcel, expand=True)
        else:
            _copy(directory, parcel, base)
        (parcel / REPORT).write_text(to_json(replace(report, files=file_digests(parcel))), encoding="utf-8")
        items = {path.name: item(path) for path in sorted(parcel.iterdir())}
        yield Parcel(
            parcel,
            items,
            card_metadata(report),
            card_part(adapter, report, place=repo, expanded=form == "peft"),
            card,
            tuple(sorted(path.name for path in directory.iterdir() if path.name not in {*items, CARD})),
        )


def _copy(directory: Path, parcel: Path, base: str) -> None:
    """The bytes as they are; the configuration alone is written anew where it names another base model."""
    for name in (CONFIG, SAFETENSORS):
        if not (directory / name).is_file():
            raise InputError(f"{directory} has no {name}: write the adapter with lorapack first")
        shutil.copyfile(directory / name, parcel / name)
    config = read_json(parcel / CONFIG)
    if config.get("base_model_name_or_path") != base:
        config["base_model_name_or_path"] = base
        (parcel / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _local_names(value: Any) -> Any:
    """The same with every path from the root or from home as its last name: the way to it is this machine's own."""
    if isinstance(value, Mapping):
        return {key: _local_names(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_local_names(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _report(directory: Path, adapter: Adapter) -> Report:
    path = directory / REPORT
    if not path.exists():
        raise InputError(
            f"{directory} has no {REPORT}, which says what was measured: push what `lorapack compress` or "
            "`lorapack recover` wrote, not what was expanded (--format peft expands on the way)"
        )
    report = from_json(read_text(path), str(path))
    found = file_digests(directory)
    if other := [name for name, sha in report.files.items() if found.get(name) != sha]:
        raise InputError(f"{path} is not the report of these bytes: {other[0]} is not the file it was written with")
    if report.adapter["compressed"] != digest(adapter):
        raise InputError(f"{path} is not the report of these bytes: it was written with other tensors")
    return report


def _base(given: str | None, adapter: Adapter, report: Report) -> str:
    base = given or adapter.base_model or report.base_model
    if not base:
        raise InputError("the adapter does not name its base model: give its Hub id with --base")
    if not is_hub_id(base) or Path(base).exists():
        raise InputError(f"the base model {base} is a path, which nobody else has: give its Hub id with --base")
    return base
