import math

import pytest
import torch
from torch.testing import assert_close

from deep_rlhf.ops.scores import (
    FIRST_MOMENTS,
    ensemble_score,
    moments_std,
    penalise_missing_eos,
    scaled_scores,
    updated_moments,
)

# three members: 1, 2, 6 (mean 3, squared distances 4 + 1 + 9 = 14, std √7) and −1, −1, −1
SCORES = torch.tensor([[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0]])


def test_ensemble_mean_and_worst_case() -> None:
    assert_close(ensemble_score(SCORES, "mean", 9.0), torch.tensor([3.0, -1.0]))
    assert_close(ensemble_score(SCORES, "min", 9.0), torch.tensor([1.0, -1.0]))


def test_ensemble_uncertainty_subtracts_the_std() -> None:
    # 3 − 2 · 2.6457513
    assert_close(ensemble_score(SCORES, "uncertainty", 2.0), torch.tensor([-2.2915026, -1.0]))
    # two members: |3 − 1| / √2
    assert_close(ensemble_score(torch.tensor([[1.0, 3.0]]), "uncertainty", 0.5), torch.tensor([2 - 0.7071068]))


@pytest.mark.parametrize("kind", ["mean", "uncertainty", "min"])
def test_an_ensemble_of_one_is_its_member(kind: str) -> None:
    assert_close(ensemble_score(SCORES[:, :1], kind, 0.5), torch.tensor([1.0, -1.0]))


def test_an_unknown_ensemble_score_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown ensemble score 'max'"):
        ensemble_score(SCORES, "max", 0.5)  # type: ignore[arg-type]


def test_a_missing_eos_replaces_or_lowers_the_score() -> None:
    scores, finished = torch.tensor([2.0, 2.0, -5.0]), torch.tensor([True, False, False])
    assert_close(penalise_missing_eos(scores, finished, 1.0, "replace"), torch.tensor([2.0, -1.0, -1.0]))
    assert_close(penalise_missing_eos(scores, finished, 1.5, "subtract"), torch.tensor([2.0, 0.5, -6.5]))
    with pytest.raises(ValueError, match=r"EOS.*'add'"):
        penalise_missing_eos(scores, finished, 1.0, "add")  # type: ignore[arg-type]


def test_moments_of_one_batch() -> None:
    # 1, 2, 6: mean 3, variance 14/3, unbiased 14/2; what stood there before has no weight
    count, mean, var = moments = updated_moments(FIRST_MOMENTS, torch.tensor([1.0, 2.0, 6.0]))
    assert count == 3
    assert mean == pytest.approx(3.0, abs=1e-12)
    assert var == pytest.approx(14 / 3, abs=1e-12)
    assert moments_std(moments) == pytest.approx(math.sqrt(7), abs=1e-12)


def test_moments_of_two_batches_are_those_of_all_values() -> None:
    # 1, 2, 6 | 8, 13: mean 30/5 = 6, squared distances 25 + 16 + 0 + 4 + 49 = 94
    moments = updated_moments(FIRST_MOMENTS, torch.tensor([1.0, 2.0, 6.0]))
    count, mean, var = moments = updated_moments(moments, torch.tensor([[8.0], [13.0]]))
    assert count == 5
    assert mean == pytest.approx(6.0, abs=1e-12)
    assert var == pytest.approx(94 / 5, abs=1e-12)
    assert moments_std(moments) == pytest.approx(math.sqrt(94 / 4), abs=1e-12)


def test_the_std_of_fewer_than_two_values_is_one() -> None:
    assert moments_std(FIRST_MOMENTS) == 1.0
    moments = updated_moments(FIRST_MOMENTS, torch.tensor([7.0]))
    assert moments[1] == 7.0
    assert moments_std(moments) == 1.0
    # 7 and 9: √((1 + 1)/1)
    assert moments_std(updated_moments(moments, torch.tensor([9.0]))) == pytest.approx(math.sqrt(2), abs=1e-12)


def test_moments_of_scores_far_from_zero_keep_their_precision() -> None:
    count, mean, var = updated_moments(FIRST_MOMENTS, torch.tensor([100_001.0, 100_002.0, 100_006.0]))
    assert (count, mean) == (3, 100_003.0)
    assert var == pytest.approx(14 / 3, rel=1e-9)


def test_scores_are_scaled_then_centred_if_asked_then_clamped() -> None:
    scores = torch.tensor([1.0, 3.0, 9.0, -9.0])
    assert_close(scaled_scores(scores, 1.0, 2.0, center=False, clip=None), torch.tensor([0.5, 1.5, 4.5, -4.5]))
    assert_close(scaled_scores(scores, 1.0, 2.0, center=True, clip=None), torch.tensor([0.0, 1.0, 4.0, -5.0]))
    assert_close(scaled_scores(scores, 1.0, 2.0, center=True, clip=3.0), torch.tensor([0.0, 1.0, 3.0, -3.0]))


def test_scores_without_spread_are_divided_by_the_epsilon() -> None:
    # 2^-23, float32's
    assert_close(scaled_scores(torch.tensor([2.0]), 1.0, 0.0, center=True, clip=None), torch.tensor([8388608.0]))
