"""Values that come from outside, checked field by field against a dataclass."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from lorapack.errors import InputError

Value = TypeVar("Value")


def parse(kind: type[Value], text: str | bytes, where: str) -> Value:
    """The JSON `text` as a `kind`: unknown, missing and ill-typed fields are refused.

    Args:
        kind: a dataclass.
        text: the JSON document.
        where: what to call it in the message.

    Raises:
        InputError: one line that names the field.
    """
    try:  # in two stages: pydantic's own would copy the whole text into every error
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: Invalid JSON: {error}") from None
    try:
        return pydantic.TypeAdapter(kind).validate_python(value, extra="forbid")
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


def parse_value(kind: type[Value], value: Mapping[str, Any], where: str) -> Value:
    """Like `parse` for JSON already read; fields that `kind` lacks are ignored."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(value), extra="ignore")
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


def _explain(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    return f"{path}: {first['msg']}" if path else str(first["msg"])
