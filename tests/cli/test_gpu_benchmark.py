"""The GPU's benchmark at its smallest size, without a GPU: the same code, and a table that says "not measured"."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from facts import assert_line_names, assert_names

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from published_sizes import whole_prompts
from side_by_side.jobs import read_job
from side_by_side.workplace import generated_dialogues, generated_tokenizer


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `gpu.py --smallest` writes."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu.py", "--smallest", f"--output={path}"])
        gpu.main()
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.processes
def test_every_part_but_the_peer_runs(report: dict[str, Any]) -> None:
    assert [part for part in gpu.LIMITS if "not_measured" in report[part]] == ["trl"]
    job = report["settings"]["ppo"]
    episodes = job["batch_size"] * job["updates"]
    assert report["ppo"]["work"]["response_tokens"] == episodes * job["response_tokens"]
    assert report["ppo"]["work"]["trained_responses"] == episodes * job["ppo_epochs"]
    reward = report["reward"]
    assert 0 < reward["pairs_kept"] < reward["pairs_read"] == report["settings"]["reward"]["pairs"]
    assert reward["share_of_the_epoch"] == 1.0
    assert reward["seconds"] == reward["seconds_measured"] > 0
    assert reward["precision"] == "torch.bfloat16"
    assert 0 <= report["gap"]["sampler_logprob_gap"] < 0.1
    assert report["trl"] == {"not_measured": "no --peer was given"}


@pytest.mark.slow
@pytest.mark.processes
def test_what_needs_a_gpu_is_not_measured(report: dict[str, Any]) -> None:
    assert set(report["figures"].values()) == {"not measured"}
    rows = [line for line in gpu.table(report).splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(gpu.FIGURES)
    assert all("| not measured |" in row for row in rows)


def test_an_epoch_that_is_stopped_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = gpu.REWARD_JOB.tiny()
    gpu.prepare(tmp_path, gpu.PPO_JOB.tiny(), job, real=False)
    monkeypatch.setattr(gpu, "EPOCH_SECONDS", 0)
    row = gpu.reward_epoch(tmp_path / "reward")
    assert row["share_of_the_epoch"] == job.batch_size / row["pairs_kept"] < 1  # one step
    assert row["seconds"] == pytest.approx(row["seconds_measured"] / row["share_of_the_epoch"])
    assert read_job(tmp_path / "reward") == job


def measured_report() -> dict[str, Any]:
    """As an H200 might write it: TRL is ten times slower and takes eight times as much."""
    side = {"precision": "bf16", "work": {"response_tokens": 90_000}}
    return {
        "smallest": False,
        "machine": {"gpu": "NVIDIA H200", "cpu": "a CPU"},
        "torch": "2.13.0",
        "data": "hh-rlhf",
        "seconds": 400.0,
        "settings": {"ppo": {"precision": "bf16"}},
        "reward": {
            "seconds": 100.0,
            "seconds_tokenising": 30.0,
            "share_of_the_epoch": 1.0,
            "pairs_kept": 160_000,
            "operations": 2 * 10**16,
            "matrix_rate": 8e14,
        },
        "ppo": side | {"seconds": 9.0, "gpu_peak_gb": 10.0},
        "trl": side | {"seconds": 90.0, "gpu_peak_gb": 80.0},
        "gap": {"sampler_logprob_gap": 0.002},
    }


def test_figures_and_table_of_a_gpu() -> None:
    report = measured_report()
    report["figures"] = gpu.figures(report)
    assert report["figures"] == pytest.approx(
        {
            "epoch_seconds": 100,
            "tokenising_seconds": 30,
            "pairs_per_second": 1600,
            "share": 0.25,
            "tokens_per_second": 10_000,
            "speed_ratio": 10,
            "peak_gb": 10,
            "memory_ratio": 8,
            "sampler_logprob_gap": 0.002,
        }
    )
    text = gpu.table(report)
    assert "new tokens/s | 10,000 |" in text
    assert "| speed relative to TRL | 10 | ≥ 5 |" in text
    assert "not measured" not in text


def test_what_failed_or_differs_is_named_and_the_rest_kept() -> None:
    report = measured_report()
    report["trl"]["work"] = {"response_tokens": 80_000}
    report["gap"] = {"not_measured": "it did not end within 40 s"}
    report["reward"]["share_of_the_epoch"] = 0.5
    report["figures"] = gpu.figures(report)
    named = {name for name, value in report["figures"].items() if value == "not measured"}
    assert named == {"speed_ratio", "memory_ratio", "sampler_logprob_gap"}
    text = gpu.table(report)
    assert_line_names(text, "gap", "40 s")
    assert "response_tokens 80000 and 90000" in text
    assert_line_names(text, "extrapolated", "50%")


def test_a_part_that_fails_or_takes_too_long_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.run("gap", [sys.executable, "-c", "raise SystemExit('no trl')"], tmp_path) == {"not_measured": "no trl"}
    monkeypatch.setitem(gpu.LIMITS, "gap", 1)
    slow = gpu.run("gap", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    assert slow.keys() == {"not_measured"}
    assert_names(slow["not_measured"], "1 s")


def test_all_parts_together_take_less_than_nine_minutes() -> None:
    assert sum(gpu.LIMITS.values()) + 30 < 9 * 60


def test_whole_prompts_reach_the_longest_and_repeat_when_there_are_few() -> None:
    texts = [prompt for prompt, _, _ in generated_dialogues()[:40]]
    tokenizer = generated_tokenizer(generated_dialogues(), 700)
    longest = sorted(map(len, tokenizer(texts).input_ids))[20]
    prompts, lengths = whole_prompts(texts, tokenizer, longest=longest, count=100)
    assert len(prompts) == len(lengths) == 100
    assert lengths[-1] == longest
    assert lengths == [len(ids) for ids in tokenizer(prompts).input_ids]
    assert set(prompts) == {text for text in texts if len(tokenizer(text).input_ids) <= longest}
