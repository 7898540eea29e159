"""Rewards from a user's Python function; an error in it becomes a RewardError that names the sample."""

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deep_rlhf.errors import RewardError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class FunctionScorer:
    """A user's `function(prompts, responses)` that returns one number per response; a Scorer with one member.

    It runs in a thread of its own, with the caller's gradient mode and CUDA device, for at most `timeout` seconds. NaN
    and infinity are passed on: the trainer checks for them.
    """

    def __init__(
        self, function: Callable[[list[str], list[str]], Iterable[Any]], name: str, *, timeout: float = 600.0
    ) -> None:
        self.function = function
        self.name = name
        self.timeout = timeout

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The function's rewards, [N, 1] float32.

        Raises RewardError, naming the sample, if the function raises, takes too long, or does not return one number per
        response. The sample is found by calling the function on halves, each for at most `timeout` seconds.
        """
        prompts, responses = list(prompts), list(responses)
        try:
            rewards = self._call(prompts, responses)
        except _Failure as failure:
            raise RewardError(self._diagnosis(failure, prompts, responses)) from failure.__cause__
        return torch.tensor(rewards, dtype=torch.float32).reshape(-1, 1)

    def _call(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The function's rewards. Raises _Failure; KeyboardInterrupt, SystemExit and the like pass through."""
        try:
            values = _in_time(self.timeout, lambda: _listed(self.function(list(prompts), list(responses))))
        except _TimeUp:
            raise _Failure(f"did not return within {self.timeout:g} s") from None
        except Exception as error:  # anything that a user's function raises
            raise _Failure(" ".join(f"raised {type(error).__name__}: {error}".split())) from error
        if not isinstance(values, list):
            raise _Failure(f"must return one number per response, but it returned a {type(values).__name__}")
        if len(values) != len(responses):
            raise _Failure(f"returned {len(values)} rewards")
        rewards = []
        for row, value in enumerate(values):
            reward = _number(value)
            if reward is None:
                raise _Failure(f"returned {_cut(' '.join(repr(value).split()))} instead of a number", row)
            rewards.append(reward)
        return rewards

    def _diagnosis(self, failure: "_Failure", prompts: list[str], responses: list[str]) -> str:
        """One sentence: what failed, and for which sample."""
        rows, last = self._narrowed(failure, prompts, responses)
        first, text = rows[0], f"{self.name} {failure.reason}"
        sample = f"prompt {_short(prompts[first])}, response {_short(responses[first])}."
        if last is failure and len(rows) == 1:
            return f"{text} for sample {first}: {sample}"
        text = f"{text} for {len(responses)} responses"
        if last is failure:
            return f"{text}, but for neither half of them: only for the whole batch of {len(responses)} samples."
        same = "does the same" if last.reason == failure.reason else last.reason
        if len(rows) == 1:
            return f"{text}; sample {first} alone {same}: {sample}"
        return f"{text}; the batch of samples {first} to {rows[-1]} {same}, but neither half of it: {sample}"

    def _narrowed(self, failure: "_Failure", prompts: list[str], responses: list[str]) -> tuple[range, "_Failure"]:
        """The smallest part of the batch found by repeated halving that fails, and how it failed."""
        rows = range(len(responses))
        if failure.row is None and len(rows) > 1:
            logger.warning("%s %s: calling it on parts of the batch to find the sample.", self.name, failure.reason)
        while failure.row is None and len(rows) > 1:
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                try:
                    self._call(prompts[half.start : half.stop], responses[half.start : half.stop])
                except _Failure as again:
                    rows, failure = half, again
                    break
            else:
                break
        return (rows if failure.row is None else rows[failure.row : failure.row + 1]), failure


def import_function(spec: str) -> FunctionScorer:
    """Imports `python:module:function`, also from the working directory. Raises RewardError."""
    module_name, _, function_name = spec.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise RewardError(
            f"The reward '{spec}' must have the form python:module:function, such as python:my_rewards:politeness."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # anything that a user's module raises on import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"Cannot import the module '{module_name}' of the reward '{spec}': {reason}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"The module '{module_name}' of the reward '{spec}' has no function '{function_name}'.")
    return FunctionScorer(function, f"{module_name}.{function_name}")


class _Failure(Exception):
    """An error of one call of a user's function, with its row if the returned values show it."""

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.row = row


class _TimeUp(Exception):
    """A call took too long; not a TimeoutError, which a user's function may raise itself."""


def _in_time(seconds: float, call: Callable[[], T]) -> T:
    """Runs `call` in a daemon thread, so that one that hangs blocks neither the caller nor the exit of the program.

    Returns or raises what `call` does, or raises _TimeUp after `seconds`. Ctrl-C ends the wait.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    # both are local to a thread, so the new one gets the caller's
    gradients = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients), torch.cuda.device(device):
                returned.append(call())
        except BaseException as error:  # the caller handles KeyboardInterrupt and SystemExit, too
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise _TimeUp
    return returned[0]


def _listed(returned: Any) -> Any:
    """An iterable's items as a list; anything else, or a tensor without dimensions, unchanged."""
    try:
        items = iter(returned)
    except TypeError:
        return returned
    return list(items)


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor with several elements
        return None


def _short(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
