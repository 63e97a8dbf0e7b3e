"""Print docs/cli.md: the help of every command, as click prints it. `make docs` writes the file.

A test compares the file with this, so the page cannot drift from the commands.
"""

import click

from lorapack.cli.main import cli
from lorapack.plan import METHODS
from lorapack.plan.method import flag


def page() -> str:
    lines = [
        "# The command line",
        "",
        "Made from the commands' own help by `make docs`.",
        "",
        "Exit codes: 0 done; 2 bad input, one line on standard error that says what, where and what to do, and",
        "nothing written; 3 a gate not met, one line that says which ([ci.md](ci.md)); 1 a fault of lorapack;",
        "130 interrupted.",
        "",
    ]
    context = click.Context(cli, info_name="lorapack", terminal_width=100, **cli.context_settings)
    lines += ["## lorapack", "", "```text", cli.get_help(context), "```", ""]
    for name, command in cli.commands.items():
        lines += section(name, command, context)
    return "\n".join([*lines, *methods()])


def section(name: str, command: click.Command, parent: click.Context) -> list[str]:
    """A command's help, and that of the commands below it."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    lines = [f"## {context.command_path}", "", "```text", command.get_help(context), "```", ""]
    for inner, found in getattr(command, "commands", {}).items():
        lines += section(inner, found, context)
    return lines


def methods() -> list[str]:
    """The options that methods declare."""
    lines = [
        "## Options of the methods",
        "",
        "For `compress`, `plan` and `measure`, with the `--method` that has them.",
        "",
    ]
    lines += ["| method | option | values | default |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        for option, found in method.options.items():
            values = ", ".join(found.choices) or found.kind.__name__
            lines.append(
                f"| `{name}` | `{flag(option)}` | {values} | {'–' if found.default is None else found.default} |"
            )
    return [*lines, ""]


if __name__ == "__main__":
    print(page(), end="")
