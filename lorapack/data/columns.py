"""Which columns of the rows mean what."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from lorapack.data.rows import Row
from lorapack.errors import InputError

Form = Literal["text", "prompt", "messages", "sentence"]

# For each role the column names it is recognised by, the first found wins.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "response", "output", "answer", "target", "summary"),
    "text": ("text", "content"),
    "sentence": ("question", "sentence", "text", "sentence1", "premise", "question1", "review", "content"),
    "sentence2": ("sentence2", "hypothesis", "question2", "sentence"),
    "label": ("label", "labels", "class", "score"),
}
ROLES = tuple(NAMES)
_HALF = re.compile(r"[\ud800-\udfff]")  # half a character, as in JSON that was cut: no tokenizer takes it


@dataclass(frozen=True)
class Example:
    """One usable row, its text by role.

    Attributes:
        row: its number in the source, from 0.
        form: ``text``; ``prompt`` (prompt and completion); ``messages`` (a chat); ``sentence`` (one
            or two sentences and a label).
        values: the texts by role; for ``messages`` the list of messages.
        label: with ``sentence`` the class (int or str) or the number to predict (float).
    """

    row: int
    form: Form
    values: Mapping[str, Any]
    label: int | float | str | None = None

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return json.dumps([self.form, dict(self.values), self.label], sort_keys=True, default=str)


@dataclass(frozen=True)
class Columns:
    """The form of the rows and the column of each role."""

    form: Form
    roles: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{role}={column}" for role, column in self.roles.items())


def detect(rows: Sequence[Row], labelled: bool, named: Mapping[str, str]) -> Columns:
    """Find the columns, by the user's word first and by their usual names second.

    Args:
        rows: at least one.
        labelled: the task is classification or regression: a sentence and a label are wanted.
        named: role to column, as given by the user.

    Raises:
        InputError: an unknown role or column, or no form fits; lists the columns there are.
    """
    present = list(dict.fromkeys(column for row in rows[:100] for column in row))
    for role, column in named.items():
        if role not in NAMES:
            raise InputError(f"--columns: {role!r} is not one of {', '.join(ROLES)}")
        if column not in present:
            raise InputError(f"--columns: the data have no column {column!r}; they have {', '.join(present)}")

    def find(role: str, but: tuple[str | None, ...] = ()) -> str | None:
        if role in named:
            return named[role]
        return next((c for c in NAMES[role] if c in present and c not in but), None)

    if labelled:
        label, sentence = find("label"), find("sentence")
        if label and sentence:
            second = find("sentence2", but=(sentence, label))
            roles = {"sentence": sentence} | ({"sentence2": second} if second else {}) | {"label": label}
            return Columns("sentence", roles)
        wanted = "a sentence and a label"
    else:
        messages = find("messages")
        if messages and (not named or "messages" in named):
            return Columns("messages", {"messages": messages})
        prompt = find("prompt")
        completion = find("completion", but=(prompt,))
        if prompt and completion and "text" not in named:
            return Columns("prompt", {"prompt": prompt, "completion": completion})
        if (text := find("text")) or (len(present) == 1 and (text := present[0])):
            return Columns("text", {"text": text})
        wanted = "text, prompt and completion, or messages"
    raise InputError(
        f"the data have the columns {', '.join(present)}, needed is {wanted}; "
        f"name them, for example --columns {'sentence=…,label=…' if labelled else 'prompt=…,completion=…'}"
    )


def examples(rows: Sequence[Row], columns: Columns) -> list[Example]:
    """The usable rows: those with a non-empty text in every role, and a label where one is needed."""
    found = []
    for number, row in enumerate(rows):
        values = {role: row.get(column) for role, column in columns.roles.items() if role != "label"}
        label = None
        if "label" in columns.roles:
            label = _label(row.get(columns.roles["label"]))
            if label is None or label == -1:  # GLUE marks unlabelled rows with -1
                continue
        if columns.form == "messages":
            usable = _is_chat(values["messages"])
        else:
            usable = all(_is_text(v) and v.strip() for v in values.values())
        if usable:
            found.append(Example(number, columns.form, values, label))
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and not _HALF.search(value)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(m, dict) and _is_text(m.get("content")) and "role" in m for m in messages)
        and messages[-1]["role"] == "assistant"
    )


def _label(value: Any) -> int | float | str | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        value = value.strip()
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        return value or None
    return value if isinstance(value, int | float) and value == value else None
