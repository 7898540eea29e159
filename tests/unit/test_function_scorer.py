"""A user's reward function: its numbers are passed on, and an error in it names the sample."""

import logging
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from facts import assert_names

from deep_rlhf.errors import RewardError
from deep_rlhf.models.function_scorer import FunctionScorer
from deep_rlhf.models.reward import load_scorer

PROMPTS = [f"q{row}" for row in range(6)]
RESPONSES = [f"r{row}" for row in range(6)]


def error_message(function: Callable[..., Any], rows: int = 6, **options: Any) -> str:
    """The error's message; the function is called f."""
    with pytest.raises(RewardError) as caught:
        FunctionScorer(function, "f", **options).score(PROMPTS[:rows], RESPONSES[:rows])
    return str(caught.value)


def sample(row: int) -> tuple[str, str, str]:
    """What names a sample in a message: its number, prompt and response."""
    return f"sample {row}", f"'q{row}'", f"'r{row}'"


def failing(fails: Callable[[list[str]], bool], how: Callable[[], Any]) -> Callable[..., Any]:
    """A reward of 1 for each response, or the result of `how` if `fails` is true for the responses."""
    return lambda prompts, responses: how() if fails(responses) else [1.0] * len(responses)


def with_sample(row: int) -> Callable[[list[str]], bool]:
    return lambda responses: f"r{row}" in responses


def a_key_error() -> Any:
    raise KeyError("user_id")


def hang() -> Any:
    threading.Event().wait()


# ---- valid rewards


