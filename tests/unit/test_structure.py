"""The shape of the code base: no import cycles, small packages, small files, small functions."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import networkx
import pytest

grimp = pytest.importorskip("grimp", reason="comes with import-linter, of the extra dev")

SOURCE = Path(__file__).resolve().parents[2] / "src"
MOST_MODULES = 13  # in a package, not counting those of its sub-packages
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80
# Exceptions, each with its own limit; a file or function listed here gives the reason in its docstring.
LARGE_PACKAGES = {"deep_rlhf.cli": 16, "deep_rlhf.models": 14}  # one module per command; checks of models apart
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

FILES = {path.relative_to(SOURCE).as_posix(): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}


@pytest.fixture(scope="module")
def graph() -> Any:
    """All imports, also those inside functions, but for those that only type checkers see."""
    return grimp.build_graph("deep_rlhf", exclude_type_checking_imports=True, cache_dir=None)


def test_no_two_modules_import_each_other(graph: Any) -> None:
    imports = networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )
    assert [sorted(cycle) for cycle in networkx.strongly_connected_components(imports) if len(cycle) > 1] == []


def test_no_package_has_more_than_about_a_dozen_modules(graph: Any) -> None:
    modules = Counter(name.rpartition(".")[0] for name in graph.modules if not graph.find_children(name))
    too_many = {name: count for name, count in modules.items() if count > LARGE_PACKAGES.get(name, MOST_MODULES)}
    assert too_many == {}


def test_no_file_is_too_long() -> None:
    lines = {name: text.count("\n") for name, text in FILES.items()}
    assert {name: n for name, n in lines.items() if n > LONG_FILES.get(name, MOST_LINES_OF_A_FILE)} == {}


def test_no_function_is_too_long() -> None:
    too_long = {}
    for name, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                key, lines = f"{name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1
                if lines > LONG_FUNCTIONS.get(key, MOST_LINES_OF_A_FUNCTION):
                    too_long[key] = lines
    assert too_long == {}
