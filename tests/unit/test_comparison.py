"""Win rates and sample tables against numbers worked out by hand."""

import math

import pytest

from deep_rlhf.evaluation.comparison import Sample, build_samples, spread_samples, wilson_interval, win_rate


def test_win_rate_counts_a_tie_as_half() -> None:
    result = win_rate([3, 2, 1, 5], [1, 2, 2, 0])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.rate == 0.625
    assert result.low < 0.625 < result.high


def test_win_rate_of_the_other_order_is_the_complement() -> None:
    a, b = [0.3, 0.9, 0.5, 0.1, 0.8], [0.3, 0.2, 0.6, 0.0, 0.1]
    forward, backward = win_rate(a, b), win_rate(b, a)
    assert forward.rate + backward.rate == pytest.approx(1)
    assert forward.low + backward.high == pytest.approx(1)


def test_wilson_interval_by_hand() -> None:
    # z²/n = 0.0384146: center (0.5 + 0.0192073) / 1.0384146, half √(0.0384146/4 + 0.0384146²/4) / 1.0384146 = 0.096168.
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038315, abs=1e-6), pytest.approx(0.5961685, abs=1e-6))


@pytest.mark.parametrize("count", [1, 3, 10, 128, 1000])
def test_wilson_interval_keeps_a_width_at_0_and_1(count: int) -> None:
    z2 = 1.959963984540054**2
    low, high = wilson_interval(1, count)
    assert high == 1.0
    assert low == pytest.approx(count / (count + z2))  # closed form at a share of 1
    low, high = wilson_interval(0, count)
    assert low == 0.0
    assert high == pytest.approx(z2 / (count + z2))


@pytest.mark.parametrize(("share", "count"), [(1.1, 5), (-0.1, 5), (0.5, 0), (math.nan, 5)])
def test_wilson_interval_refuses_nonsense(share: float, count: int) -> None:
    with pytest.raises(ValueError, match="share of 0 to 1"):
        wilson_interval(share, count)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1, 2], [1]), ([[1], [2]], [[1], [2]])])
def test_win_rate_refuses_unpaired_scores(a: list, b: list) -> None:
    with pytest.raises(ValueError, match="one score per prompt"):
        win_rate(a, b)


def test_win_rate_refuses_scores_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        win_rate([1.0, math.nan], [0.0, 0.0])


def test_build_samples_joins_columns_in_order() -> None:
    first, second = build_samples(
        ["p", "q"], ["new p", "new q"], before=["", "old q"], scores_after=[2, 3], scores_before=[1, 5]
    )
    assert first == Sample(prompt="p", after="new p", before="", score_after=2.0, score_before=1.0)
    assert (first.gain, second.gain) == (1.0, -2.0)


def test_build_samples_without_before_or_scores() -> None:
    assert build_samples(["p"], ["a"]) == [Sample(prompt="p", after="a")]
    assert build_samples(["p"], ["a"], scores_after=[1.0])[0].gain is None


def test_build_samples_refuses_columns_of_different_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        build_samples(["p", "q"], ["a", "b"], scores_after=[1.0])


def test_spread_shows_the_largest_rise_the_middle_and_the_largest_fall() -> None:
    gains = [0, 4, -4, 1, -1]
    samples = build_samples(list("abcde"), [""] * 5, before=[""] * 5, scores_after=gains, scores_before=[0] * 5)
    assert [sample.prompt for sample in spread_samples(samples, 3)] == ["b", "a", "c"]
    assert [sample.prompt for sample in spread_samples(samples, 10)] == ["b", "d", "a", "e", "c"]


def test_spread_falls_back_to_the_score_after_and_then_to_the_given_order() -> None:
    scored = build_samples(list("abc"), [""] * 3, scores_after=[1, 3, 2])
    assert [sample.prompt for sample in spread_samples(scored, 3)] == ["b", "c", "a"]
    assert [sample.prompt for sample in spread_samples(build_samples(list("abc"), [""] * 3), 3)] == ["a", "b", "c"]
    assert spread_samples([], 3) == []