def test_a_function_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_length_reward.py").write_text(
        "def words(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    scores = load_scorer("python:my_length_reward:words").score(["a", "b"], ["cat", "bird"])
    assert (scores.tolist(), scores.dtype) == ([[3.0], [4.0]], torch.float32)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("python:math", "python:module:function"),
        ("python::sqrt", "python:module:function"),
        ("python:no_such_module_here:f", "No module named"),
        ("python:math:no_such_function", "no function 'no_such_function'"),
        ("python:math:pi", "no function 'pi'"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(spec: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        load_scorer(spec)


@pytest.mark.parametrize(
    "returned", [[1.5, 2], (1.5, 2), torch.tensor([1.5, 2.0]), np.array([1.5, 2.0]), (x for x in (1.5, 2))]
)
def test_rewards_are_any_iterable_of_numbers(returned: Any) -> None:
    scorer = FunctionScorer(lambda prompts, responses: returned, "f")
    assert scorer.score(["", ""], ["", ""]).tolist() == [[1.5], [2.0]]


def test_rewards_that_are_not_finite_are_passed_on() -> None:
    scores = FunctionScorer(lambda prompts, responses: [math.nan, math.inf, -math.inf], "f").score([""] * 3, [""] * 3)
    assert scores[1:].tolist() == [[math.inf], [-math.inf]]
    assert math.isnan(scores[0])


def test_the_function_may_change_the_lists_it_gets() -> None:
    prompts, responses = ["q"], ["r"]

    def takes(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(prompts.pop() + responses.pop()))]

    assert FunctionScorer(takes, "f").score(prompts, responses).tolist() == [[2.0]]
    assert (prompts, responses) == (["q"], ["r"])


@pytest.mark.parametrize("gradients", [True, False])
def test_the_function_sees_the_callers_gradient_mode(gradients: bool) -> None:
    scorer = FunctionScorer(lambda prompts, responses: [torch.is_grad_enabled()], "f")
    with torch.set_grad_enabled(gradients):
        assert scorer.score(["q"], ["r"]).item() == gradients


# ---- errors in the function


@pytest.mark.parametrize(
    ("returned", "facts"),
    [
        (["good", 1.0], ("'good'", 0)),
        (["1.0", 1.0], ("'1.0'", 0)),
        ([1.0, None], ("None", 1)),
        ([1.0, 1j], ("1j", 1)),
        (torch.ones(2, 2), ("tensor([1., 1.])", 0)),
    ],
)
def test_a_value_that_is_no_number(returned: Any, facts: tuple[str, int]) -> None:
    value, row = facts
    assert_names(error_message(lambda prompts, responses: returned, rows=2), "f", value, *sample(row))


def test_a_value_that_is_no_number_is_shortened() -> None:
    for returned in (10**400, "1" + "0" * 400, torch.ones(30, 30)):  # the first is too large for a float
        message = error_message(lambda prompts, responses, returned=returned: [returned], rows=1)
        assert_names(message, "f", *sample(0))
        assert "…" in message
        assert len(message) < 150
        assert "\n" not in message


@pytest.mark.parametrize("returned", [0.5, torch.tensor(0.5), None])
def test_a_return_value_that_is_not_iterable(returned: Any) -> None:
    kind = type(returned).__name__
    message = error_message(lambda prompts, responses: returned)
    assert_names(message, "f", "one number per response", kind, "6 responses", *sample(0))


@pytest.mark.parametrize("row", range(6))
def test_a_sample_that_raises(row: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        error = error_message(failing(with_sample(row), a_key_error))
    assert_names(error, "f", "KeyError", "'user_id'", "6 responses", *sample(row))
    (warning,) = caplog.messages
    assert_names(warning, "f", "KeyError", "'user_id'")


def test_a_single_sample_needs_no_search(caplog: pytest.LogCaptureFixture) -> None:
    message = error_message(failing(with_sample(0), a_key_error), rows=1)
    assert_names(message, "f", "KeyError", "'user_id'", *sample(0))
    assert caplog.messages == []


def test_the_cause_is_the_exception_of_the_function() -> None:
    with pytest.raises(RewardError) as caught:
        FunctionScorer(failing(with_sample(3), a_key_error), "f").score(PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_generator_raises_like_a_function() -> None:
    def lazily(prompts: list[str], responses: list[str]) -> Any:
        return (1 / (response != "r2") for response in responses)

    assert_names(error_message(lazily), "ZeroDivisionError", "division by zero", "6 responses", *sample(2))


def test_an_error_of_many_lines_and_a_long_sample_are_shortened() -> None:
    def raising(prompts: list[str], responses: list[str]) -> Any:
        raise ValueError("one\n  two")

    with pytest.raises(RewardError) as caught:
        FunctionScorer(raising, "f").score(["q" * 100], ["r\n" * 100])
    prompt, response = "q" * 60, r"r\n" * 30
    assert_names(caught.value, "f", "ValueError", "one two", "sample 0", f"'{prompt}…'", f"'{response}…'")


def test_a_sample_that_hangs() -> None:
    message = error_message(failing(with_sample(4), hang), timeout=1.0)
    assert_names(message, "f", "1 s", "6 responses", *sample(4))


def test_a_timeout_error_of_the_function_is_reported_as_such() -> None:
    def raising(prompts: list[str], responses: list[str]) -> Any:
        raise TimeoutError("the judge is away")

    assert_names(error_message(raising, rows=1), "f", "TimeoutError", "the judge is away", *sample(0))


def test_a_sample_without_a_reward() -> None:
    def skips(prompts: list[str], responses: list[str]) -> list[float]:
        return [1.0 for response in responses if response != "r1"]

    assert_names(error_message(skips), "f", "5 rewards", "6 responses", "0 rewards", *sample(1))


def test_a_value_that_is_no_number_is_found_during_the_search() -> None:
    def other(prompts: list[str], responses: list[str]) -> Any:
        return [1.0] if len(responses) == 6 else ["bad" if response == "r4" else 1.0 for response in responses]

    assert_names(error_message(other), "f", "1 rewards", "6 responses", "'bad'", *sample(4))


def test_a_batch_that_fails_only_as_a_whole() -> None:
    message = error_message(failing(lambda responses: len(responses) == 6, a_key_error))
    assert_names(message, "f", "KeyError", "'user_id'", "6 responses", "whole batch", "6 samples")
    assert "prompt" not in message


def test_two_samples_that_fail_only_together() -> None:
    message = error_message(lambda prompts, responses: [1.0])
    assert_names(message, "f", "1 rewards", "6 responses", "samples 1 to 2", "'q1'", "'r1'")


# ---- exceptions that pass through


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exit_in_the_function_is_an_exit(error: type[BaseException]) -> None:
    def exiting(prompts: list[str], responses: list[str]) -> Any:
        raise error

    with pytest.raises(error):
        FunctionScorer(exiting, "f").score(PROMPTS, RESPONSES)


def test_ctrl_c_ends_the_wait_and_the_thread_does_not_keep_the_process() -> None:
    threads = []

    def hanging(prompts: list[str], responses: list[str]) -> Any:
        threads.append(threading.current_thread())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        hang()

    with pytest.raises(KeyboardInterrupt):
        FunctionScorer(hanging, "f", timeout=60).score(PROMPTS, RESPONSES)
    assert [thread.daemon for thread in threads] == [True]
