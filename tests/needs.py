"""What some tests need beside Python, and skip without; where all must run, they fail instead."""

import os
from typing import NoReturn

import pytest

NEED_ALL = "DEEP_RLHF_TESTS_NEED_ALL"


def skip_or_fail(missing: str) -> NoReturn:
    """Skips the test with this reason; fails it where the environment says that all tests must run."""
    if os.environ.get(NEED_ALL):
        pytest.fail(f"{missing}; with {NEED_ALL} set, no test is skipped for it: try make system.", pytrace=False)
    pytest.skip(missing)
