"""What could be asked: every prompt in its turn, all pairs of a few samples, and the pair that the members dispute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deep_rlhf.feedback.questions.candidates import Candidate, rewards_of, sample_candidates, win_rate_pairs


def write(prompts: list[str], seed: int) -> list[str]:
    """A different response in every place."""
    return [f"{prompt} {seed} {i}" for i, prompt in enumerate(prompts)]


class Counting:
    """Two members: the length of the response, and a number of its own for each text."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        self.scored += responses
        return torch.tensor([[float(len(text)), float(ord(text[-1]))] for text in responses])


def test_samples_of_a_prompt_make_all_their_pairs() -> None:
    groups = sample_candidates(write, ["p", "q", "p"], samples=5, seed=1)
    assert [len(own) for own in groups] == [10, 10, 10]  # ten candidates for a question
    for own, prompt in zip(groups, ["p", "q", "p"], strict=True):
        assert {candidate.prompt for candidate in own} == {prompt}
        assert len({frozenset(candidate.responses) for candidate in own}) == 10
    firsts = [candidate.responses[0] < candidate.responses[1] for own in groups for candidate in own]
    assert 5 < sum(firsts) < 25  # no side is always the earlier sample


def test_equal_responses_are_never_compared() -> None:
    def same(prompts: list[str], seed: int) -> list[str]:
        return [" yes", "yes ", "no", "yes", "no"] * (len(prompts) // 5)

    groups = sample_candidates(same, ["p", "q"], samples=5, seed=1)
    assert [[{text.strip() for text in one.responses} for one in own] for own in groups] == [[{"yes", "no"}]] * 2
    assert sample_candidates(lambda prompts, seed: ["x"] * len(prompts), ["p"], samples=3, seed=1) == [[]]


def test_sets_for_rankings() -> None:
    (own,) = sample_candidates(write, ["p"], samples=6, responses=4, seed=1)
    assert len(own) == 6
    assert all(len(set(candidate.responses)) == 4 for candidate in own)


def test_rewards_belong_to_their_responses_and_each_text_is_scored_once() -> None:
    scorer = Counting()
    rewards = rewards_of([Candidate("p", ("a", "bcd")), Candidate("p", ("bcd", "ef"))], scorer)
    assert rewards[:, :, 0].tolist() == [[1, 3], [3, 2]]
    assert sorted(scorer.scored) == ["a", "bcd", "ef"]


def test_of_a_ranking_the_most_disputed_pair_stands_for_it() -> None:
    """The members differ by (1 − 1, a − b), …: most about the first and the last."""
    rewards = rewards_of([Candidate("p", ("a", "b", "z"))], Counting())
    assert rewards.tolist() == [[[1, ord("a")], [1, ord("z")]]]


def test_blind_pairs_leave_out_responses_that_both_policies_wrote() -> None:
    pairs = win_rate_pairs(
        lambda prompts, seed: ["new", "same"], lambda prompts, seed: ["old", " same "], ["p", "q"], seed=1
    )
    assert pairs == [("p", "new", "old")]
    assert win_rate_pairs(write, write, [], seed=1) == []
