"""From a data source to the token ids of each part."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapack.data.columns import Columns, Example, detect, examples
from lorapack.data.encode import Encoded, encode
from lorapack.data.rows import Source, read_source
from lorapack.data.split import Parts, split
from lorapack.errors import InputError


@dataclass(frozen=True)
class Reader:
    """How a base model reads rows.

    Attributes:
        tokenizer: transformers' own.
        longest: the most tokens a row may have.
        classes: of a classifier; 1 where a number is predicted; None for a language model.
        label_ids: the model's names of its classes, for labels that are words.
        vocabulary: how many tokens the model knows; None where that is not known.
    """

    tokenizer: Any
    longest: int
    classes: int | None = None
    label_ids: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Encoded rows by part, and what is to be known of them.

    Attributes:
        calibration, recovery, selection, evaluation: see `lorapack.data.split.Parts`.
        facts: JSON for the report: sources, columns, counts, and which rows went where.
    """

    calibration: list[Encoded]
    recovery: list[Encoded]
    selection: list[Encoded]
    evaluation: list[Encoded]
    facts: dict[str, Any]

    @property
    def to_learn_from(self) -> list[Encoded]:
        """The rows of the recovery and the refit: those measured on as well, by which nothing is judged."""
        return [*self.calibration, *self.recovery]


def prepare(
    reader: Reader,
    data: str | Source,
    *,
    eval_data: str | Source | None = None,
    columns: Mapping[str, str] | None = None,
    sample: str,
    seed: int,
    most_recovery: int,
) -> Prepared:
    """Read, cut into parts and tokenise.

    Args:
        reader: of the base model.
        data: see `lorapack.data.rows.read_rows`; or what has been read.
        eval_data: evaluation rows of their own; otherwise they are cut off the data.
        columns: role to column, where the usual names do not fit.
        sample: how much to calibrate on, see `lorapack.data.split.split`.
        seed: of the cut.
        most_recovery: no more rows than that are kept for the recovery.

    Raises:
        InputError: whatever is wrong with the data.
    """
    usable, found, facts = usable_rows(reader, data, columns)
    evaluation = None
    if eval_data is not None:
        evaluation, _, other = usable_rows(reader, eval_data, columns)
        facts["evaluation_source"] = other
    parts = split(usable, sample=sample, seed=seed, evaluation=evaluation)
    parts = Parts(parts.calibration, parts.recovery[:most_recovery], parts.selection, parts.evaluation)
    encoded = {
        name: encode(getattr(parts, name), reader.tokenizer, reader.longest, reader.label_ids)
        for name in ("calibration", "recovery", "selection", "evaluation")
    }
    for name, rows in encoded.items():
        if not rows and not (name == "recovery" and most_recovery == 0):
            raise InputError(f"{data}: no row of the {name} part has anything to predict; more rows are needed")
        check_labels(reader, rows, data)
    facts |= {
        "form": found.form,
        "columns": dict(found.roles),
        "seed": seed,
        "sample": sample,
        "longest": reader.longest,
        "rows_cut": sum(row.cut > 0 for rows in encoded.values() for row in rows),
        "tokens_cut": sum(row.cut for rows in encoded.values() for row in rows),
        "parts": {
            name: {
                "rows": len(encoded[name]),
                "tokens": sum(len(row.input_ids) for row in encoded[name]),
                "fingerprints": sorted(fingerprint(e) for e in getattr(parts, name)),
            }
            for name in encoded
        },
    }
    return Prepared(**encoded, facts=facts)


def prepare_evaluation(
    reader: Reader, data: str, columns: Mapping[str, str] | None = None, used: Collection[str] = ()
) -> tuple[list[Encoded], dict[str, Any]]:
    """All usable rows of a source, but for those that have been used before.

    Args:
        reader: of the base model.
        data: the source.
        columns: role to column.
        used: fingerprints of rows that may not be evaluated on.

    Raises:
        InputError: nothing is left.
    """
    usable, found, facts = usable_rows(reader, data, columns)
    unique = {e.content: e for e in reversed(usable)}
    fresh = [e for e in reversed(unique.values()) if fingerprint(e) not in used]
    if not fresh:
        raise InputError(f"{data}: every usable row was used to compress this adapter; evaluate on other data")
    rows = encode(fresh, reader.tokenizer, reader.longest, reader.label_ids)
    if not rows:
        raise InputError(f"{data}: no row has anything to predict")
    check_labels(reader, rows, data)
    facts |= {"form": found.form, "columns": dict(found.roles), "rows_used_before": len(unique) - len(fresh)}
    return rows, facts


def usable_rows(
    reader: Reader, data: str | Source, columns: Mapping[str, str] | None
) -> tuple[list[Example], Columns, dict[str, Any]]:
    source = data if isinstance(data, Source) else read_source(data)
    rows = source.rows
    found = detect(rows, reader.classes is not None, columns or {})
    usable = examples(rows, found)
    if not usable:
        raise InputError(f"{data}: none of its {len(rows)} rows is usable with the columns {found}")
    return usable, found, {"source": source.name, "rows": len(rows), "rows_unusable": len(rows) - len(usable)}


def check_labels(reader: Reader, rows: Sequence[Encoded], data: str | Source) -> None:
    """A token or label the model does not know is the user's mistake, not an index error in a kernel."""
    for row in rows:
        if reader.vocabulary is not None and max(row.input_ids, default=0) >= reader.vocabulary:
            raise InputError(
                f"{data} row {row.row}: the tokenizer makes token {max(row.input_ids)} of it and the base model knows "
                f"{reader.vocabulary}: they do not belong together"
            )
    if reader.classes is None or reader.classes == 1:
        return
    for row in rows:
        if row.labels not in range(reader.classes):
            raise InputError(
                f"{data} row {row.row}: the label {row.labels} is not one of the model's {reader.classes} classes"
            )


def fingerprint(example: Example) -> str:
    """64 bits that tell rows apart."""
    return hashlib.sha256(example.content.encode()).hexdigest()[:16]
