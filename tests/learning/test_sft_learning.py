"""SFT teaches the responses and their ends, and nothing about the prompts."""

import logging
from collections.abc import Callable
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import assert_names

from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.generate import generate_text

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def config(folder: Path, **settings: Any) -> SFTConfig:
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return SFTConfig(output_dir=str(folder), **(common | settings))


def test_a_tiny_model_memorises_twenty_pairs(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    prompts = [" ".join(words) for words in islice(permutations(("red", "cat", "one", "the", "dog"), 3), 20)]
    responses = [f"{('two', 'fish', 'moon')[i % 3]} " * (1 + i % 4) + f"{('sun', 'old')[i % 2]}" for i in range(20)]
    model = make_model("gpt2", spread=0.1, **NO_DROPOUT)
    metrics = train_sft(
        config(tmp_path, num_train_epochs=40, per_device_train_batch_size=10, learning_rate=1e-2),
        model,
        tokenizer,
        list(zip(prompts, responses, strict=True)),
    )
    assert metrics["train_loss"] > 0
    said = generate_text(Policy(model), tokenizer, prompts, max_new_tokens=12, temperature=1e-3)
    assert [text.strip() for text in said] == responses  # not a word more: EOS was learnt


def test_the_loss_is_the_mean_over_response_tokens_and_eos(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    examples = [("the cat", "sees two fish"), ("red", "moon"), ("", "a very old dog")]
    model = make_model("gpt2", **NO_DROPOUT)
    expected = []
    for prompt, response in examples:
        before, after = tokenizer(prompt).input_ids, [*tokenizer(response).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
        places = range(max(len(before), 1), len(before + after))  # nothing stands before the first token of all
        expected += [-float(logprobs[place - 1, (before + after)[place]]) for place in places]
    settings = {"per_device_train_batch_size": 3, "max_steps": 1, "learning_rate": 0.0}
    metrics = train_sft(config(tmp_path, **settings), model, tokenizer, examples)
    assert metrics["train_loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    # batches of unequal size, accumulated: still the mean over tokens, not over batches
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    metrics = train_sft(config(tmp_path, **settings), model, tokenizer, examples)
    assert metrics["train_loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_examples_that_are_too_long_are_left_out_and_counted(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitting, too_long = ("the cat", "sees two"), ("the cat", "sees two fish")  # 5 and 6 tokens, EOS included
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.0, "max_length": 5}
    model = make_model("gpt2", **NO_DROPOUT)
    with caplog.at_level(logging.WARNING, "deep_rlhf"):
        alone = train_sft(config(tmp_path, **settings), model, tokenizer, [fitting])
        both = train_sft(config(tmp_path, **settings), model, tokenizer, [too_long, fitting])
    # Only this project's lines: earlier tests of the process may have let transformers' own through.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("deep_rlhf")]
    assert len(ours) == 1
    assert_names(ours[0], "1 of 2 examples", "5 tokens", "dropped")
    assert both["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-6)


def test_examples_that_do_not_fit_are_refused(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\b1 examples\b.*\b3 tokens.*max_length"):
        train_sft(config(tmp_path, max_length=3), make_model("gpt2"), tokenizer, [("the cat", "sees two")])


def test_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_strategy"):
        config(tmp_path, eval_strategy="steps")
