"""The shape of the house: which folder may import what, and pages that cannot drift from the code."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from lorapack.core.adapter import Adapter, Factors, Pointer
from lorapack.core.plan import check, parameters
from lorapack.core.statistics import Moments, Statistics

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lorapack"
CORE = {"errors", "core", "read", "plan", "pack", "engines", "convert", "write"}
DATA = {"data"}
MODEL = {"watch", "processes", "model", "measure", "recover", "evaluate", "verify"} | DATA
CORE_LIBRARIES = {"gguf", "numpy", "pydantic", "regex", "safetensors", "torch"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def part(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if folder(p) in CORE], ids=str)
def test_the_core_knows_no_models_and_no_network(path):
    for module in imported(path):
        top = module.split(".")[0]
        if top == "lorapack":
            assert part(module) in CORE, f"{path} imports {module}"
        else:
            assert top in sys.stdlib_module_names | CORE_LIBRARIES, f"{path} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if folder(p) in MODEL], ids=str)
def test_model_work_does_not_know_the_edges(path):
    for module in imported(path):
        if module.split(".")[0] == "lorapack":
            assert part(module) in CORE | MODEL, f"{path} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if folder(p) in DATA], ids=str)
def test_reading_data_needs_no_model(path):
    for module in imported(path):
        top = module.split(".")[0]
        assert top not in {"transformers", "peft"}, f"{path} imports {module}"
        assert top != "lorapack" or part(module) in DATA | {"errors"}, f"{path} imports {module}"


def test_the_page_of_the_command_line_is_what_the_commands_say():
    page = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == page, "run `make docs`"


def test_the_tests_that_the_page_on_reliability_names_are_there():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_method_in_the_page_on_adding_one_works_as_it_stands():
    page = (ROOT / "docs" / "methods" / "adding.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    space: dict = {}
    exec(code, space)
    torch = pytest.importorskip("torch")
    adapter = Adapter(
        {"peft_type": "LORA"},
        {"layers.0.q": Factors(torch.ones(5, 8), torch.ones(6, 5))},
        {"layers.0.q": Pointer("layers.0.q", 1.0)},
        {},
    )
    statistics = Statistics({"layers.0.q": Moments(torch.eye(5).double())}, 1.0, 1, 1, "token", {})
    plan = space["plan"](adapter, statistics)
    check(plan, adapter)
    assert parameters(plan, adapter) == 3 * (8 + 6)


def test_nothing_in_the_project_names_a_registry_host_or_a_path_of_a_machine():
    forbidden = ["pypi" + ".org", "pythonhosted" + ".org", "/" + "work/", "/" + "root/", "/" + "opt/"]
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".yml", ".json", ".log", ""}:
            made = inside[0].startswith(".") and inside[0] not in {".ci", ".github"}
            if made or inside[0] in {"build", "demo-out"} or path.name == "train.txt":
                continue
            text = path.read_text(errors="ignore")
            assert not [word for word in forbidden if word in text], path
