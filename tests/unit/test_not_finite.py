"""A NaN or an infinity ends supervised training before it reaches a weight, and no weight that is one is ever saved."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import assert_names
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification

from deep_rlhf import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.supervised.dpo import DPOConfig, train_dpo
from deep_rlhf.algorithms.supervised.reward import RewardConfig, train_reward_model
from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft
from deep_rlhf.errors import NotFiniteError, UserError
from deep_rlhf.feedback.reward_refit.ensemble import RefitSettings, RewardFit, classifier_of
from deep_rlhf.models.load import load_language_model
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.models.saving import save_model
from deep_rlhf.runtime.checkpoint import latest_checkpoint
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.types import Preference

MakeModel = Callable[..., Any]
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}
PAIRS = [
    Preference(prompt="the cat ", a=f"{a} gold", b=f"{a} {b}", id=f"{a}/{b}")
    for a in ("red", "green", "blue", "black")
    for b in ("dog", "bird", "sees", "likes")
]
EXTREME = [*PAIRS[:9], replace(PAIRS[9], weight=1e38, margin=1e38), *PAIRS[10:]]


def classifier(members: int = 1) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=50, pad_token_id=0, num_labels=members, **sizes))


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def spoilt(model: Any, value: float = math.nan) -> Any:
    """One number of one weight, which no text of these tests needs."""
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, 0] = value
    return model


def fit_dpo(model: Any, tokenizer: Any, folder: Path, pairs: list[Preference] = PAIRS, **settings: Any) -> Any:
    chosen = {"template": "plain", "eval_strategy": "no", "save_strategy": "no"} | settings
    return train_dpo(DPOConfig(output_dir=str(folder), **(QUIET | chosen)), model, tokenizer, pairs, PAIRS)


def fit_reward(model: Any, tokenizer: Any, folder: Path, pairs: list[Preference] = PAIRS, **settings: Any) -> Any:
    chosen = {"template": "plain", "eval_strategy": "no", "save_strategy": "no"} | settings
    config = RewardConfig(output_dir=str(folder), **(QUIET | chosen))
    return train_reward_model(config, model, tokenizer, pairs, PAIRS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_named(value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    check_finite(model, "x")
    check_finite({"empty": torch.empty(0), "codes": torch.tensor([255], dtype=torch.uint8)}.items(), "x")
    with torch.no_grad():
        model[1].weight[1, 2] = value
    with pytest.raises(NotFiniteError) as caught:
        check_finite(model, "The model")
    assert_names(caught.value, "The model", "1.weight", value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_peft": True, "lora_r": 2},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=str,
)
def test_dpo_stops_before_the_bad_update_reaches_a_weight(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = make_model("gpt2")
    with pytest.raises(NotFiniteError) as caught:
        fit_dpo(model, tokenizer, tmp_path, EXTREME, **settings)
    assert_names(caught.value, "update")
    assert "loss" in str(caught.value) or "gradient" in str(caught.value)
    check_finite(model, "after it")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_peft": True, "lora_r": 2},
        {"gradient_accumulation_steps": 3},
        {"precision": "bf16"},
        {"ensemble_size": 3},
        {"optim": "sgd"},
    ],
    ids=str,
)
def test_a_reward_model_stops_before_the_bad_update_reaches_a_weight(
    tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = classifier(settings.get("ensemble_size", 1))
    with pytest.raises(NotFiniteError):
        fit_reward(model, tokenizer, tmp_path, EXTREME * 2, num_train_epochs=3, **settings)
    check_finite(model, "after it")


def test_sft_names_the_update_and_what_to_do(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.lm_head.weight.data.mul_(1e30)  # finite, and so are the logits; their gradients are not
    before = weights_of(model)
    config = SFTConfig(output_dir=str(tmp_path), save_strategy="no", learning_rate=0.5, max_steps=3, **QUIET)
    with pytest.raises(NotFiniteError) as caught:
        train_sft(config, model, tokenizer, [("the cat", "sees two fish")] * 8)
    assert_names(caught.value, "update 1", "--learning_rate", "0.5")
    assert all(map(torch.equal, before, weights_of(model)))


def test_examples_without_a_token_to_learn_are_dropped(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SFTConfig(output_dir=str(tmp_path), save_strategy="no", max_steps=2, **QUIET)
    metrics = train_sft(config, make_model("gpt2"), tokenizer, [("", "")] * 8 + [("the cat", "sees")] * 8)
    assert math.isfinite(metrics["train_loss"])
    assert "8 of 16" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_model_with_a_bad_weight_is_not_trained(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, value: float
) -> None:
    config = SFTConfig(output_dir=str(tmp_path), save_strategy="no", max_steps=2, **QUIET)
    for train in (
        lambda: fit_dpo(spoilt(make_model("gpt2"), value), tokenizer, tmp_path, max_steps=2),
        lambda: fit_reward(spoilt(classifier(), value), tokenizer, tmp_path, max_steps=2),
        lambda: train_sft(config, spoilt(make_model("gpt2"), value), tokenizer, [("the cat", "sees")] * 4),
    ):
        with pytest.raises(NotFiniteError) as caught:
            train()
        assert_names(caught.value, value)
    folder = tmp_path / "base"
    spoilt(make_model("gpt2"), value).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(NotFiniteError) as caught:
        load_language_model(str(folder))
    assert_names(caught.value, folder, value)


def test_an_earlier_checkpoint_stays_and_none_holds_a_bad_weight(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    """The third update's data are extreme."""
    pairs = [*PAIRS[:8], *(replace(pair, weight=1e38, margin=1e38) for pair in PAIRS[8:12])]
    settings = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    with pytest.raises(NotFiniteError) as caught:
        fit_reward(classifier(), tokenizer, tmp_path, pairs, save_total_limit=1, **settings)
    assert_names(caught.value, "update 3")
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 2
    check_finite(found.state["weights"].items(), "checkpoint")


