"""Grids of cases of which `make test` runs a few and `make test-all` every one."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(everyday: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; all but the everyday ones are marked slow.

    A case is one value, or a tuple of the values of several parameters.
    """
    cases = list(cases)
    missing = [case for case in everyday if case not in cases]
    assert not missing, f"{missing} are no cases"
    return [case if case in everyday else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
