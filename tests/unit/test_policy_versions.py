"""Which version is the best one, and what is kept of them."""

from deep_rlhf.feedback.loop.policy_versions import LEAST_WINS, Merit, best_of


def merit(number: int, score: float, wins: str = "") -> Merit:
    """`wins`: a w for each blind label that was won, l for lost, t for a tie."""
    return Merit(number=number, wins=tuple({"w": 1.0, "l": 0.0, "t": 0.5}[letter] for letter in wins), score=score)


def test_without_labels_the_reward_decides_which_policy_is_best() -> None:
    assert best_of([merit(0, 0.1), merit(4, 2.0), merit(5, 1.0)]).number == 4
    assert best_of([merit(0, 0.1), merit(4, 2.0), merit(5, 2.0)]).number == 5  # of equals the newest
    assert best_of([merit(0, 0.1), merit(5, -1.0)]).number == 0


def test_labels_count_more_than_the_reward() -> None:
    liked, rewarded = merit(3, 0.5, "w" * LEAST_WINS), merit(4, 9.0, "l" * LEAST_WINS)
    assert best_of([merit(0, 0.0), liked, rewarded]).number == 3
    assert best_of([merit(0, 0.0), liked, merit(5, 9.0)]).number == 3  # nobody has said anything of the newest


def test_a_policy_that_people_like_less_than_the_start_is_not_the_best() -> None:
    assert best_of([merit(0, 0.0), merit(3, 5.0, "l" * LEAST_WINS + "w")]).number == 0


def test_a_few_labels_do_not_overrule_the_reward() -> None:
    assert best_of([merit(0, 0.0), merit(3, 1.0, "w" * (LEAST_WINS - 1)), merit(4, 2.0)]).number == 4
