"""Rewards from a user's Python function; an error in it becomes a RewardError that names the sample."""

import importlib
import inspect
import logging
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deep_rlhf.errors import ConfigError, RewardError
from deep_rlhf.models.guarded_call import CallFailed, call_guarded, cut, one_line

logger = logging.getLogger(__name__)

TIMEOUT = 600.0  # seconds
LARGEST = torch.finfo(torch.float32).max
NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # iterables whose items are not rewards in the order of the responses


class FunctionScorer:
    """A user's `function(prompts, responses)` that returns one number per response; a Scorer with one member.

    It runs in a thread of its own, with the caller's gradient mode and CUDA device, for at most `timeout` seconds. NaN
    and infinity are passed on: the trainer checks for them.
    """

    def __init__(
        self, function: Callable[[list[str], list[str]], Iterable[Any]], name: str, *, timeout: float = TIMEOUT
    ) -> None:
        """Raises RewardError if `function` cannot be called with prompts and responses, ConfigError for `timeout`."""
        if not timeout > 0:
            raise ConfigError(f"timeout={timeout} must be a number of seconds greater than 0.")
        _check_function(function, name)
        self.function = function
        self.name = name
        self.timeout = timeout

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The function's rewards, [N, 1] float32.

        Raises RewardError, naming the sample, if the function raises anything (also SystemExit), takes too long, or
        does not return one number per response. The sample is found by calling the function on halves, each for at
        most `timeout` seconds.
        """
        prompts, responses = list(prompts), list(responses)
        if not responses:
            return torch.zeros(0, 1)
        try:
            rewards = self._call(prompts, responses)
        except CallFailed as failure:
            raise RewardError(self._diagnosis(failure, prompts, responses)) from failure.__cause__
        return torch.tensor(rewards, dtype=torch.float32).reshape(-1, 1)

    def _call(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The function's rewards. Raises CallFailed."""
        # in the guarded call, too: what is returned may be endless, and its numbers may be code of the user's
        return call_guarded(
            self.timeout, lambda: _rewards(self.function(list(prompts), list(responses)), len(responses))
        )

    def _diagnosis(self, failure: CallFailed, prompts: list[str], responses: list[str]) -> str:
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

    def _narrowed(self, failure: CallFailed, prompts: list[str], responses: list[str]) -> tuple[range, CallFailed]:
        """The smallest part of the batch found by repeated halving that fails, and how it failed."""
        rows = range(len(responses))
        if failure.row is None and len(rows) > 1:
            logger.warning("%s %s: calling it on parts of the batch to find the sample.", self.name, failure.reason)
        while failure.row is None and len(rows) > 1:
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                try:
                    self._call(prompts[half.start : half.stop], responses[half.start : half.stop])
                except CallFailed as again:
                    rows, failure = half, again
                    break
            else:
                break
        return (rows if failure.row is None else rows[failure.row : failure.row + 1]), failure


def import_function(spec: str, *, timeout: float = TIMEOUT) -> FunctionScorer:
    """Imports `python:module:function`, also from the working directory, within `timeout` seconds.

    Raises RewardError.
    """
    module_name, _, function_name = spec.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise RewardError(
            f"The reward '{spec}' must have the form python:module:function, such as python:my_rewards:politeness."
        )

    def load() -> Any:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module_name), function_name, None)

    try:
        function = call_guarded(timeout, load)
    except CallFailed as failure:
        raise RewardError(
            f"The import of the module '{module_name}' for the reward '{spec}' {failure.reason}: correct the module, or"
            " start the command in its folder."
        ) from failure.__cause__
    if not callable(function):
        raise RewardError(f"The module '{module_name}' of the reward '{spec}' has no function '{function_name}'.")
    return FunctionScorer(function, f"{module_name}.{function_name}", timeout=timeout)


def _check_function(function: Any, name: str) -> None:
    """Raises RewardError for what cannot be a reward function; what it returns is known only when it is called."""
    must = f"The reward {name} must be a function of (prompts, responses) that returns one number per response"
    if inspect.isclass(function):
        raise RewardError(f"{must}, and it is a class: give a function or an object with a method `score`.")
    if not callable(function):
        raise RewardError(f"{must}, and it is a {type(function).__name__}.")
    for called in (function, type(function).__call__):
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise RewardError(f"{must}, and it is async: call asyncio.run in a plain function.")
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except Exception:  # functions written in C, and signatures that are the user's code
        return
    try:
        signature.bind([], [])
    except TypeError:
        raise RewardError(f"{must}, and its parameters are ({', '.join(signature.parameters)}).") from None


def _rewards(returned: Any, count: int) -> list[float]:
    """The `count` rewards that a function returned. Raises CallFailed."""
    no_list = f"must return one number per response, but it returned a {type(returned).__name__}"
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that it was never awaited
    if isinstance(returned, NO_LISTS) or hasattr(returned, "columns"):  # a data frame iterates over column names
        raise CallFailed(no_list)
    try:
        items = iter(returned)
    except TypeError:
        raise CallFailed(no_list) from None
    values = list(islice(items, count + 1))
    if len(values) > count:
        raise CallFailed("returned more than one reward per response")
    if len(values) < count:
        raise CallFailed(f"returned {len(values)} rewards")
    rewards = []
    for row, value in enumerate(values):
        reward = _number(value)
        if reward is None:
            raise CallFailed(f"returned {_shown(value)} instead of a number", row)
        if LARGEST < abs(reward) < math.inf:
            raise CallFailed(f"returned {reward:g}, which is too large for a reward in float32", row)
        rewards.append(reward)
    return rewards


def _number(value: Any) -> float | None:
    """A real number, or an array with one element, as a float; None for anything else."""
    try:
        # float() of an array with dimensions fails in numpy, and of a tensor with a gradient warns
        if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
            value = value.item()
        if isinstance(value, (str, bytes, bytearray)):
            return None
        if isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
            return None
        return float(value)
    except Exception:  # the value may be of a class of the user's
        return None


def _shown(value: Any) -> str:
    """The value's repr in one short line, or its type where that raises or is an address."""
    try:
        text = one_line(repr(value))
    except BaseException:
        text = ""
    return cut(text) if text and not text.startswith("<") else f"a {type(value).__name__}"


def _short(text: str) -> str:
    return repr(cut(text))
