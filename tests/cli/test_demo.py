"""The demo in small: every stage runs and everything promised is written. Its bars are measured by `make bars`."""

import json
from pathlib import Path

import pytest
from transformers import pipeline

from deep_rlhf.cli.demo import DemoConfig, Scale, build_tokenizer, run_demo

SMALL = Scale(
    layers=1,
    width=32,
    corpus_texts=64,
    sft_pairs=256,
    comparisons=48,
    updates=2,
    batch_size=16,
    gold_every=1,
    held_out_prompts=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(DemoConfig(seed=1, output_dir=str(folder)), SMALL)


def test_the_summary_has_every_figure(finished: tuple[Path, dict]) -> None:
    folder, summary = finished
    written = json.loads((folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    numbers = (
        *("seconds", "gold_before", "gold_after", "win_rate", "kl", "reward_accuracy"),
        *("reward_accuracy_length_baseline", "response_tokens_before", "response_tokens_after"),
    )
    assert all(isinstance(written[name], float) for name in numbers)
    assert 0 <= written["win_rate_ci"][0] <= written["win_rate"] <= written["win_rate_ci"][1] <= 1
    assert [round_["read"] for round_ in written["comparisons"]] == [48, 48]
    assert [stage["name"] for stage in written["stages"]][3:6] == [
        *("PPO, round 1", "people compare responses, round 2", "reward model, round 2"),
    ]


def test_the_run_leaves_a_report_metrics_samples_and_models(finished: tuple[Path, dict]) -> None:
    folder, _ = finished
    report = (folder / "report.html").read_text()
    assert "Samples before and after" in report
    assert "Reward-model calibration" in report
    assert "Judge score" in report
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)  # sampled with a cache, compared without
    assert metrics[0]["gold"] == pytest.approx(json.loads((folder / "summary.json").read_text())["gold_before"])
    assert "gold" in metrics[1]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4
    assert (folder / "reward_model" / "reward_model.json").exists()
    written = pipeline("text-generation", str(folder / "model"))("\n\nHuman: How do I bake bread?", max_new_tokens=4)
    assert written[0]["generated_text"].startswith("\n\nHuman: How do I bake bread?")


def test_the_same_seed_builds_the_same_tokenizer() -> None:
    assert build_tokenizer(1).get_vocab() == build_tokenizer(1).get_vocab()
