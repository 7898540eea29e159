import pytest

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.questions.schedule import LabelSchedule


def test_labels_due_by_hand() -> None:
    # c = 10, T = 70: ln(1 + t/10) / ln 8 is 0, 1/3, 2/3, 1 at t = 0, 10, 30, 70
    schedule = LabelSchedule(initial=100, total=400, decay=10)
    assert [schedule.due(step, 70) for step in (0, 9.99, 10.01, 29.99, 30.01, 70)] == [100, 199, 200, 299, 300, 400]


def test_the_rate_halves_after_decay_steps() -> None:
    schedule = LabelSchedule(initial=0, total=1_000_000, decay=50)
    rate = [schedule.due(step + 1, 1_000) - schedule.due(step, 1_000) for step in (0, 50, 150)]
    assert rate[1] / rate[0] == pytest.approx(1 / 2, rel=0.02)  # c / (c + c)
    assert rate[2] / rate[0] == pytest.approx(1 / 4, rel=0.02)  # c / (c + 3 c)


def test_the_labels_due_never_decrease_and_end_with_all() -> None:
    schedule = LabelSchedule(initial=7, total=60, decay=3)
    due = [schedule.due(step, 26) for step in range(30)]
    assert due == sorted(due)
    assert due[0] == 7
    assert due[25] < 60
    assert due[26:] == [60] * 4
    assert schedule.due(-1, 26) == 7


def test_without_steps_all_are_wanted_at_once() -> None:
    assert LabelSchedule(initial=5, total=9, decay=1).due(0, 0) == 9


@pytest.mark.parametrize("values", [(10, 5, 1.0), (-1, 5, 1.0), (1, 5, 0.0), (1, 5, float("nan"))])
def test_values_out_of_range(values: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError, match=r"labels must|decay"):
        LabelSchedule(*values)
