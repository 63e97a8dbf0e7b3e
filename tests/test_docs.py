"""The pages and the commands name the same options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from lorapack.cli.main import cli
from lorapack.cli.options import MethodCommand
from lorapack.plan import METHODS
from lorapack.plan.method import flag

ROOT = Path(__file__).parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "action.yml",
    ROOT / "integrations" / "gitlab.yml",
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
METHOD_OPTIONS = {flag(option) for method in METHODS.values() for option in method.options}
COMMON = {"--help", "--version"}  # click's own
OTHERS = {
    "--no-": "the form in general",
    "--factor": "of the method that docs/methods/adding.md adds",
    "--max-lora-rank": "vLLM's",
    "--lora": "llama.cpp's",
    "--large": "of benchmarks/merge.py",
    "--runs": "of the benchmarks",
    "--standalone": "torchrun's",
    "--nproc-per-node": "torchrun's",
    "--multi": "accelerate's --multi_gpu",
}


def options(command: click.Command) -> set[str]:
    """Every long option of a command and of those below it."""
    own = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    return own.union(*(options(inner) for inner in getattr(command, "commands", {}).values()))


def commands(text: str) -> list[list[str]]:
    """The lorapack commands in the blocks of a page, in words, each with its continuation lines."""
    blocks = "\n".join(block for _, block in BLOCK.findall(text)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"lorapack [a-z-]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_the_pages_exists(page):
    text = "\n".join(line for line in page.read_text().splitlines() if not re.search(r"\bpip3? install\b", line))
    known = options(cli) | METHOD_OPTIONS | COMMON | OTHERS.keys()
    assert set(OPTION.findall(text)) <= known, f"{page}: {set(OPTION.findall(text)) - known}"


def test_every_command_in_the_pages_takes_the_options_it_is_shown_with():
    seen = 0
    for page in PAGES:
        for words in commands(page.read_text()):
            words = words[words.index("--config") + 2 :] if "--config" in words else words[1:]
            assert words[0] in cli.commands, f"{page}: {words}"
            command = cli.commands[words[0]]
            known = options(command) | COMMON | (METHOD_OPTIONS if isinstance(command, MethodCommand) else set())
            given = {word.partition("=")[0] for word in words if OPTION.fullmatch(word.partition("=")[0])}
            assert given <= known, f"{page}: {shlex.join(words)}"
            seen += 1
    assert seen > 10


def test_every_option_that_exists_stands_in_the_page_of_the_command_line():
    """That page is made from the commands (another test): here that nothing is hidden or left out on the way."""
    sections = dict(re.findall(r"^## lorapack ?([a-z ]*)\n(.*?)(?=^## |\Z)", CLI_PAGE.read_text(), re.DOTALL | re.M))
    assert options(cli) - set().union(*map(options, cli.commands.values())) <= set(OPTION.findall(sections[""]))
    for name, command in cli.commands.items():
        said = {
            option for title, text in sections.items() if title.split()[:1] == [name] for option in OPTION.findall(text)
        }
        assert options(command) <= said, f"{name}: {options(command) - said}"
    for name, method in METHODS.items():
        for option in map(flag, method.options):
            assert re.search(rf"^\| `{name}` \| `{option}` \|", CLI_PAGE.read_text(), re.M), (name, option)
