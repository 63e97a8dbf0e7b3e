"""Print docs/cli.md: the help of every command, as click prints it. `make docs` writes the file.

A test compares the file with this, so the page cannot drift from the commands.
"""

import click

from lorapack.cli.main import cli


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
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
        lines += [f"## lorapack {name}", "", "```text", command.get_help(inner), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
