"""The label-efficiency benchmark: a small run of either kind, what is equal for both, and going on after a stop."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import curves

TINY = replace(curves.QUICK, counts=(16,), refits=(8, 16), seeds=(1, 2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online, variance", "offline, random"])
def test_a_run_passes_through_every_number_of_labels(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = curves.one_run(name, 1, TINY)
    assert [point["labels"] for point in run["points"]] == [0, 16]
    assert all(0 <= point["gold"] <= 1 for point in run["points"])
    assert run["points"][0]["kl"] == 0 != run["points"][1]["kl"]


def test_online_and_offline_have_as_many_updates() -> None:
    scale = curves.Scale()
    assert [scale.updates_at(count) for count in scale.counts] == [8, 16, 24, 32, 40]
    schedule = curves.InSteps(scale)
    assert [schedule.due(step, 40) for step in (0, 3, 4, 39)] == [25, 25, 50, 800]


def points(name: str, seed: int) -> dict[str, Any]:
    """Scores that say which run they are of."""
    score = curves.RUNS.index(name) / 10 + seed / 100
    found = [{"labels": labels, "gold": score, "kl": 0.0} for labels in (0, 16)]
    return {"name": name, "seed": seed, "points": found, "seconds": 1.0}


def test_a_stopped_benchmark_goes_on_and_draws_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def one(name: str, seed: int, options: Sequence[str]) -> None:
        made.append((name, seed))
        curves.write(tmp_path / "parts" / curves.part(name, seed), points(name, seed))

    monkeypatch.setattr(curves, "QUICK", TINY)
    monkeypatch.setattr(curves, "run_in_process", one)
    monkeypatch.setattr(curves, "start_policy", lambda scale: tmp_path)
    done = points(curves.RUNS[1], 2)
    curves.write(tmp_path / "parts" / curves.part(curves.RUNS[1], 2), done)
    flags = ["--quick", f"--parts={tmp_path / 'parts'}", f"--results={tmp_path / 'r.json'}"]
    monkeypatch.setattr(sys, "argv", ["curves.py", *flags, f"--image={tmp_path / 'c.png'}"])
    curves.main()
    assert len(made) == 7
    assert (curves.RUNS[1], 2) not in made
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results["runs"]) == 8
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    assert "| offline, random | 0.315 (0.310–0.320) |" in curves.table(results["runs"], TINY)
