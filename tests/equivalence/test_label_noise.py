"""The error rate of each pair's annotator: told with every pair, or assumed by the run, it is the same."""

from dataclasses import replace

import pytest
import torch
from test_reward_micro_batches import preferences
from test_shared_prefix import classifier

from deep_rlhf.algorithms.supervised import reward_trainer
from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, pair_features, train_reward_model

NOISE = [0.05, 0.3, None, 0.0, 0.6]


@pytest.fixture
def result_of(make_tokenizer, tmp_path):
    """result_of(told, **flags): of three updates of eight pairs, where pair i says told[i % len(told)]."""

    def run(told, **flags):
        pairs = [replace(pair, label_noise=told[i % len(told)]) for i, pair in enumerate(preferences(24))]
        return train_reward_model(config(tmp_path, **flags), classifier("GPT2"), make_tokenizer(), pairs, pairs[:10])

    return run


def config(folder, **flags):
    quiet = {"report_to": "none", "disable_tqdm": True, "template": "plain", "save_strategy": "no"}
    steps = {"logging_steps": 1, "eval_strategy": "epoch", "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    return RewardConfig(output_dir=str(folder), ensemble_size=2, **(quiet | steps | flags))


def figures(result):
    logged = [row[name] for row in result.history for name in ("loss", "eval_loss") if name in row]
    return [*logged, result.metrics["loss"]]


def test_label_noise_given_per_pair_equals_the_same_noise_given_for_the_run(result_of):
    told, assumed, clean = result_of([0.2]), result_of([None], label_noise=0.2), result_of([None])
    assert len(figures(told)) == 3 + 2 + 1
    assert figures(told) == pytest.approx(figures(assumed), abs=1e-6)
    torch.testing.assert_close(told.rewards, assumed.rewards, atol=1e-5, rtol=1e-5)
    assert (told.rewards - clean.rewards).abs().max() > 1e-3
    assert figures(told)[0] != pytest.approx(figures(clean)[0], abs=1e-3)


def test_label_noise_stays_with_its_pair_in_micro_batches_and_evaluation(result_of, monkeypatch):
    whole = result_of(NOISE, label_noise=0.1, per_device_eval_batch_size=8)
    monkeypatch.setitem(reward_trainer.TOKENS_AT_ONCE, "cpu", 40)
    parts = result_of(NOISE, label_noise=0.1, per_device_eval_batch_size=2)
    assert figures(whole) == pytest.approx(figures(parts), abs=1e-5)
    torch.testing.assert_close(whole.rewards, parts.rewards, atol=1e-5, rtol=1e-5)


def test_a_batch_of_many_annotators_is_the_mean_of_each(make_tokenizer, tmp_path):
    pairs = [replace(pair, label_noise=NOISE[i % 5]) for i, pair in enumerate(preferences(10))]
    features, _ = pair_features(pairs, make_tokenizer(), config(tmp_path), 64)
    losses = []
    for rows, noise in [(features, 0.1), *(([pair], pair.pop("label_noise", 0.1)) for pair in map(dict, features))]:
        trainer = RewardTrainer(
            classifier("GPT2"), config(tmp_path, label_noise=noise, eval_strategy="no"), pad_token_id=0
        )
        batch = trainer.collate(rows)
        losses.append(trainer.loss(batch).item() / len(rows))
    assert losses[0] == pytest.approx(sum(losses[1:]) / 10, abs=1e-6)
    assert max(losses[1:]) - min(losses[1:]) > 0.05
