"""Imports never point upwards: jaxmodels <- train <- analysis <- configs (architecture.md section 2)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("jaxmodels", "train", "analysis", "configs")  # from below to above
COMPOSITION_ROOT = Path("jaxmodels/cli.py")


def imported(source: str) -> set[str]:
    """Top-level packages that a source file imports, inside functions too, relative imports left out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def upward(room: str, source: str) -> set[str]:
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests", "benchmarks"}
    return imported(source) & above


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_points_upwards(room):
    files = [path for path in (ROOT / room).rglob("*.py") if path.relative_to(ROOT) != COMPOSITION_ROOT]
    assert files, f"{room}/ holds no Python files"
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := upward(room, path.read_text()))}
    assert not wrong


def test_the_check_sees_upward_imports():
    assert upward("jaxmodels", "def f():\n    from train.runtime import files") == {"train"}
    assert upward("train", "import analysis.atlas as a, os") == {"analysis"}
    assert upward("analysis", "from train.data.sources import where\nfrom . import report") == set()


def test_the_command_imports_upwards_only_inside_functions():
    tree = ast.parse((ROOT / COMPOSITION_ROOT).read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert not upward("jaxmodels", ast.unparse(top))


def test_no_other_source_folder():
    allowed = {*ROOMS, "tests", "benchmarks", "docs"}
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    assert {name for name in folders if not name.startswith((".", "runs", "build"))} <= allowed
