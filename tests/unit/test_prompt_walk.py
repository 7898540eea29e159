"""The order of prompts: of PPO's updates and of questions, from one class."""

import pytest
import torch

from deep_rlhf.algorithms.online import prompts as module
from deep_rlhf.algorithms.online.prompts import PromptBatches, PromptWalk


def test_every_prompt_comes_once_a_pass_and_a_continuation_continues() -> None:
    walk = PromptWalk("abcde", seed=3)
    passes = walk.between(0, 5) + walk.between(5, 10)
    assert sorted(passes[:5]) == sorted(passes[5:]) == list("abcde")
    assert passes[:5] != passes[5:]
    assert PromptWalk("abcde", seed=3).between(4, 8) == passes[4:8]
    assert walk.between(2, 3) == passes[2:3]  # back again
    assert PromptWalk("abcde", seed=4).between(0, 10) != passes


def test_the_batches_of_updates_are_the_permutations_of_the_seed() -> None:
    batches = PromptBatches("abcde", seed=3, batch_size=8, samples_per_prompt=2)
    orders = [torch.randperm(5, generator=torch.Generator().manual_seed(3 * 7_919 + epoch)) for epoch in range(4)]
    expected = ["abcde"[place] for order in orders for place in order.tolist()]
    drawn = [prompt for update in range(5) for prompt in batches.of_update(update)]
    assert drawn == [prompt for prompt in expected for _ in range(2)]


def test_a_prompt_costs_the_same_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = torch.randperm
    monkeypatch.setattr(module.torch, "randperm", lambda *args, **options: drawn.append(1) or plain(*args, **options))
    walk = PromptWalk(["prompt"] * 1000, seed=1)
    for start in range(0, 3000, 3):
        walk.between(start, start + 3)
    assert len(drawn) == 3  # one permutation for each pass
