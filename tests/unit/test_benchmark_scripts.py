"""Every benchmark answers --help instead of starting a run of minutes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text())
PARSERS = {"ArgumentParser", "workplace_and_result"}  # the second is the parser of the sides of a job


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_parses_its_arguments_before_it_does_anything(path: Path) -> None:
    (main,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "main")
    calls = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(main) if isinstance(node, ast.Call)}
    assert calls & PARSERS


def test_help_is_printed() -> None:
    command = [sys.executable, str(BENCHMARKS / "demo_seeds.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: demo_seeds.py")
    assert "make bars" in done.stdout
