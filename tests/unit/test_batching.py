"""Batches under a token budget: nothing lost, nothing over, little padding."""

import random

import pytest

from deep_rlhf.runtime.memory import token_budget_batches


def test_longest_first_and_cut_where_the_padded_size_would_exceed_the_budget() -> None:
    # longest first: 9 | 5 4 | 3 2 1, for 2 · 5 ≤ 10 and 3 · 3 ≤ 10, but 3 · 5 > 10
    assert token_budget_batches([3, 9, 1, 5, 4, 2], 10) == [[1], [3, 4], [0, 5, 2]]


def test_a_length_over_the_budget_is_a_batch_of_its_own() -> None:
    assert token_budget_batches([50, 60, 1], 10) == [[1], [0], [2]]


def test_equal_lengths_keep_their_order() -> None:
    assert token_budget_batches([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]


def test_nothing_gives_nothing() -> None:
    assert token_budget_batches([], 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_index_once_within_the_budget(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 40) for _ in range(100)]
    batches = token_budget_batches(lengths, 64)
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)
    assert [max(lengths[i] for i in batch) for batch in batches] == sorted(
        (max(lengths[i] for i in batch) for batch in batches), reverse=True
    )
