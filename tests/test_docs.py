"""The pages and the commands name the same options, and README's Python runs."""

import json
import re
import shlex
import subprocess
import sys
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
    "--step": "of benchmarks/full_disk.py",
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


def test_the_readmes_python_is_a_program_that_runs(tmp_path):
    """All blocks in their order, as a reader would type them, in a folder with what they name."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "stories260k").symlink_to(ROOT / "fixtures" / "stories260k")  # as the adapter names its base
    rows = (ROOT / "fixtures" / "tinyshakespeare" / "calibration.jsonl").read_text().splitlines()[:40]
    short = [json.dumps({"text": json.loads(row)["text"][:40]}) for row in rows]
    (tmp_path / "calibration.jsonl").write_text("\n".join(short))
    blocks = [text for language, text in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    assert len(blocks) == 3
    base = "from transformers import AutoModelForCausalLM\nbase = AutoModelForCausalLM.from_pretrained('stories260k')\n"
    shared = base + (
        "model = PeftModel.from_pretrained(base, 'halved')\n"
        "print(len({id(m.weight) for n, m in model.named_modules() if n.endswith('up_proj.lora_A.default')}))"
    )
    program = "\n".join([*blocks[:2], base, blocks[2], shared])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "smaller" / "report.json").exists()
    assert int(done.stdout.split()[-1]) < 5  # of five layers: some hold one and the same parameter
