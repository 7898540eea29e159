"""Two processes train as one does.

Without an MPI installation `accelerate launch --num_processes 2 --cpu` starts a single process (accelerate 1.15,
`simple_launcher`), so torchrun, started by it, makes the two.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import two_processes
from facts import assert_names

pytestmark = pytest.mark.processes

SPEED_AND_MEMORY = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}


def test_two_processes_give_the_history_of_one(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> None:
    for kind in ("gpt2", "bart"):
        make_model(kind).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    launch = "-m accelerate.commands.launch --num_processes 2 --cpu --module torch.distributed.run"
    two = "--standalone --nproc_per_node 2"
    finished = subprocess.run(
        [sys.executable, *f"{launch} {two}".split(), two_processes.__file__, tmp_path, tmp_path / "histories.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-9000:]
    written = json.loads((tmp_path / "histories.json").read_text())
    assert written["processes"] == 2
    assert_names(written["refusal"], "batch_size=1", "2 processes")
    for name in two_processes.RUNS:
        expected, actual = two_processes.history(tmp_path, name), written["histories"][name]
        assert len(actual) == len(expected) == 2
        for update, (one, two) in enumerate(zip(expected, actual, strict=True)):
            assert one.keys() == two.keys()
            for metric in one.keys() - SPEED_AND_MEMORY:
                # conjugate gradient divides by small eigenvalues, and so magnifies how floats are rounded
                tolerance = 1e-5
                expected_value = pytest.approx(one[metric], abs=tolerance, rel=tolerance)
                assert two[metric] == expected_value, f"{name}, update {update}: {metric}"
