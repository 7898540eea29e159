"""The folder of a run: one JSON object a line, and never half a file."""

import json
import math
import os
from pathlib import Path

import pytest

from deep_rlhf.runtime.run_directory import RunDirectory, replace_folder, write_summary


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_and_samples_are_lines_and_a_new_run_starts_afresh(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep" / "run")
    run.add_metrics({"step": 1.0, "kl": 0.5})
    run.add_metrics({"step": 2.0, "kl": math.nan, "nested": {"a": [1.0, math.inf]}})
    run.add_samples([{"prompt": "línea\nuna", "response": "…"}, {"prompt": "b", "response": ""}])
    assert lines(run.path / "metrics.jsonl") == [
        {"step": 1.0, "kl": 0.5},
        {"step": 2.0, "kl": None, "nested": {"a": [1.0, None]}},
    ]
    assert lines(run.path / "samples.jsonl")[0] == {"prompt": "línea\nuna", "response": "…"}
    assert "línea" in (run.path / "samples.jsonl").read_text(encoding="utf-8")
    again = RunDirectory(run.path)
    assert list(again.path.iterdir()) == []
    again.add_metrics({"step": 1.0})
    assert [file.name for file in again.path.iterdir()] == ["metrics.jsonl"]  # no samples, no file of them
    assert lines(again.path / "metrics.jsonl") == [{"step": 1.0}]


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3, 10):
        run.add_metrics({"step": step, "loss": 1 / step})
    run.add_samples([{"step": 2, "response": "línea\u2028una"}, {"step": 3, "response": "b"}])
    write_summary(tmp_path / "summary.json", {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while it was written
    again = RunDirectory(tmp_path, resume_from=2)
    again.add_metrics({"step": 3, "loss": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert samples == '{"step": 2, "response": "línea\u2028una"}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_run_resumed_before_its_first_line_has_no_lines(tmp_path: Path) -> None:
    again = RunDirectory(tmp_path / "new", resume_from=0)
    assert list(again.path.iterdir()) == []
    again.add_metrics({"step": 1})
    RunDirectory(tmp_path / "new", resume_from=0)
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""


def test_summary_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_summary(path, {"seconds": 1.5, "text": "größer", "bad": -math.inf})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seconds": 1.5, "text": "größer", "bad": None}
    with pytest.raises(TypeError):
        write_summary(path, {"seconds": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["seconds"] == 1.5  # the old one still stands
    write_summary(path, {"seconds": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "seconds": 2\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def writer(text: str, fails: bool = False) -> None:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / text).write_text(text)
            if fails:
                raise OSError("no room")

        replace_folder(tmp_path / "model", write)

    writer("first")
    with pytest.raises(OSError, match="no room"):
        writer("second", fails=True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["first"]
    writer("third")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["third"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model").rename(tmp_path / ".model.old")  # as a kill between the two renames leaves it
    with pytest.raises(OSError, match="no room"):
        writer("fourth", fails=True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["third"]


def test_a_folder_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    named: list[str] = []
    fsync, rename = os.fsync, os.rename

    def write(folder: Path) -> None:
        (folder / "held_out").mkdir(parents=True)
        (folder / "held_out" / "weights").write_text("w")

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= synced
        named.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    replace_folder(tmp_path / "version-1", write)
    assert named == ["version-1"]
