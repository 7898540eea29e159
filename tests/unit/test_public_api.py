"""`from deep_rlhf import …`: every name can be imported, and type checkers know it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deep_rlhf

ROOT = Path(__file__).resolve().parents[2]
# As a user's mypy, but of the libraries only what our signatures need: half of the time.
SETTINGS = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
warn_unused_ignores = True

[mypy-transformers.models.*,transformers.integrations.*,transformers.pipelines.*,transformers.generation.*]
follow_imports = skip
[mypy-transformers.quantizers.*,transformers.data.*,transformers.distributed.*,transformers.loss.*,transformers.cli.*]
follow_imports = skip
[mypy-transformers.modeling_utils,transformers.tokenization_utils_base,transformers.trainer]
follow_imports = skip
[mypy-datasets.*,peft.*,accelerate.*,matplotlib.*,pyarrow.*]
follow_imports = skip
"""


@pytest.mark.parametrize("name", deep_rlhf.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(deep_rlhf, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="PPOTrainr"):
        _ = deep_rlhf.PPOTrainr


@pytest.mark.processes
def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import sys, deep_rlhf; print({'torch', 'transformers', 'sqlalchemy', 'fastapi'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"


@pytest.mark.processes
def test_type_checkers_know_every_name_and_find_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    names = sorted(deep_rlhf.__all__)
    (tmp_path / "names.py").write_text("import deep_rlhf\n" + "".join(f"reveal_type(deep_rlhf.{n})\n" for n in names))
    arguments = ["--config-file", tmp_path / "mypy.ini", "--cache-dir", ROOT / ".mypy_cache" / "public_api"]
    script = Path(__file__).with_name("user_script.py")
    finished = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, script, tmp_path / "names.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        check=False,
    )
    assert "error:" not in finished.stdout, finished.stdout
    revealed = re.findall(r'names\.py:(\d+): note: Revealed type is "(.*)"', finished.stdout)
    assert [int(line) for line, _ in revealed] == list(range(2, len(names) + 2)), finished.stdout + finished.stderr
    assert not [names[int(line) - 2] for line, kind in revealed if kind == "Any"]
