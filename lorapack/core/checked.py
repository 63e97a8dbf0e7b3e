"""Values that come from outside, checked field by field against a dataclass.

pydantic does that. A PEFT configuration nearly always has the types it should have, which is seen without; importing
pydantic takes as long as a tenth of a merge.
"""

import contextlib
import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorapack.errors import InputError

if TYPE_CHECKING:
    import pydantic

Value = TypeVar("Value")
MOST = 300_000  # entries of a file; each that is wrong takes some 400 bytes until all are looked at
MOST_SHOWN = 1000


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
    return _validated(kind, value, "forbid", where)


def parse_value(kind: type[Value], value: Mapping[str, Any], where: str) -> Value:
    """Like `parse` for JSON already read; fields that `kind` lacks are ignored."""
    try:
        return _plain(kind, value)
    except (TypeError, OverflowError):
        return _validated(kind, dict(value), "ignore", where)


def _validated(kind: type[Value], value: Any, extra: Literal["forbid", "ignore"], where: str) -> Value:
    if _entries(value) > MOST:
        raise InputError(f"{where}: more than {MOST:,} entries, those of some 30,000 modules; nothing larger is read")
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_python(value, extra=extra)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


def _plain(kind: type[Value], value: Mapping[str, Any]) -> Value:
    """A dataclass of the plainest types from values of these types.

    Raises:
        TypeError, OverflowError: something else, which pydantic must look at.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _taken(value[name], hint) for name, hint in hints.items() if name in value})


def _taken(value: Any, kind: Any) -> Any:
    """The value if it is of this type, a whole number as a float where one is wanted."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in inner:
            with contextlib.suppress(TypeError):
                return _taken(value, each)
    if origin is list and type(value) is list:
        return [_taken(each, inner[0]) for each in value]
    if origin is dict and type(value) is dict:
        return {_taken(key, inner[0]): _taken(each, inner[1]) for key, each in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str, NoneType) and type(value) is kind:
        return value
    raise TypeError(f"not plainly {kind}")


def _entries(value: Any) -> int:
    """How many entries all lists and objects in a JSON value have together; counted until there are too many."""
    count, left = 0, [value] if isinstance(value, (dict, list)) else []
    while left and count <= MOST:
        inner = left.pop()
        items = list(inner.values()) if isinstance(inner, dict) else inner
        count += len(items)
        left += [item for item in items if isinstance(item, (dict, list))]
    return count


def _explain(error: "pydantic.ValidationError") -> str:
    if error.error_count() > MOST_SHOWN:  # the library would make a dictionary of each
        return f"{error.error_count():,} fields are unknown or not as they should be: it is another file, or damaged"
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    return f"{path}: {first['msg']}" if path else str(first["msg"])
