"""This project's side of the side-by-side benchmark, on tiny jobs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from grids import slow_but
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


import speed
from side_by_side.jobs import JOBS
from side_by_side.workplace import kept_lengths, prepare

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("name", slow_but(["ppo-bf16"], ["ppo-separate-fp32", "ppo-bf16"]))
def test_ppo(name: str, tmp_path: Path) -> None:
    job = JOBS[name].tiny()
    prepare(job, tmp_path, real=False)
    run = speed.run_project(tmp_path)
    prompts = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(json.loads((tmp_path / "prompts.json").read_text()))
    assert run["work"] == {
        "prompts": job.episodes,
        "prompt_tokens": sum(map(len, prompts.input_ids)),
        "response_tokens": job.episodes * job.response_tokens,
        "optimizer_steps": job.updates * job.ppo_epochs,
        "trained_responses": job.episodes * job.ppo_epochs,
    }
    assert run["precision"] == job.precision
    assert run["seconds"] > 0
    assert run["peak_gb"] >= run["start_gb"] > 0.1


@pytest.mark.parametrize("name", slow_but(["gpt2-fp32"], ["distilbert-bf16", "gpt2-fp32"]))
def test_reward(name: str, tmp_path: Path) -> None:
    job = JOBS[name].tiny()
    prepare(job, tmp_path, real=False)
    run = speed.run_project(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    kept = kept_lengths(json.loads((tmp_path / "pairs.json").read_text()), tokenizer, job.max_length)
    assert 0 < len(kept) < job.pairs  # some are too long
    assert run["work"] == {
        "pairs_kept": len(kept),
        "tokens": sum(2 * pair.prefix + pair.rest_a + pair.rest_b for pair in kept),
        "optimizer_steps": -(-len(kept) // job.batch_size),
    }
    assert run["precision"] == job.precision
    assert 0.3 < run["first_loss"] < 1.5


@pytest.mark.slow
def test_the_table_of_kernels() -> None:
    """In a process of its own, since the number of threads would stay what it sets."""
    command = [sys.executable, str(Path(speed.__file__).with_name("fast_kernels.py")), "--quick"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, *rows = [line.strip("|").split("|") for line in printed.splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert len(row) == len(head)
        assert all(float(figure) >= 0 for figure in row[1:])
