"""A reward model must find a planted preference, and say what its noise floor, ties and centring make of it."""

import random

import pytest
import torch
import transformers

from deep_rlhf.algorithms.supervised.reward import RewardConfig, train_reward_model
from deep_rlhf.types import Preference

FILLER = [
    "red",
    "green",
    "blue",
    "black",
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "eats",
    "and",
    "or",
    "not",
]
SIZES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "Llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def comparisons(count, seed, flipped=0.0, tied=0.0):
    """Responses of 3 to 10 words; people prefer the one with the word `gold` in it, wherever it stands."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        responses = [rng.choices(FILLER, k=rng.randint(3, 10)) for _ in range(2)]
        best = rng.randrange(2)
        responses[best][rng.randrange(len(responses[best]))] = "gold"
        mu = 0.5 if rng.random() < tied else float((best == 0) != (rng.random() < flipped))
        a, b = (" ".join(words) for words in responses)
        pairs.append(Preference(prompt="the cat ", a=a, b=b, mu=mu, id=f"{seed}/{i}"))
    return pairs


@pytest.fixture
def fit(make_tokenizer, tmp_path):
    def run(kind, train, *, members=1, **flags):
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": members}
        config = getattr(transformers, f"{kind}Config")(**shared, **SIZES[kind])
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        options = {"report_to": "none", "disable_tqdm": True, "template": "plain", "per_device_train_batch_size": 16}
        reward_config = RewardConfig(
            output_dir=str(tmp_path), ensemble_size=members, learning_rate=3e-3, **(options | flags)
        )
        return train_reward_model(reward_config, model, tokenizer, train, comparisons(200, seed=1))

    return run


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("GPT2", {}),
        pytest.param("GPT2", {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param("DistilBert", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("DistilBert", {"precision": "bf16"}, marks=pytest.mark.slow),
        ("Llama", {}),
    ],
    ids=str,
)
def test_a_planted_preference_is_learned(fit, kind, flags):
    result = fit(kind, comparisons(480, seed=0), num_train_epochs=2, eval_strategy="no", **flags)
    assert result.metrics["accuracy"] >= 0.95
    assert abs(result.metrics["accuracy_length_baseline"] - 0.5) < 0.1  # length tells nothing here
    good, bad = result.model.score(["the cat "] * 2, ["sees gold and eats", "sees red and eats"])[:, 0]
    assert good > bad + 1


def test_an_ensemble_learns_from_noisy_labels_and_validates_itself_out_of_bag(fit):
    noisy = comparisons(640, seed=0, flipped=0.1)
    result = fit("GPT2", noisy, members=4, label_noise=0.2, num_train_epochs=2, eval_strategy="no")
    assert result.metrics["accuracy"] >= 0.95
    assert len(result.metrics["oob_accuracy"]) == 4
    assert all(0.8 < accuracy < 0.97 for accuracy in result.metrics["oob_accuracy"])  # a tenth is labelled wrongly
    scores = result.model.score(["the cat "], ["sees gold"])
    assert scores.std() > 0  # bootstraps differ, so members do


def test_ties_pull_rewards_together(fit):
    clear = fit("GPT2", comparisons(320, seed=0), num_train_epochs=2, eval_strategy="no")
    tied = fit("GPT2", comparisons(320, seed=0, tied=0.9), num_train_epochs=2, eval_strategy="no")

    def gap(result):
        return (result.rewards[:, 0] - result.rewards[:, 1]).abs().mean()

    assert gap(tied) < 0.5 * gap(clear)


def test_centring_keeps_rewards_near_zero(fit):
    free, centred = (
        fit("GPT2", comparisons(320, seed=0), num_train_epochs=2, eval_strategy="no", center_rewards_coefficient=c)
        for c in (None, 0.05)
    )
    assert centred.rewards.sum(dim=1).abs().mean() < 0.5 * free.rewards.sum(dim=1).abs().mean()
    assert centred.metrics["accuracy"] >= 0.95
