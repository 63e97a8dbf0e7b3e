"""`lorapack.toml`: defaults for the options of the commands. What may stand in it, the commands themselves say."""

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from lorapack.cli.options import MethodCommand
from lorapack.cli.say import say
from lorapack.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN, PROJECT = "lorapack.toml", "pyproject.toml"
NEVER = {"trust-remote-code": "a file must not decide that code is run; give it on the command line"}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: 'text in quotes, like "…"'}


@dataclass(frozen=True)
class Config:
    """A file that was read and not yet checked.

    Attributes:
        where: what to call it in messages.
        tables: its tables, by the name of the command.
    """

    where: str
    tables: Mapping[str, Any]


def find_config(file: str | None = None) -> Config | None:
    """The file given, else `lorapack.toml`, else ``[tool.lorapack]`` of `pyproject.toml`, both of this directory.

    Raises:
        InputError: it cannot be read, or is no TOML.
    """
    if file is not None:
        return _read(Path(file)) or Config(file, {})
    here = [Path(name) for name in (OWN, PROJECT) if Path(name).is_file()]
    return next((found for found in map(_read, here) if found is not None), None)


def defaults(config: Config, group: click.Group, methods_of: Collection[str]) -> dict[str, dict[str, Any]]:
    """The file as click's ``default_map``: command to parameter to value.

    Options of a method stand in a table of their own, ``[compress.rank]``, and stay one: method to option
    to text.

    Args:
        config: the file.
        group: the commands; their options are what may stand in it.
        methods_of: the commands of which the tables of methods are checked too; that imports the methods.

    Raises:
        InputError: an unknown command or option, or a value it does not take; names the file, the key and the
            nearest known name.
    """
    return {
        name: _defaults(config, name, table, group, deep=name in methods_of) for name, table in config.tables.items()
    }


def _read(path: Path) -> Config | None:
    """None where a `pyproject.toml` has no ``[tool.lorapack]``."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"{path} is no TOML: {error}") from None
    if path.name != PROJECT:
        return Config(str(path), found)
    tables = found.get("tool", {}).get("lorapack")
    return None if tables is None else Config(f"{path} [tool.lorapack]", tables)


def _defaults(config: Config, name: str, table: Any, group: click.Group, deep: bool) -> dict[str, Any]:
    command = group.commands.get(name)
    commands = [each for each, found in group.commands.items() if options_of(found)]
    if command is None or name not in commands:
        if not isinstance(table, dict):
            raise InputError(f"{config.where}: {name} stands in no table; write it under its command, like [compress]")
        raise InputError(f"{config.where}: [{name}] is no command with options{_nearest(name, commands)}")
    if not isinstance(table, dict):
        raise InputError(f"{config.where}: {name} is a command: write [{name}] and its options below")
    options, found = options_of(command), {}
    for key, value in table.items():
        where = f"{config.where}: {name}.{key}"
        if isinstance(value, dict) and isinstance(command, MethodCommand):
            found[key] = _method(where, key, value, options) if deep else value
        elif key in NEVER:
            raise InputError(f"{where}: {NEVER[key]}")
        elif key in options:
            found[str(options[key].name)] = _value(where, command, options[key], value)
        else:
            hint = f"; options of a method stand in its table, like [{name}.rank]"
            more = hint if isinstance(command, MethodCommand) else ""
            raise InputError(f"{where} is no option of {name}{_nearest(key, options)}{more}")
    return found


def options_of(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their long names, without the dashes."""
    return {max(o.opts, key=len).lstrip("-"): o for o in command.params if isinstance(o, click.Option)}


def _value(where: str, command: click.Command, option: click.Option, value: Any) -> Any:
    """The value as the option takes it: of its type, and by its own checks."""
    values = value if option.multiple else [value]
    if not isinstance(values, list):
        raise InputError(f'{where}: {value!r} is no list, like ["…", "…"]')
    for each in values:
        _refuse_other(where, _kind(option), each)
    try:
        option.process_value(click.Context(command), value)
    except (click.BadParameter, InputError) as error:
        said = error.message if isinstance(error, click.BadParameter) else str(error)
        raise InputError(f"{where}: {said.rstrip('.')}") from None
    return value


def _method(where: str, name: str, table: Mapping[str, Any], options: Iterable[str]) -> dict[str, str]:
    from lorapack.plan import METHODS

    if name not in METHODS:
        raise InputError(f"{where} is no method{_nearest(name, [*METHODS, *options])}")
    known = {option.replace("_", "-"): found for option, found in METHODS[name].options.items()}
    said = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(f"{where}.{key} is no option of {name}{_nearest(key, known)}")
        _refuse_other(f"{where}.{key}", known[key].kind, value)
        said[key.replace("-", "_")] = text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            known[key].parse(f"{where}.{key}:", text)
        except InputError as error:
            raise InputError(str(error)) from None
    return said


def _kind(option: click.Option) -> type:
    types = {click.types.BoolParamType: bool, click.types.IntParamType: int, click.types.FloatParamType: float}
    return next((kind for each, kind in types.items() if isinstance(option.type, each)), str)


def _refuse_other(where: str, kind: type, value: Any) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: {value!r} is not {KINDS[kind]}")


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(word.replace("_", "-"), names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


@click.group("config")
def config_group() -> None:
    """Defaults for options in lorapack.toml, or in [tool.lorapack] of pyproject.toml."""


@config_group.command()
@click.argument("file", metavar="[FILE]", required=False)
@click.pass_context
def check(ctx: click.Context, file: str | None) -> None:
    """Check FILE, or the one in force here: each table a command, each key an option.

    \b
    Example:
      lorapack config check
    """
    root = ctx.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    found = find_config(file or root.params["config"])
    if found is None:
        raise InputError(f"there is no {OWN} here, and no [tool.lorapack] in {PROJECT}")
    tables = defaults(found, group, methods_of=group.commands)
    said = ", ".join(f"{name} {len(table)}" for name, table in tables.items())
    say(f"{found.where} is good: {said or 'nothing set'}")
