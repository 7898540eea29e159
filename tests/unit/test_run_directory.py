"""The folder of a run: one JSON object a line, and never half a file."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
from facts import assert_names

from deep_rlhf.cli.flags import output_folder, save_config
from deep_rlhf.errors import CheckpointError
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
    save_config(again.path / "config.yaml")  # it is the folder of a run
    again.start()
    assert [file.name for file in again.path.iterdir()] == ["config.yaml"]  # the log of a run without a result
    again.add_metrics({"step": 1.0})
    assert lines(again.path / "metrics.jsonl") == [{"step": 1.0}]
    assert not (again.path / "samples.jsonl").exists()
    again.write_metrics([{"step": 5}])
    assert lines(again.path / "metrics.jsonl") == [{"step": 5}]


LOGGED = [
    {"metrics": {"step": 1, "loss": math.nan}, "samples": []},
    {"metrics": {"step": 2, "loss": 0.5}, "samples": [{"step": 2, "response": "línea\u2028una"}]},
]
METRICS = '{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n'
SAMPLES = '{"step": 2, "response": "línea\u2028una"}\n'


@pytest.mark.parametrize(
    ("metrics", "is_damaged"),
    [
        (METRICS, False),
        (METRICS + '{"step": 3}\n{"step": 4, "lo', False),  # killed later
        (METRICS[:-5], True),
        (METRICS.replace("0.5", "0.6"), True),
        ("\0" * 9, True),
        (None, True),
    ],
)
def test_a_resumed_run_has_the_lines_of_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metrics: str | None, is_damaged: bool
) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "samples.jsonl").write_text(SAMPLES)
    write_summary(tmp_path / "summary.json", {})
    run = RunDirectory(tmp_path)
    run.resume(LOGGED)
    assert (tmp_path / "metrics.jsonl").read_text() == METRICS
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8") == SAMPLES
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
    assert [("metrics.jsonl" in message) for message in caplog.messages] == [True] * is_damaged


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


RUN = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "model/config.json")


def test_the_results_of_an_earlier_run_are_set_aside(tmp_path: Path) -> None:
    make(tmp_path, *RUN, "best/config.json", "bad_batches/step-1.json", "notes.txt", "checkpoints/step-1/state.json")
    RunDirectory(tmp_path).start()
    kept = {"notes.txt", "checkpoints/step-1/state.json"}
    aside = {f"earlier_run/{name}" for name in (*RUN, "best/config.json", "bad_batches/step-1.json")}
    assert files(tmp_path) == kept | aside
    make(tmp_path, "config.yaml", "metrics.jsonl")  # a run that was stopped before it had a result
    RunDirectory(tmp_path).start()
    assert files(tmp_path) == kept | aside | {"config.yaml"}
    make(tmp_path, "model/second", "summary.json")
    RunDirectory(tmp_path).start()
    assert files(tmp_path) == kept | {f"earlier_run/{name}" for name in ("model/second", "summary.json", "config.yaml")}


def test_a_move_that_was_killed_is_completed_without_loss(tmp_path: Path) -> None:
    make(tmp_path, *RUN, "earlier_run/best/config.json")  # moved before, and the settings were not
    RunDirectory(tmp_path).start()
    assert files(tmp_path) == {f"earlier_run/{name}" for name in (*RUN, "best/config.json")}
    make(tmp_path / "other", *RUN, "earlier_run/model/mine")  # not of a run
    RunDirectory(tmp_path / "other").start()
    assert "earlier_run/model/mine" in files(tmp_path / "other")
    assert "earlier_run-2/model/config.json" in files(tmp_path / "other")


def test_what_is_not_of_a_run_stays(tmp_path: Path) -> None:
    mine = ("model/config.json", "metrics.jsonl", "summary.json", "reward_model.json", "model.safetensors")
    make(tmp_path, *mine)  # no settings of a run
    RunDirectory(tmp_path).start()
    assert files(tmp_path) == set(mine)
    make(tmp_path / "project", "config.yaml", "model/config.json")  # settings of something else
    RunDirectory(tmp_path / "project").start()
    assert files(tmp_path / "project") == {"config.yaml", "model/config.json"}
    (tmp_path / "project" / "config.yaml").write_text("output_dir: x\nresume: false\n")  # of a run that failed at once
    RunDirectory(tmp_path / "project").start()
    assert files(tmp_path / "project") == {"earlier_run/config.yaml", "earlier_run/model/config.json"}


def test_what_the_new_run_reads_stays(tmp_path: Path) -> None:
    reward = ("reward_model.json", "config.json", "model.safetensors", "tokenizer.json")
    make(tmp_path, *RUN, *reward)
    RunDirectory(tmp_path).start([str(tmp_path / "model"), str(tmp_path)])
    assert {"model/config.json", *reward} <= files(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    make(tmp_path, "config.yaml")
    RunDirectory(tmp_path).start(["elsewhere"])
    assert files(tmp_path) == {f"earlier_run/{name}" for name in ("config.yaml", "model/config.json", *reward)}


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl", "config.yaml", "model.safetensors"])
def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError) as told:
        RunDirectory(tmp_path)
    assert_names(told.value, tmp_path / name, "folder", "output_dir")


def test_a_pipe_in_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError) as told:
        output_folder(tmp_path)
    assert_names(told.value, tmp_path / "config.json", "pipe", "output_dir")


@pytest.mark.parametrize("name", ["model", "checkpoints", "best"])
def test_a_file_with_the_name_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError) as told:
        output_folder(tmp_path)
    assert_names(told.value, tmp_path / name, "file", "output_dir")


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


def test_a_summary_that_the_disk_refuses_leaves_the_earlier_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_summary(tmp_path / "summary.json", {"seconds": 1})
    monkeypatch.setattr("deep_rlhf.runtime.run_directory.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_summary(tmp_path / "summary.json", {"seconds": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"seconds": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


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
