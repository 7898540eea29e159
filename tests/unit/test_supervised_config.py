"""Flags of transformers.TrainingArguments that cannot be meant are refused before anything is loaded, by their name."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from facts import assert_names

from deep_rlhf.algorithms.supervised.config import BOUNDS, SupervisedConfig
from deep_rlhf.algorithms.supervised.dpo import DPOConfig
from deep_rlhf.algorithms.supervised.optimiser import make_optimizer, make_scheduler
from deep_rlhf.algorithms.supervised.reward import RewardConfig
from deep_rlhf.algorithms.supervised.sft import SFTConfig
from deep_rlhf.errors import ConfigError

CLASSES: list[type[SupervisedConfig]] = [RewardConfig, DPOConfig, SFTConfig]
NUMBERS = [field.name for field in dataclasses.fields(SupervisedConfig) if field.name in BOUNDS]


def config(kind: type[SupervisedConfig], folder: Path, **settings: Any) -> SupervisedConfig:
    return kind(output_dir=str(folder), **({"report_to": "none", "use_cpu": True} | settings))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("value", [-2, math.nan, math.inf, -math.inf, 1e308, 10**20, "text", "1"])
def test_a_number_that_cannot_be_meant_names_its_flag(kind: type[SupervisedConfig], value: Any, tmp_path: Path) -> None:
    for name in NUMBERS:
        with pytest.raises(ConfigError) as caught:
            config(kind, tmp_path, **{name: value})
        assert_names(caught.value, name)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"adam_epsilon": 0.0}, ("adam_epsilon", "greater than 0")),
        ({"adam_beta2": 1.0}, ("adam_beta2", "less than 1")),
        ({"max_steps": 0}, ("max_steps", "at least 1")),
        ({"num_train_epochs": 0}, ("num_train_epochs", "greater than 0")),
        ({"gradient_accumulation_steps": 1.5}, ("gradient_accumulation_steps", "whole")),
        ({"lr_scheduler_kwargs": "{bad"}, ("lr_scheduler_kwargs", "JSON")),
        ({"lr_scheduler_kwargs": "3"}, ("lr_scheduler_kwargs", "JSON")),
        ({"run_name": " "}, ("run_name", "empty")),
        ({"optim": "nope"}, ("nope",)),
        ({"lr_scheduler_type": "nope"}, ("nope",)),
        ({"save_strategy": "nope"}, ("nope",)),
        ({"save_total_limit": 0}, ("save_total_limit", "at least 1")),
        ({"accelerator_config": "nowhere.json"}, ("nowhere.json",)),
        ({"fsdp_config": {"min_num_params": 1}}, ("fsdp_config", "not supported")),
    ],
    ids=str,
)
def test_other_mistakes_are_one_sentence(
    kind: type[SupervisedConfig], settings: dict[str, Any], facts: tuple[object, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(kind, tmp_path, **settings)
    assert_names(caught.value, *facts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings", "facts"),
    [
        (RewardConfig, {"metric_for_best_model": "nope"}, ("metric_for_best_model", "accuracy", "nope")),
        (DPOConfig, {"metric_for_best_model": "nope"}, ("metric_for_best_model", "margin", "nope")),
        (RewardConfig, {"save_strategy": "epoch"}, ("--load_best_model_at_end",)),
        (
            DPOConfig,
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "best"},
            ("eval_strategy",),
        ),
        (DPOConfig, {"load_best_model_at_end": True, "save_strategy": "epoch"}, ("--load_best_model_at_end",)),
    ],
    ids=str,
)
def test_combinations_without_sense(
    kind: type[SupervisedConfig], settings: dict[str, Any], facts: tuple[object, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(kind, tmp_path, **settings)
    assert_names(caught.value, *facts)


def test_the_best_model_is_that_of_the_lowest_loss_if_no_figure_is_named(tmp_path: Path) -> None:
    chosen = config(DPOConfig, tmp_path, save_strategy="best")
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("loss", False)
    for name in ("margin", "eval_margin"):
        assert config(DPOConfig, tmp_path, metric_for_best_model=name).greater_is_better is True


@pytest.mark.parametrize(
    "settings",
    [
        {"optim_args": "nonsense"},
        {"optim_args": "nonsense=1"},
        {"lr_scheduler_kwargs": {"nonsense": 1}},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_type": "warmup_stable_decay"},
    ],
    ids=str,
)
def test_what_optimiser_and_schedule_refuse_is_one_sentence(
    settings: dict[str, Any], tmp_path: Path, make_model: Any
) -> None:
    chosen = config(SFTConfig, tmp_path, **settings)
    model = make_model("gpt2")
    with pytest.raises(ConfigError) as caught:
        make_scheduler(make_optimizer(model, chosen), chosen, 10)
    assert "\n" not in str(caught.value)