def test_a_step_that_overflows_is_not_saved(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are finite, and the optimiser itself makes an infinite weight."""

    def overflow(optimizer: torch.optim.SGD, *_: Any) -> None:
        optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    with pytest.raises(NotFiniteError) as caught:
        fit_reward(classifier(), tokenizer, tmp_path, optim="sgd", save_strategy="steps", save_steps=1)
    assert_names(caught.value, "update 1", "inf")
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    with pytest.raises(NotFiniteError):
        fit_reward(classifier(), tokenizer, tmp_path, optim="sgd", max_steps=1)


def test_no_save_writes_a_bad_weight_or_touches_an_earlier_model(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    good, bad = make_model("gpt2"), spoilt(make_model("gpt2"))
    save_model(good, tokenizer, tmp_path / "model")
    saves = [
        lambda folder: save_model(bad, tokenizer, folder),
        lambda folder: RewardModel(spoilt(classifier()), tokenizer, template="plain").save(folder),
        lambda folder: RewardModel(classifier(), tokenizer, std=torch.tensor([math.nan])).save(folder),
    ]
    for save in saves:
        for name in ("model", "new"):
            with pytest.raises(NotFiniteError):
                save(tmp_path / name)
    assert not (tmp_path / "new").exists()
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(map(torch.equal, weights_of(reopened), weights_of(good)))


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_an_online_run_saves_no_bad_weight(make_model: MakeModel, tokenizer: Any, tmp_path: Path, part: str) -> None:
    config = PPOConfig(batch_size=4, mini_batch_size=4, steps=8, max_new_tokens=3, output_dir=str(tmp_path))
    trainer = PPOTrainer(
        config,
        model=make_model("gpt2"),
        tokenizer=tokenizer,
        prompts=["the cat", "red"],
        reward=lambda prompts, responses: [float(len(text)) for text in responses],
    )
    trainer.train(updates=1)
    critic = trainer.learner.critic
    assert critic is not None
    module = trainer.sampler.policy if part == "policy" else critic
    with torch.no_grad():
        list(module.parameters())[-1].view(-1)[0] = math.nan
    for save in (trainer.checkpoint, trainer.snapshot):
        with pytest.raises(NotFiniteError):
            save()
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_a_refit_that_is_not_finite_leaves_its_model_finite(make_model: MakeModel, tokenizer: Any) -> None:
    policy = make_model("gpt2", spread=0.02)
    settings = RefitSettings(members=2, template="plain", max_length=64, learning_rate=1e-3)
    fit = RewardFit(classifier_of(policy, 2), tokenizer, settings)
    fit.fit(PAIRS)
    with pytest.raises(NotFiniteError):
        fit.fit([replace(pair, weight=1e38, margin=1e38) for pair in PAIRS])
    check_finite(fit.model.model, "after it")
