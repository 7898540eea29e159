"""The questions that are chosen, by hand, and that the random arm stays a fair sample."""

import math

import pytest
import torch

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.questions.acquisition import acquisition_scores, select
from deep_rlhf.feedback.records import ACQUISITION_RULES

LN3 = math.log(3)


def rewards_of(*differences: tuple[float, float]) -> torch.Tensor:
    """[C, 2, 2] with r_a − r_b as given for two members."""
    a = torch.tensor(differences)
    return torch.stack([a, torch.zeros_like(a)], dim=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Variance of P: 0, 1/16 (¾ and ¼), 1/64 (¾ and ½), and 0.
CANDIDATES = rewards_of((LN3, LN3), (LN3, -LN3), (LN3, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("rule", ["variance", "information"])
def test_the_highest_scores_win(rule: str) -> None:
    chosen = select(CANDIDATES, 2, rule=rule, random_share=0.0, generator=generator())
    found = {one.index: one for one in chosen}
    assert found.keys() == {1, 2}
    assert {one.reason for one in chosen} == {rule}
    assert found[1].predicted == pytest.approx(0.5)
    assert found[2].predicted == pytest.approx(0.625)
    assert found[1].score == pytest.approx(acquisition_scores(CANDIDATES, rule)[1].item())


def test_scores_of_each_rule() -> None:
    assert acquisition_scores(CANDIDATES, "variance").tolist() == pytest.approx([0, 1 / 16, 1 / 64, 0])
    assert acquisition_scores(CANDIDATES, "random").tolist() == pytest.approx([0, 1 / 16, 1 / 64, 0])
    # ln 2 − H(0.725), with p' = 0.9 p + 0.05
    gain = math.log(2) + 0.725 * math.log(0.725) + 0.275 * math.log(0.275)
    assert acquisition_scores(CANDIDATES, "information", 0.1)[1].item() == pytest.approx(gain)


def test_the_rules_differ_where_members_are_sure() -> None:
    # P is 0.998 and 0.68 in the first pair, 0.73 and 0.27 in the second: its members are unsure by themselves too
    sure, unsure = (6.0, 0.75), (1.0, -1.0)
    pair = rewards_of(sure, unsure)
    variance, information = acquisition_scores(pair, "variance"), acquisition_scores(pair, "information", 0.0)
    assert variance[1] / variance[0] > information[1] / information[0]


def test_the_random_arm_has_its_share_and_is_not_chosen_twice() -> None:
    rewards = torch.randn(100, 2, 3, generator=generator(1))
    chosen = select(rewards, 50, rule="variance", generator=generator())
    reasons = [one.reason for one in chosen]
    assert reasons.count("random") == 10
    assert reasons.count("variance") == 40
    assert len({one.index for one in chosen}) == 50


def test_the_random_arm_is_drawn_from_all_candidates_alike() -> None:
    rewards = torch.randn(10, 2, 3, generator=generator(1))
    seen = torch.zeros(10)
    lot = generator(3)
    for _ in range(2000):
        for one in select(rewards, 2, rule="variance", random_share=0.5, generator=lot):
            seen[one.index] += one.reason == "random"
    # 2,000 draws of one in ten each: standard error 13
    assert seen.sum() == 2000
    assert (seen - 200).abs().max() < 55


def test_a_single_question_is_random_as_often_as_it_should_be() -> None:
    rewards = torch.randn(10, 2, 3, generator=generator(1))
    lot = generator(5)
    random = sum(select(rewards, 1, rule="information", generator=lot)[0].reason == "random" for _ in range(2000))
    assert random / 2000 == pytest.approx(0.2, abs=0.04)  # standard error 0.009


def test_arms_are_mixed_in_the_order_of_asking() -> None:
    rewards = torch.randn(100, 2, 3, generator=generator(1))
    lot, first = generator(7), 0
    for _ in range(200):
        chosen = select(rewards, 10, rule="variance", random_share=0.5, generator=lot)
        first += sum(one.reason == "random" for one in chosen[:5])
    assert first / 1000 == pytest.approx(0.5, abs=0.06)  # standard error 0.012


def test_the_random_rule_has_one_arm() -> None:
    chosen = select(CANDIDATES, 3, rule="random", random_share=0.0, generator=generator())
    assert [one.reason for one in chosen] == ["random"] * 3


@pytest.mark.parametrize("rule", ACQUISITION_RULES)
def test_fewer_candidates_than_questions(rule: str) -> None:
    chosen = select(CANDIDATES, 9, rule=rule, generator=generator())
    assert sorted(one.index for one in chosen) == [0, 1, 2, 3]
    assert select(torch.empty(0, 2, 3), 9, rule=rule, generator=generator()) == []
    assert select(CANDIDATES, 0, rule=rule, generator=generator()) == []


def test_the_same_seed_chooses_the_same_questions() -> None:
    rewards = torch.randn(30, 2, 3, generator=generator(1))
    first, again, other = (select(rewards, 9, rule="variance", generator=generator(seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("rule", "share"), [("best", 0.2), ("variance", 1.5), ("variance", -0.1)])
def test_an_unknown_rule_or_share_is_refused(rule: str, share: float) -> None:
    with pytest.raises(ConfigError, match=r"chosen by|random share"):
        select(CANDIDATES, 1, rule=rule, random_share=share, generator=generator())
