"""Checkpoints: what goes in comes out to the last bit, and no kill, full disk or torn file costs the previous one."""

import hashlib
import json
import logging
import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from facts import assert_names
from torch import nn

from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime import checkpoint
from deep_rlhf.runtime.checkpoint import (
    changed_flags,
    file_digest,
    latest_checkpoint,
    latest_on_all,
    newest_step,
    random_states,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    set_random_states,
)
from deep_rlhf.runtime.history import History
from deep_rlhf.runtime.processes import Runtime


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(folder: Path, state: dict[Any, Any]) -> dict[Any, Any]:
    save_checkpoint(folder, 1, state)
    read = latest_checkpoint(folder)
    assert read is not None
    assert (read.path, read.step) == (folder / "step-1", 1)
    return read.state


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = {
        "nothing": None,
        "flags": [True, False, 0, 1, -(2**70)],
        "floats": [0.1, -0.0, 1e-300, math.inf, -math.inf, math.pi],
        "text": "größer\n\ud7ff",
        3: {"tuple": (1, (2.0, "a"), [None]), 0: {}, -1: [], "1": ()},
    }
    read = saved(tmp_path / "deep" / "run", tree | {"nan": math.nan})
    assert math.isnan(read.pop("nan"))
    assert read == tree
    assert repr(read) == repr(tree)  # True is not 1, -0.0 is not 0.0, and the order stays


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    base = torch.arange(12.0) - 5
    tensors = {
        "kinds": [base.to(kind) for kind in kinds],
        "scalar": torch.tensor(2.5, requires_grad=True),
        "empty": [torch.empty(0), torch.empty(0, 3)],
        "views": [base.view(3, 4).t(), base[2:5], base[4:8], base[::2]],
        "special": torch.tensor([math.nan, -math.inf, -0.0]),
    }
    read = saved(tmp_path, tensors)
    for name in ("kinds", "empty", "views"):
        for before, after in zip(tensors[name], read[name], strict=True):
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            assert torch.equal(after, before)
    assert torch.equal(read["scalar"], tensors["scalar"].detach())
    assert read["special"].view(torch.int32).tolist() == tensors["special"].view(torch.int32).tolist()


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    read = saved(tmp_path, {"embedding": weight, "head": [weight.data]})
    assert read["embedding"] is read["head"][0]
    assert torch.equal(read["embedding"], weight)
    assert (tmp_path / "step-1" / "state.safetensors").stat().st_size < 41_000


