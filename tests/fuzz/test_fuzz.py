"""Commands on damaged input: a sentence and exit code 2, or a right result; never a traceback, a hang or a loss.

`make fuzz` and `make kill` do the same with any seed.
"""

import json
from pathlib import Path

import processes
import pytest

from fuzz import kills
from fuzz.__main__ import search
from fuzz.kinds import KINDS

pytestmark = pytest.mark.processes

SEED = 1


def failures(tmp_path: Path, *, seed: int, cases: int, jobs: int) -> list[str]:
    """What the cases find, in a process that has no threads."""
    log, found, kinds = tmp_path / "log", tmp_path / "found.json", frozenset(KINDS)
    code = processes.run(search, tmp_path / "fuzz", seed, cases, kinds, jobs, found, log=log, seconds=3000)
    assert code == 0, log.read_text()
    result: list[str] = json.loads(found.read_text())
    return result


def test_a_sample_of_damaged_input(tmp_path: Path) -> None:
    assert failures(tmp_path, seed=SEED, cases=60, jobs=1) == []


@pytest.mark.slow
def test_a_thousand_cases_of_damaged_input(tmp_path: Path) -> None:
    assert failures(tmp_path, seed=SEED + 1, cases=1000, jobs=2) == []


@pytest.mark.slow
@pytest.mark.parametrize("chain", kills.CHAINS)
def test_a_run_killed_at_random_times_ends_as_one_that_was_not(chain: str, tmp_path: Path) -> None:
    log, count = tmp_path / "log", -(-kills.KILLS // len(kills.CHAINS))
    code = processes.run(kills.compare, tmp_path / "runs", SEED, count, [chain], log=log, seconds=900)
    assert code == 0, log.read_text()
