"""Batch sizes of the TRL interface are those of one process: two with half of them each train as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl_processes

pytestmark = pytest.mark.processes


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    finished = subprocess.run(
        [sys.executable, *launch.split(), trl_processes.__file__, tmp_path / "model", tmp_path / "figures.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-9000:]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["processes"] == 2
    for two, one in zip(written["figures"], trl_processes.figures(str(tmp_path / "model")), strict=True):
        assert two == {name: pytest.approx(value, abs=1e-4, rel=1e-4) for name, value in one.items()}