def test_an_optimizer_goes_on_from_its_state(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.rand(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_states()}
    save_checkpoint(tmp_path, 1, state)
    step(model, optimizer)
    again, its_optimizer = start()
    read = latest_checkpoint(tmp_path)
    assert read is not None
    again.load_state_dict(read.state["model"])
    its_optimizer.load_state_dict(read.state["optimizer"])
    set_random_states(read.state["random"])
    step(again, its_optimizer)
    assert torch.equal(again.weight, model.weight)


def test_random_states_are_those_of_every_generator(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.standard_normal(),
            torch.rand(3).tolist(),
        ]

    draw()  # leaves half of a pair of normal numbers
    states = saved(tmp_path, random_states())
    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first


@pytest.mark.parametrize("value", [{1, 2}, object(), {(1, 2): 3}, {1.5: 2}])
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        save_checkpoint(tmp_path, 1, {"a": [value]})
    assert names(tmp_path) == []


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none yet") is None
    for step in (8, 9, 10):
        assert save_checkpoint(tmp_path, step, {"step": step}) == tmp_path / f"step-{step}"
    assert names(tmp_path) == ["step-10", "step-9"]
    read = latest_checkpoint(tmp_path)
    assert read is not None
    assert (read.step, read.state) == (10, {"step": 10})
    save_checkpoint(tmp_path, 10, {"step": "again"}, keep=1)
    read = latest_checkpoint(tmp_path)
    assert read is not None
    assert read.state == {"step": "again"}
    assert names(tmp_path) == ["step-10"]
    save_checkpoint(tmp_path, 4, {})  # of a run that went back
    assert names(tmp_path) == ["step-4"]
    remove_checkpoints(tmp_path)
    assert names(tmp_path) == []


def test_what_a_kept_checkpoint_needs_is_kept_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, needs in ((1, []), (2, []), (3, [1]), (4, [1]), (5, [4])):
        save_checkpoint(tmp_path, step, {"step": step}, needs=needs)
    assert names(tmp_path) == ["step-1", "step-4", "step-5"]
    (tmp_path / "step-1" / "state.json").unlink()  # so step 4 is not complete, but step 5 is
    read = latest_checkpoint(tmp_path)
    assert read is not None
    assert read.step == 5
    (tmp_path / "step-5" / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) is None
    assert len(caplog.messages) == 3
    save_checkpoint(tmp_path, 6, {}, keep=None)
    save_checkpoint(tmp_path, 7, {}, keep=None)
    assert {"step-6", "step-7", "step-4"} <= set(names(tmp_path))


def test_a_part_of_a_checkpoint_can_be_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"a": {"x": torch.ones(2)}, "b": [torch.zeros(3)]})
    whole, part = read_checkpoint(path), read_checkpoint(path, keys=["a"])
    assert whole.step == part.step == 3
    assert whole.state.keys() == {"a", "b"}
    assert part.state.keys() == {"a"}
    assert part.state["a"]["x"].tolist() == [1.0, 1.0]
    os.truncate(path / "state.safetensors", 50)
    with pytest.raises(CheckpointError, match=r"step-3' cannot be read \(state.safetensors"):
        read_checkpoint(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\x7f" + path.read_bytes()[-39:]),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "a folder": folder_instead,
    "a pipe": pipe_instead,
    "not a checkpoint's": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["step-2/state.safetensors", "step-2/state.json", "history.jsonl"])
def test_damage_of_any_file_is_named_and_the_newest_whole_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    history = History()
    for step in (1, 2):
        history.add({"step": step})
        save_checkpoint(tmp_path, step, {"weights": torch.full((64,), float(step))}, history=history)
    if file == "history.jsonl" and damage == "a flipped bit":  # in what step 2 added
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content.replace(b"2", b"3"))
    else:
        DAMAGE[damage](tmp_path / file)
    with caplog.at_level(logging.WARNING):
        read = latest_checkpoint(tmp_path)
    assert_names(caplog.messages[0], tmp_path / "step-2", "damaged", Path(file).name)
    with pytest.raises(CheckpointError, match=Path(file).name):
        read_checkpoint(tmp_path / "step-2")
    if file == "history.jsonl" and damage not in ("a flipped bit", "cut"):  # step 1 has lost its rows, too
        assert read is None
        remove_checkpoints(tmp_path)
        assert names(tmp_path) == []
        return
    assert read is not None
    assert (read.step, read.history.rows) == (1, [{"step": 1}])
    assert read.state["weights"].tolist() == [1.0] * 64


def test_every_bit_of_the_tree_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"kl_coef": 0.2})
    tree = tmp_path / "step-1" / "state.json"
    whole = tree.read_bytes()
    for place in range(len(whole)):
        tree.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "step-1")
    tree.write_bytes(whole)
    assert read_checkpoint(tmp_path / "step-1").state == {"kl_coef": 0.2}


def test_a_file_that_does_not_belong_there_is_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    (tmp_path / "step-2" / "notes.txt").write_text("mine")
    (tmp_path / "step-7").write_text("a file")
    with caplog.at_level(logging.WARNING):
        read = latest_checkpoint(tmp_path)
    assert read is not None
    assert read.step == 2
    assert_names(caplog.messages[0], tmp_path / "step-7", "damaged")
    assert_names(caplog.messages[1], "notes.txt", "ignored")


