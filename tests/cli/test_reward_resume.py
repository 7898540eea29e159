"""A supervised run that is killed at any moment and resumed ends as one that nothing stopped: to the last bit."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from facts import assert_line_names, assert_names
from fixtures import write_gpt2, write_jsonl
from grids import slow_but
from killed_runs import COMMAND, RUNS, STEPS, WHOLE
from stopped_runs import Runs

from deep_rlhf.cli.reward import main
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import sft_pairs
from deep_rlhf.errors import CheckpointError, ConfigError

UNSTOPPED = {
    "epoch": "whole epoch",
    "ending": "whole ending",
    "model full": "whole ending",
    "lora": "whole lora",
    "dpo": "whole dpo",
    "dpo hung up": "whole dpo",
}
EVERYDAY = ("update", "rotation", "interrupt")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of `killed_runs`, in a folder with what they need."""
    folder = tmp_path_factory.mktemp("killed")
    write_gpt2(folder / "gpt2")
    (folder / "pairs").mkdir()
    rng, responses = random.Random(0), sft_pairs(100, seed=1)
    rows = [
        {
            "chosen": HH.prompt(prompt) + HH.response(response),
            "rejected": HH.prompt(prompt) + HH.response(rng.choice(responses)[1]),
        }
        for prompt, response in responses[:60]
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
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("name", slow_but(EVERYDAY, RUNS))
def test_a_stopped_run_goes_on_to_the_same_end(runs: Runs, name: str) -> None:
    resumed, unstopped = runs.resumed(name), runs.whole(UNSTOPPED.get(name, "whole"))
    assert metrics(resumed) == metrics(unstopped)
    for file in ("model/model.safetensors",) if name.startswith("dpo") else ("model.safetensors", "reward_model.json"):
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
            ("update", ["step-2", "step-4"]),
            ("interrupt", ["step-4", "step-5"]),
        ],
    ),
)
def test_what_a_stopped_run_leaves(runs: Runs, name: str, left: list[str]) -> None:
    assert checkpoints(runs.stopped(name)) == left


@pytest.mark.parametrize(
    ("name", "facts"),
    slow_but(
        EVERYDAY,
        [
            ("first update", ("no complete checkpoint", "first update/checkpoints", "from the beginning")),
            ("update", ("Resuming", "update/checkpoints/step-4")),
            ("file", ("Resuming", "file/checkpoints/step-8")),  # the fifth, of step 10, is not complete
            ("rename", ("Resuming", "rename/checkpoints/step-4")),
            ("torn", ("torn/checkpoints/step-8", "damaged", "skipped", "state.safetensors")),
            ("torn", ("Resuming", "torn/checkpoints/step-6")),
            ("interrupt", ("Stopped", "update 5", "--resume")),
            ("interrupt", ("Resuming", "interrupt/checkpoints/step-5")),
            ("best", ("Resuming", "best/checkpoints/step-11")),
            ("ending", ("Resuming", "ending/checkpoints/step-4")),
        ],
    ),
)
def test_a_resumed_run_says_where_it_begins(runs: Runs, name: str, facts: tuple[str, ...]) -> None:
    assert_line_names(runs.log(name), *facts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [("weights full", "File too large"), ("optimizer full", "File too large")],
)
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_stays(runs: Runs, name: str, why: str) -> None:
    (error,) = [line for line in runs.log(name).splitlines() if line.startswith("error: ")]
    assert_names(error, "step 8", f"{name}/checkpoints", why, f"{name}/checkpoints/step-6 is intact")
    assert not list((runs.stopped(name) / "checkpoints").glob("*step-8*"))
    assert f"Resuming from {name}/checkpoints/step-6." in runs.log(name)


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_reported_and_the_model_can_be_saved_later(runs: Runs) -> None:
    log = runs.log("model full")
    assert_line_names(log, "error", "reward model", "not be written", "model full")
    assert "Resuming from model full/checkpoints/step-4." in log


def test_changed_flags_and_data_are_named(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.folder)
    shutil.copytree(runs.stopped("update"), tmp_path / "moved")
    (runs.folder / "fewer").mkdir()
    for split in ("train", "test"):
        lines = (runs.folder / "pairs" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (runs.folder / "fewer" / f"{split}.jsonl").write_text("".join(lines[:-1] if split == "train" else lines))
    changed = ["--learning_rate=1e-3", "--dataset_name=fewer", "--run_name=other"]
    with pytest.raises(CheckpointError) as told:
        main([*COMMAND[1:], *STEPS, f"--output_dir={tmp_path / 'moved'}", "--resume", *changed])
    assert_names(told.value, "dataset_name ('pairs'", "now 'fewer'", "learning_rate (0.01", "now 0.001")
    assert_names(told.value, "training pairs ('48")
    assert "held-out pairs" not in str(told.value)
    assert "run_name" not in str(told.value)


@pytest.mark.slow
def test_a_new_run_removes_the_checkpoints_of_an_earlier_one(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(runs.folder)
    shutil.copytree(runs.stopped("torn"), tmp_path / "again")
    assert "step-8" in checkpoints(tmp_path / "again")
    command = [*COMMAND[1:], *STEPS, f"--output_dir={tmp_path / 'again'}", "--max_steps=2"]
    main(command)
    assert checkpoints(tmp_path / "again") == ["step-2"]
    with caplog.at_level(logging.INFO, "deep_rlhf"):
        main([*command, "--resume"])  # a finished run, too
    assert "Resuming from" in caplog.text
    assert checkpoints(tmp_path / "again") == ["step-2"]


@pytest.mark.parametrize("flag", ["--save_only_model=True", "--resume_from_checkpoint=update/checkpoints/step-10"])
def test_flags_that_contradict_resume_are_told(runs: Runs, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.chdir(runs.folder)
    with pytest.raises(ConfigError, match=f"--resume contradicts {flag.split('=')[0]}"):
        main([*COMMAND[1:], "--resume", flag])
