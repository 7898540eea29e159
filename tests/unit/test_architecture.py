"""docs/architecture.md names files and functions that exist, and its picture shows today's imports."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "deep_rlhf"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/.]+(?:\.py|/)(?::[\w.]+)?)`", PAGE)))


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The classes, functions and variables that the statements define, by name."""
    names: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_exists(named: str) -> None:
    path, _, name = named.partition(":")
    (found,) = [base / path for base in (SOURCE, ROOT) if (base / path).exists()]
    body = ast.parse(found.read_text(encoding="utf-8")).body if name else []
    for part in filter(None, name.split(".")):
        assert part in defined(body), f"{found} defines no {name}"
        body = getattr(defined(body)[part], "body", [])


def test_the_page_names_every_package() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    table = PAGE.partition("## Where things live")[2].partition("\n## ")[0]
    assert packages == set(re.findall(r"^\| `(\w+)/", table, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def drawer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_todays_imports(drawer: ModuleType) -> None:
    drawn = (ROOT / "docs" / "images" / "architecture.json").read_text()
    assert drawn == drawer.as_json(drawer.package_imports()), "run `make architecture`"


def test_every_package_has_a_box_with_a_text(drawer: ModuleType) -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert {part for layer in drawer.layers() for part in layer} == packages | modules
    assert drawer.CENTRES.keys() == packages
    assert all(drawer.first_sentence(part) for part in packages)


def test_a_chain_of_imports_implies_the_direct_one(drawer: ModuleType) -> None:
    imports = {"a": ["b", "c"], "b": ["c"], "c": []}
    assert drawer.is_implied(imports, "a", "c")
    assert not drawer.is_implied(imports, "a", "b")
    assert not drawer.is_implied(imports, "b", "c")