def test_the_history_is_stored_once_and_later_rows_are_cut_off(tmp_path: Path) -> None:
    history = History()
    for step in (1, 2, 3):
        history.add({"step": step, "score": math.inf, "of numpy": np.float32(0.5)})
        save_checkpoint(tmp_path, step, {"step": step}, history=history, keep=None)
    rows = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert not any("score" in (tmp_path / f"step-{step}" / "state.json").read_text() for step in (1, 2, 3))
    back = read_checkpoint(tmp_path / "step-2").history
    assert back.rows == [{"step": step, "score": math.inf, "of numpy": 0.5} for step in (1, 2)]
    back.add({"step": "other"})
    save_checkpoint(tmp_path, 3, {}, history=back)
    rows = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, "other"]
    (tmp_path / "history.jsonl").unlink()  # while the run goes on
    back.add({"step": "last"})
    save_checkpoint(tmp_path, 4, {}, history=back)
    read = latest_checkpoint(tmp_path)
    assert read is not None
    assert [row["step"] for row in read.history.rows] == [1, 2, "other", "last"]


def test_the_oldest_checkpoints_are_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, step, {"step": step}, keep=None)
    removed: list[str] = []
    rmtree = checkpoint.shutil.rmtree

    def note(path: Path, **options: Any) -> None:
        removed.append(path.name) if path.exists() else None
        rmtree(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", note)
    remove_checkpoints(tmp_path)
    assert removed == [".step-8.tmp", ".step-9.tmp", ".step-10.tmp"]  # unnamed, so that a kill leaves no damaged one


def test_an_entry_can_be_read_without_the_tensors(tmp_path: Path) -> None:
    assert newest_step(tmp_path, "updates") is None
    save_checkpoint(tmp_path, 3, {"updates": 8, "w": torch.ones(2)})
    (tmp_path / "step-3" / "state.safetensors").unlink()
    assert newest_step(tmp_path, "updates") == (3, 8)
    (tmp_path / "step-3" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"step-3.*state\.json"):
        newest_step(tmp_path, "updates")


class TwoProcesses:
    """The runtime of process `rank`, whose partner sends `other`."""

    def __init__(self, rank: int, other: list[Any]) -> None:
        self.is_main, self.other = rank == 0, other
        self.raise_first = partial(Runtime.raise_first, self)
        self.from_main = partial(Runtime.from_main, self)

    def gather(self, value: Any) -> list[Any]:
        other = self.other.pop(0)
        return [value, other] if self.is_main else [other, value]


def test_the_main_process_decides_which_checkpoint_is_read(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    runtime: Any = TwoProcesses(1, [tmp_path / "step-1", None])  # it has found the newer one damaged
    found = latest_on_all(tmp_path, runtime)
    assert found is not None
    assert found.step == 1
    assert latest_on_all(tmp_path, TwoProcesses(1, [None, None])) is None  # type: ignore[arg-type]
    failure = CheckpointError("process 1 cannot read it")
    with pytest.raises(CheckpointError, match="process 1"):
        latest_on_all(tmp_path, TwoProcesses(0, [None, failure]))  # type: ignore[arg-type]


STATE = {"weights": torch.arange(50_000.0)}
PLACES = {
    "write": "save_file",
    "json": "file_digest",
    "sync": "sync",
    "rename": "os.rename",
    "rotation": "_checkpoints",
}


def save_and_die(folder: Path, place: str) -> None:
    """SIGKILL at this place of saving step 3: for a process of its own."""
    original = checkpoint.save_file

    def die(*arguments: Any) -> None:
        if place == "write":  # half of the tensors are there
            original(*arguments)
            os.truncate(arguments[1], 100_000)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"deep_rlhf.runtime.checkpoint.{PLACES[place]}", die)
        save_checkpoint(folder, 3, STATE | {"step": 3})


@pytest.mark.processes
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, step, STATE | {"step": step})
    assert processes.run(save_and_die, folder, place, log=tmp_path / "log") == -signal.SIGKILL
    read = latest_checkpoint(folder)
    assert read is not None
    assert read.state["step"] == read.step == (3 if place == "rotation" else 2)
    assert torch.equal(read.state["weights"], STATE["weights"])
    assert caplog.messages == []  # nothing half written bears a checkpoint's name
    save_checkpoint(folder, 3, STATE | {"step": "again"})
    assert names(folder) == ["step-2", "step-3"]


