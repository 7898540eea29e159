"""The reward command, killed at any moment and resumed, ends as one that nothing stopped: to the last bit."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures import write_gpt2, write_jsonl
from grids import slow_but
from killed_runs import COMMAND, RUNS, STEPS, WHOLE
from stopped_runs import Runs

from deep_rlhf.cli.reward import main
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import sft_pairs
from deep_rlhf.errors import UserError

UNSTOPPED = {"epoch": "whole epoch", "ending": "whole ending", "model full": "whole ending", "lora": "whole lora"}
EVERYDAY = ("update", "rotation", "interrupt")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of `killed_runs`, in a folder with what they need."""
    folder = tmp_path_factory.mktemp("killed")
    write_gpt2(folder / "gpt2")
    (folder / "pairs").mkdir()
    rng, answers = random.Random(0), sft_pairs(100, seed=1)
    rows = [
        {
            "chosen": HH.prompt(prompt) + HH.response(answer),
            "rejected": HH.prompt(prompt) + HH.response(rng.choice(answers)[1]),
        }
        for prompt, answer in answers[:60]
    ]
    write_jsonl(folder / "pairs" / "train.jsonl", rows[:48])
    write_jsonl(folder / "pairs" / "test.jsonl", rows[48:])
    return Runs(folder, "killed_runs", RUNS, WHOLE)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without the seconds it took."""
    timed = ("runtime", "per_second")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if (path / "manifest.json").exists())


@pytest.mark.parametrize("name", slow_but(EVERYDAY, RUNS))
def test_a_stopped_run_goes_on_to_the_same_end(runs: Runs, name: str) -> None:
    resumed, unstopped = runs.resumed(name), runs.whole(UNSTOPPED.get(name, "whole"))
    assert metrics(resumed) == metrics(unstopped)
    for file in ("model.safetensors", "reward_model.json"):
        assert (resumed / file).read_bytes() == (unstopped / file).read_bytes()


def test_the_run_to_compare_with_learns_and_does_not_end_with_its_best(runs: Runs) -> None:
    rows = metrics(runs.whole("whole"))
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row][:-1]  # the last is of the model that is kept
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12]
    assert len(losses) == len(set(losses)) == 6
    assert losses.index(min(losses)) not in (0, 5)


@pytest.mark.parametrize(
    ("name", "left"),
    slow_but(
        EVERYDAY,
        [
            ("first update", []),
            ("update", ["checkpoint-2", "checkpoint-4"]),
            ("interrupt", ["checkpoint-4", "checkpoint-5"]),
        ],
    ),
)
def test_what_a_stopped_run_leaves(runs: Runs, name: str, left: list[str]) -> None:
    assert checkpoints(runs.stopped(name)) == left


@pytest.mark.parametrize(
    ("name", "words"),
    slow_but(
        EVERYDAY,
        [
            ("first update", "There is no whole checkpoint in first update: the run starts from the beginning."),
            ("update", "Going on from update/checkpoint-4."),
            ("file", "The checkpoint file/checkpoint-8 is skipped: it is torn (it has no manifest.json)."),
            ("rename", "The checkpoint rename/checkpoint-6 is skipped: it is torn (it has no manifest.json)."),
            (
                "torn",
                "The checkpoint torn/checkpoint-8 is skipped: it is torn (model.safetensors is not what was written).",
            ),
            ("interrupt", "Stopped after update 5: the same command with --resume goes on from there."),
            ("interrupt", "Going on from interrupt/checkpoint-5."),
            ("best", "Going on from best/checkpoint-11."),
            ("ending", "Going on from ending/checkpoint-4."),
        ],
    ),
)
def test_a_resumed_run_says_where_it_begins(runs: Runs, name: str, words: str) -> None:
    assert words in runs.log(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [("weights full", "File too large"), ("optimizer full", "the disk did not take a whole file")],
)
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_stays(runs: Runs, name: str, why: str) -> None:
    (error,) = [line for line in runs.log(name).splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: The checkpoint of update 8 could not be written to {name} (")
    assert why in error
    assert f"the previous checkpoint {name}/checkpoint-6 is intact" in error
    assert not list(runs.stopped(name).glob("checkpoint-8"))
    assert f"Going on from {name}/checkpoint-6." in runs.log(name)


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_told_and_the_model_can_still_be_had(runs: Runs) -> None:
    log = runs.log("model full")
    assert "error: The reward model could not be written to model full (" in log
    assert "Going on from model full/checkpoint-4." in log


def test_changed_flags_and_data_are_named(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.folder)
    shutil.copytree(runs.stopped("update"), tmp_path / "moved")
    (runs.folder / "fewer").mkdir()
    for split in ("train", "test"):
        lines = (runs.folder / "pairs" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (runs.folder / "fewer" / f"{split}.jsonl").write_text("".join(lines[:-1] if split == "train" else lines))
    changed = ["--learning_rate=1e-3", "--dataset_name=fewer", "--run_name=other"]
    with pytest.raises(UserError) as told:
        main([*COMMAND[1:], *STEPS, f"--output_dir={tmp_path / 'moved'}", "--resume", *changed])
    assert "dataset_name ('pairs' when the run began, now 'fewer')" in str(told.value)
    assert "learning_rate (0.01 when the run began, now 0.001)" in str(told.value)
    assert "training pairs ('48 with" in str(told.value)
    assert "held-out pairs" not in str(told.value)
    assert "run_name" not in str(told.value)


@pytest.mark.slow
def test_a_new_run_removes_the_checkpoints_of_an_earlier_one(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(runs.folder)
    shutil.copytree(runs.stopped("torn"), tmp_path / "again")
    assert "checkpoint-8" in checkpoints(tmp_path / "again")
    command = [*COMMAND[1:], *STEPS, f"--output_dir={tmp_path / 'again'}", "--max_steps=2"]
    main(command)
    assert checkpoints(tmp_path / "again") == ["checkpoint-2"]
    with caplog.at_level(logging.INFO, "deep_rlhf"):
        main([*command, "--resume"])  # a finished run, too
    assert "Going on from" in caplog.text
    assert checkpoints(tmp_path / "again") == ["checkpoint-2"]


@pytest.mark.parametrize("flag", ["--save_only_model=True", "--resume_from_checkpoint=update/checkpoint-10"])
def test_flags_that_contradict_resume_are_told(runs: Runs, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.chdir(runs.folder)
    with pytest.raises(UserError, match=f"--resume does not go with {flag.split('=')[0]}"):
        main([*COMMAND[1:], "--resume", flag])
