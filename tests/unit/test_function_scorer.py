"""A user's reward function: its numbers are passed on, and an error in it names the sample."""

import functools
import io
import itertools
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from facts import assert_names

from deep_rlhf.cli.console import lasting_output
from deep_rlhf.errors import ConfigError, RewardError
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


# ---- a function cannot end, hang, move or mislead the program


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), SystemExit(0), GeneratorExit(), BaseException()])
@pytest.mark.parametrize("lazily", [False, True])
def test_whatever_the_function_raises_is_an_error_of_the_reward(error: BaseException, lazily: bool) -> None:
    def raising(prompts: list[str], responses: list[str]) -> Any:
        raise error

    def yielding(prompts: list[str], responses: list[str]) -> Any:
        yield 1.0
        raise error

    rows = 3 if lazily else 1
    assert_names(error_message(yielding if lazily else raising, rows=rows), "f", type(error).__name__, *sample(0))


class Hostile:
    """A value whose conversion to a number, text and iterator each do what a test wants."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __float__(self) -> float:
        return self.act()

    def __repr__(self) -> str:
        return self.act()

    def __iter__(self) -> Any:
        return self.act()


class HostileError(Exception):
    def __str__(self) -> str:
        raise ValueError("no message")


def raise_hostile_error() -> Any:
    raise HostileError


@pytest.mark.parametrize("act", [a_key_error, raise_hostile_error, lambda: "text", lambda: 1j, lambda: None])
def test_a_value_whose_methods_raise_or_return_the_wrong_type(act: Callable[[], Any]) -> None:
    message = error_message(lambda prompts, responses: [1.0, Hostile(act)], rows=2)
    assert_names(message, "f", "instead of a number", *sample(1))


def test_a_value_without_a_text_of_its_own_is_named_by_its_type() -> None:
    message = error_message(lambda prompts, responses: [object()], rows=1)
    assert_names(message, "f", "a object", *sample(0))
    assert "0x" not in message


def test_control_characters_in_an_error_are_escaped() -> None:
    def raising(prompts: list[str], responses: list[str]) -> Any:
        raise ValueError("a\n\x1b[2Jb\0\ud800")

    assert r"a \x1b[2Jb\x00\ud800" in error_message(raising, rows=1)


def test_a_value_whose_methods_exit() -> None:
    assert_names(error_message(lambda prompts, responses: [Hostile(exit)], rows=1), "f", "SystemExit", *sample(0))


def test_a_value_whose_conversion_hangs() -> None:
    message = error_message(lambda prompts, responses: [Hostile(hang)], rows=1, timeout=0.2)
    assert_names(message, "f", "0.2 s", *sample(0))


@pytest.mark.parametrize("act", [a_key_error, raise_hostile_error, exit, lambda: 5])
def test_an_iterator_that_cannot_be_made(act: Callable[[], Any]) -> None:
    assert_names(error_message(lambda prompts, responses: Hostile(act), rows=1), "f", *sample(0))


@pytest.mark.parametrize("endless", [itertools.count, lambda: iter(float, 1), lambda: itertools.repeat(1.0)])
def test_an_endless_iterator_is_too_many_rewards(endless: Callable[[], Any]) -> None:
    message = error_message(lambda prompts, responses: endless())
    assert_names(message, "f", "more than one reward per response", *sample(0))


def test_an_endless_loop_is_ended() -> None:
    threads = []

    def endless(prompts: list[str], responses: list[str]) -> Any:
        threads.append(threading.current_thread())
        while True:
            pass

    assert_names(error_message(endless, rows=1, timeout=0.2), "f", "0.2 s")
    threads[0].join(60)
    assert not threads[0].is_alive()


@pytest.mark.parametrize(
    "returned",
    [
        {0: 1.0, 1: 2.0},
        {0: 1.0, 1: 2.0}.keys(),
        {1.0, 2.0},
        frozenset((1.0, 2.0)),
        "12",
        b"\x01\x02",
        bytearray(2),
    ],
)
def test_an_iterable_that_is_no_list_of_rewards(returned: Any) -> None:
    assert_names(error_message(lambda prompts, responses: returned, rows=2), "f", type(returned).__name__)


def test_a_data_frame_is_no_list_of_rewards() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([[0.5, 1.5], [2.5, 3.5]])  # iterates over its column names, 0 and 1
    assert_names(error_message(lambda prompts, responses: frame, rows=2), "f", "DataFrame")
    assert FunctionScorer(lambda prompts, responses: frame[1], "f").score(["", ""], ["", ""]).tolist() == [[1.5], [3.5]]


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (10**30, 1e30),
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_of_every_kind(value: Any, reward: float) -> None:
    assert FunctionScorer(lambda prompts, responses: [value], "f").score([""], [""]).item() == pytest.approx(reward)


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", b"1", 1j, np.complex64(1), np.array("1.5"), np.array([1j]), np.datetime64("2024-01-01")),
        *(torch.tensor(1j), torch.ones((), device="meta"), torch.ones(2), np.ones((2, 2)), [1.0], {}, object),
        *(Decimal("sNaN"), pytest.param(10**5000, id="huge"), np.ma.array([1, 2])),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_of_every_other_kind(value: Any) -> None:
    message = error_message(lambda prompts, responses: [1.0, value], rows=2)
    assert_names(message, "f", "instead of a number", *sample(1))


@pytest.mark.parametrize("value", [1e39, -1e300, 10**40])
def test_a_finite_reward_that_float32_cannot_hold(value: float) -> None:
    message = error_message(lambda prompts, responses: [1.0, value], rows=2)
    assert_names(message, "f", "too large", "float32", *sample(1))


def test_a_list_that_the_function_changes_later_is_read_once() -> None:
    kept = [1.0]

    def keeps(prompts: list[str], responses: list[str]) -> list[float]:
        return kept

    scores = FunctionScorer(keeps, "f").score(["q"], ["r"])
    kept[0] = 7.0
    assert scores.tolist() == [[1.0]]


def test_no_responses_have_no_rewards() -> None:
    assert FunctionScorer(lambda prompts, responses: a_key_error(), "f").score([], []).shape == (0, 1)


def test_what_a_function_sets_for_the_process_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (os.getcwd(), sys.stdout, sys.getrecursionlimit(), torch.get_num_threads(), os.environ["PATH"])
    monkeypatch.setenv("OF_THE_FUNCTION", "")
    (tmp_path / "there").mkdir()

    def sets(prompts: list[str], responses: list[str]) -> list[float]:
        os.chdir(tmp_path / "there")
        (tmp_path / "there").rmdir()
        sys.stdout = io.StringIO()
        sys.setrecursionlimit(500)
        warnings.simplefilter("error")
        os.umask(0o777)
        os.environ.pop("PATH")
        os.environ["OF_THE_FUNCTION"] = "stays"
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        torch.inference_mode(True).__enter__()
        torch.set_num_threads(before[3] + 1)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        torch.autograd.set_detect_anomaly(True)
        return [1.0]

    with warnings.catch_warnings(record=True):
        for fails in (False, True):
            if fails:
                error_message(lambda prompts, responses: [*sets(prompts, responses), a_key_error()], rows=1)
                (tmp_path / "there").mkdir(exist_ok=True)
            else:
                assert FunctionScorer(sets, "f").score(["q"], ["r"]).tolist() == [[1.0]]
                (tmp_path / "there").mkdir()
            after = (os.getcwd(), sys.stdout, sys.getrecursionlimit(), torch.get_num_threads(), os.environ["PATH"])
            assert after == before
            assert os.environ["OF_THE_FUNCTION"] == "stays"
            (tmp_path / f"file {fails}").touch()
            assert (tmp_path / f"file {fails}").stat().st_mode & 0o600 == 0o600
            assert (torch.get_default_dtype(), torch.ones(1).device.type) == (torch.float32, "cpu")
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_anomaly_enabled()
            warnings.warn("no error", stacklevel=1)


def test_a_function_that_closes_the_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    def closes(prompts: list[str], responses: list[str]) -> list[float]:
        sys.stdout.close()
        return [1.0]

    assert_names(error_message(closes, rows=1), "f", "closed the standard output")


def test_a_command_still_prints_after_a_function_that_closes_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output() as out:
        scorer = FunctionScorer(lambda prompts, responses: [sys.stdout.close() or 1.0], "f")
        assert scorer.score(["q"], ["r"]).item() == 1.0
        out.write("done")
    assert capsys.readouterr().out == "done"


def test_a_function_that_removes_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def removes(prompts: list[str], responses: list[str]) -> list[float]:
        os.chdir(tmp_path)
        (tmp_path / "here").rmdir()
        return [1.0]

    assert_names(error_message(removes, rows=1), "f", f"'{tmp_path / 'here'}'")


async def coroutine(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


async def async_generator(prompts: list[str], responses: list[str]) -> Any:
    yield 1.0


class AsyncCallable:
    async def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [1.0] * len(responses)


@pytest.mark.parametrize(
    ("function", "fact"),
    [
        (5, "int"),
        (None, "NoneType"),
        (AsyncCallable, "class"),
        (AsyncCallable(), "async"),
        (coroutine, "async"),
        (async_generator, "async"),
        (functools.partial(coroutine), "async"),
        (lambda responses: [], "(responses)"),
        (lambda prompts, responses, answers: [], "(prompts, responses, answers)"),
        (lambda: [], "()"),
    ],
)
def test_what_is_no_function_of_prompts_and_responses_is_refused_at_the_start(function: Any, fact: str) -> None:
    with pytest.raises(RewardError) as caught:
        FunctionScorer(function, "f")
    assert_names(caught.value, "f", fact)


def test_a_decorated_function_is_asked_for_its_own_parameters() -> None:
    def with_judge(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *given: function(*given, 2.0))

    scorer = FunctionScorer(with_judge(lambda prompts, responses, judge: [judge] * len(responses)), "f")
    assert scorer.score(["q"], ["r"]).item() == 2.0


@pytest.mark.filterwarnings("error")
def test_a_coroutine_in_place_of_rewards() -> None:
    assert_names(error_message(lambda prompts, responses: coroutine(prompts, responses), rows=1), "f", "coroutine")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("def reward(:", ("SyntaxError", "line 1")),
        ("\0", ("SyntaxError",)),
        ("import sys\nsys.exit(0)", ("SystemExit", "0")),
        ("raise KeyboardInterrupt", ("KeyboardInterrupt",)),
        ("raise GeneratorExit", ("GeneratorExit",)),
        ("import threading\nthreading.Event().wait()", ("1 s",)),
        ("def __getattr__(name):\n    raise SystemExit", ("SystemExit",)),
        ("class reward: ...", ("class",)),
        ("async def reward(prompts, responses): ...", ("async",)),
        ("reward = [1.0]", ("no function 'reward'",)),
        ("def reward(text): ...", ("(text)",)),
    ],
)
def test_a_module_that_cannot_give_a_function(
    text: str, facts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"a_bad_reward_{abs(hash(text))}"  # its own, since a module that hangs is locked
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError) as caught:
        load_scorer(f"python:{name}:reward", timeout=1.0)
    assert_names(caught.value, *facts)


def test_a_module_that_changes_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_moving_reward.py").write_text("import os\nos.chdir('/')\nreward = lambda prompts, responses: [1]")
    monkeypatch.chdir(tmp_path)
    assert load_scorer("python:a_moving_reward:reward").score(["q"], ["r"]).item() == 1
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_a_time_limit_that_is_none(seconds: float) -> None:
    with pytest.raises(ConfigError):
        FunctionScorer(lambda prompts, responses: [], "f", timeout=seconds)


def test_a_time_limit_that_no_clock_holds() -> None:
    assert FunctionScorer(lambda prompts, responses: [1.0], "f", timeout=math.inf).score(["q"], ["r"]).item() == 1.0


def test_ctrl_c_ends_the_wait_and_the_thread_does_not_keep_the_process() -> None:
    threads = []

    def hanging(prompts: list[str], responses: list[str]) -> Any:
        threads.append(threading.current_thread())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        hang()

    with pytest.raises(KeyboardInterrupt):
        FunctionScorer(hanging, "f", timeout=60).score(PROMPTS, RESPONSES)
    assert [thread.daemon for thread in threads] == [True]