def replace_and_die(folder: Path) -> None:
    """SIGKILL when the new checkpoint of step 5 is about to get the old one's name: for a process of its own."""
    rename = os.rename

    def die_at_the_second(source: Path, target: Path) -> None:
        if target.name == "step-5":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.rename", die_at_the_second)
        save_checkpoint(folder, 5, {"is": "new"}, keep=1)


@pytest.mark.processes
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 5, {"is": "old"}, keep=1)
    assert processes.run(replace_and_die, folder, log=tmp_path / "log") == -signal.SIGKILL
    read = latest_checkpoint(folder)
    assert read is not None
    assert (read.step, read.state) == (5, {"is": "old"})
    save_checkpoint(folder, 5, {"is": "new"}, keep=1)
    assert names(folder) == ["step-5"]


def save_with_little_room(folder: Path, step: int, size: int) -> None:
    """The kernel refuses to write beyond `size` bytes of a file: for a process of its own, whose log has the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        save_checkpoint(folder, step, STATE | {"long": "x" * 400_000})
    except CheckpointError as error:
        print(f"error: {error}")  # noqa: T201
        sys.exit(2)


@pytest.mark.processes
@pytest.mark.parametrize("size", [1_000, 200_200])
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_stays(tmp_path: Path, size: int) -> None:
    """The kernel refuses to write beyond `size` bytes: of the tensors, or of the tree behind them."""
    folder = tmp_path / "checkpoints"

    def error_at(step: int) -> str:
        log = tmp_path / f"log {step}"
        assert processes.run(save_with_little_room, folder, step, size, log=log) == 2
        return log.read_text().partition("error: ")[2].rstrip("\n")

    said = error_at(1)
    assert names(folder) == []
    assert_names(said, "step 1", folder, "File too large", "no earlier checkpoint")
    assert "--resume" not in said

    save_checkpoint(folder, 1, STATE | {"long": "x" * 400_000})
    said = error_at(2)
    assert names(folder) == ["step-1"]
    assert_names(said, "step 2", folder, "File too large", f"{folder / 'step-1'} is intact", "--resume")
    read = latest_checkpoint(folder)
    assert read is not None
    assert read.step == 1


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, {})


def test_changed_flags_are_named_unless_they_are_free() -> None:
    began = {"learning_rate": 1e-5, "output_dir": "a", "seed": 0, "gone": "x", "betas": [0.9]}
    now = {"learning_rate": 1e-3, "output_dir": "b", "seed": 0, "betas": [0.9], "new": None}
    changed = changed_flags(began, now, free={"output_dir", "gone"})
    assert_names(changed, "learning_rate (1e-05", "now 0.001")
    for name in ("gone", "output_dir", "seed", "betas", "new"):
        assert name not in changed
    assert_names(
        changed_flags(began, now, free=["output_dir"]), "gone ('x'", "now None", "learning_rate (1e-05", "now 0.001"
    )
    assert changed_flags(began, dict(began), free=()) == ""


def test_the_tree_is_json_with_the_digests_of_the_tensors_and_of_itself(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, {"a": torch.zeros(2), "b": (1,)})
    text = (path / "state.json").read_text()
    written = json.loads(text)
    content = written["content"]
    assert written["sha256"] == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert content["step"] == 7
    assert content["sha256"] == checkpoint.file_digest(path / "state.safetensors")
    assert content["state"] == {"dict": [["a", {"tensor": "0"}], ["b", {"tuple": [1]}]]}
    assert names(path) == ["state.json", "state.safetensors"]


def test_the_digest_of_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a file"):
        file_digest(tmp_path / "pipe")
