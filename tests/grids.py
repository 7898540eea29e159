"""Grids of cases of which `make test` runs a few and `make test-all` every one."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(everyday: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; all but the everyday ones are marked slow.

    A case is one value, or a tuple of the values of several parameters. An everyday case is named by all of that or by
    the first value of the tuple.
    """
    marked, found = [], False
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        is_everyday = case in everyday or values[0] in everyday
        found |= is_everyday
        marked.append(pytest.param(*values, marks=[] if is_everyday else pytest.mark.slow))
    assert found, f"none of {everyday} is a case"
    return marked
