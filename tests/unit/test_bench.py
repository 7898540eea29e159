"""Counts, checks and figures of the side-by-side benchmark; tests/cli/test_bench_project.py runs it."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel, GPT2Model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import profile_job
import speed
from side_by_side.arithmetic import PairLengths, head, ppo_operations, reward_operations, shared_prefix, trunk
from side_by_side.jobs import BARS, JOBS, PPOJob, RewardJob, read_job, write_job
from side_by_side.measure import watch
from side_by_side.table import UnequalWorkError, check_equal_work, missed, summary, table

SMALL = {"name": "ppo-fp32", "title": "", "precision": "fp32", "layers": 1, "width": 2, "heads": 1, "vocabulary": 5}


def test_operations_of_ppo_by_hand() -> None:
    job = PPOJob(**SMALL, response_tokens=3, ppo_epochs=2)
    # A prompt of 2 tokens: 4 are read before or between the 3 response tokens, and each sees itself and earlier ones.
    # trunk: 24 · 2² · 4 = 384, attention: 4 · 2 · (1 + 2 + 3 + 4) = 80; logits: 2 · 2 · 5 · 3 = 60
    # reward model: 24 · 2² · 5 + 4 · 2 · 15 = 600; training: 2 epochs · 3 · (384 + 80 + 60)
    expected = {"sampling": 524, "reference": 524, "reward model": 600, "critic": 0, "training": 3144}
    assert ppo_operations(job, [2]) == expected
    assert ppo_operations(job, [2, 2]) == {part: 2 * count for part, count in expected.items()}
    # a critic of its own reads the 4 tokens once for the values, and once and back in each epoch
    assert ppo_operations(replace(job, critic="separate"), [2]) == expected | {"critic": 7 * 464}


def test_operations_of_reward_models_by_hand() -> None:
    job = RewardJob(**SMALL, architecture="gpt2")
    pair = PairLengths(prefix=2, rest_a=1, rest_b=3)
    # 6 tokens: 24 · 2² · 6 = 576; they see 1 + 2, then 3, then 3 + 4 + 5 positions: 4 · 2 · 18 = 144
    assert reward_operations(job, [pair]) == {"training": 3 * 720}
    # sides of 3 and 5 tokens, each seeing all: 24 · 2² · 8 + 4 · 2 · (9 + 25) + 2 · (2 · 2²) = 1056
    assert reward_operations(replace(job, architecture="distilbert"), [pair]) == {"training": 3 * 1056}


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_forward_pass_is_what_pytorch_counts(tokens: int) -> None:
    """With every position attended to, as the plain models compute it."""
    job = PPOJob(**SMALL | {"layers": 3, "width": 12, "heads": 2, "vocabulary": 31})
    config = GPT2Config(n_layer=3, n_embd=12, n_head=2, vocab_size=31, attn_implementation="eager")
    ids = torch.arange(tokens).unsqueeze(0)
    assert counted(GPT2Model(config), ids) == trunk(job, tokens, tokens**2)
    assert counted(GPT2LMHeadModel(config), ids) == trunk(job, tokens, tokens**2) + head(job, tokens)


def test_an_encoder_is_what_pytorch_counts() -> None:
    job = RewardJob(**SMALL | {"layers": 3, "width": 12, "heads": 2}, architecture="distilbert")
    sizes = {"n_layers": 3, "dim": 12, "n_heads": 2, "hidden_dim": 48, "vocab_size": 31, "num_labels": 1}
    model = DistilBertForSequenceClassification(DistilBertConfig(**sizes, attn_implementation="eager"))
    sides = counted(model, torch.ones(1, 7, dtype=torch.int64)) + counted(model, torch.ones(1, 5, dtype=torch.int64))
    assert reward_operations(job, [PairLengths(4, 3, 1)])["training"] == 3 * (sides - 2 * 2 * 12)  # but for the heads


def counted(model: torch.nn.Module, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    return counter.get_total_flops()


def test_shared_prefix() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4, 5]) == PairLengths(2, 1, 2)
    assert shared_prefix([1, 2], [1, 2, 3]) == PairLengths(2, 0, 1)
    assert shared_prefix([1], [2]) == PairLengths(0, 1, 1)


def test_equal_work_passes_and_every_difference_is_named() -> None:
    run = {"precision": "fp32", "first_loss": 0.7, "work": {"pairs_kept": 30, "tokens": 999}}
    check_equal_work("fp32", run, run | {"first_loss": 0.70009})
    check_equal_work("bf16", run | {"precision": "bf16"}, run | {"precision": "bf16", "first_loss": 0.705})
    for other, named in (
        (run | {"work": {"pairs_kept": 31, "tokens": 999}}, "pairs_kept 30 and 31"),
        (run | {"work": {"pairs_kept": 30}}, "tokens 999 and None"),
        (run | {"first_loss": 0.7002}, "first loss 0.7 and 0.7002"),
        (run | {"first_loss": math.nan}, "first loss 0.7 and nan"),
        (run | {"precision": "bf16"}, "precision bf16 instead of fp32"),
    ):
        with pytest.raises(UnequalWorkError, match=named):
            check_equal_work("fp32", run, other)
        with pytest.raises(UnequalWorkError):
            check_equal_work("fp32", other, run)


def report() -> dict[str, Any]:
    """Three rounds of ppo-fp32: medians 60 and 20 s, 2.0 and 0.5 GB, 10¹² operations at up to 10¹¹ a second."""
    runs = [
        {"side": side, "seconds": seconds, "start_gb": 1.0, "peak_gb": 1.0 + memory}
        for side, all_seconds, all_memory in (
            ("trl", (60, 90, 50), (2, 2, 3)),
            ("deep_rlhf", (20, 19, 40), (0.5, 0.4, 0.6)),
        )
        for seconds, memory in zip(all_seconds, all_memory, strict=True)
    ]
    job = {
        "settings": {"title": "PPO", "precision": "fp32"},
        "unit": "episodes",
        "units": 30,
        "operations": {"sampling": 4 * 10**11, "training": 6 * 10**11},
        "matrix_rates": [9e10, 1e11, 8e10],
        "runs": runs,
        "data": "text",
        "machine": {"cpu": "a CPU", "threads": 2, "memory_gb": 8},
        "versions": {"trl": "1.12.0"},
    }
    return job | {"summary": summary(job)}


def test_medians_ratios_and_share() -> None:
    found = report()["summary"]
    assert found["per_second"] == {"trl": 0.5, "deep_rlhf": 1.5}
    assert found["speed_ratio"] == pytest.approx(3.0)
    assert found["memory_ratio"] == pytest.approx(4.0)
    assert found["share"] == pytest.approx({"trl": 1 / 6, "deep_rlhf": 0.5})


def test_the_table_names_missed_targets() -> None:
    job = report()
    assert missed("ppo-fp32", job) == ["MFU 50.0% of 60%"]
    job["summary"]["speed_ratio"], job["summary"]["memory_ratio"] = 2.49, 2.4
    assert missed("ppo-fp32", job) == ["speed 2.49 × of 2.5 ×", "memory 2.40 × less of 2.5 ×", "MFU 50.0% of 60%"]
    text = table({"ppo-fp32": report()})
    assert (
        "| PPO | fp32 | 0.50 episodes/s | 1.50 episodes/s | 3.00 × (≥ 2.5 ×) | 2.00 | 0.50 | 4.00 × less (≥ 2.5 ×) |"
        in text
    )
    assert "missed in PPO, fp32: MFU 50.0% of 60%" in text


def test_the_readme_shows_the_newest_table() -> None:
    root = Path(speed.__file__).resolve().parents[1]
    rows = table(json.loads(speed.RESULTS.read_text())).splitlines()
    shown = (root / "README.md").read_text().splitlines()
    assert [row for row in rows if row.startswith("|") and row not in shown] == []


def test_every_job_has_a_bar_and_comes_back_from_its_file(tmp_path: Path) -> None:
    assert BARS.keys() == JOBS.keys()
    for job in JOBS.values():
        write_job(job, tmp_path)
        assert read_job(tmp_path) == job


def test_watch_measures_the_peak_of_the_block_and_none_from_before() -> None:
    earlier = bytearray(400_000_000)
    del earlier
    with watch() as measured:
        block = bytearray(200_000_000)
        time.sleep(0.1)
        del block
    assert 0.15 < measured["peak_gb"] - measured["start_gb"] < 0.3
    assert measured["seconds"] > 0.1


def test_a_profile_sums_up_the_matrix_products() -> None:
    lines = profile_job.table({"aten::mm": 2.0, "mkldnn::_linear_pointwise": 4.0, "aten::copy_": 2.0}).splitlines()
    assert lines[2:] == [
        "| all matrix products | 6.0 | 75% |",
        "| mkldnn::_linear_pointwise | 4.0 | 50% |",
        "| aten::mm | 2.0 | 25% |",
        "| aten::copy_ | 2.0 | 25% |",
    ]
