"""`reward_modeling.py` as people type it, on small generated stand-ins for the models and data it names."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from facts import assert_line_names
from fixtures import build_workplace
from transformers import AutoModelForSequenceClassification

from deep_rlhf.cli import main as command
from deep_rlhf.cli.reward import hold_out, main
from deep_rlhf.errors import UserError
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.types import Preference

pytestmark = pytest.mark.processes

# The original's command, word for word.
COMMAND = """
python reward_modeling.py --model_name_or_path="distilbert/distilbert-base-uncased" \
  --output_dir="reward_modeling_anthropic_hh" --per_device_train_batch_size=64 --num_train_epochs=1 \
  --gradient_checkpointing=True --learning_rate=1.41e-5 --report_to="wandb" --remove_unused_columns=False \
  --optim="adamw_torch" --logging_steps=10 --evaluation_strategy="steps" --max_length=512
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    build_workplace(folder)
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(line, folder, **environment):
    """What the command `line` gives with this interpreter for `python`; no network."""
    words = shlex.split(line)
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_"))}
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=clean | settings | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def original(place):
    done = run(COMMAND, place, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return done, place / "reward_modeling_anthropic_hh"


def test_the_originals_command_runs_word_for_word(original, place):
    done, folder = original
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    summary = json.loads((folder / "summary.json").read_text())
    train = summary["rows"]["train"]
    assert train["dropped"] == {"chosen equals rejected": 1, "too long": 1}
    assert (train["read"], train["kept"]) == (190, 188)
    assert 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["accuracy_length_baseline"] <= 1
    assert summary["seconds"] > 0
    assert "1 too long" in done.stdout
    assert "held-out accuracy" in done.stdout
    card = json.loads((folder / "reward_model.json").read_text())
    assert card["template"] == "hh"
    assert card["metrics"]["accuracy"] == summary["accuracy"]
    assert len(RewardModel.load(folder).score(["Hello"], ["Good day."])) == 1
    assert list((place / "wandb").glob("offline-run-*"))


FAST = [
    "--model_name_or_path=gpt2",
    "--report_to=none",
    "--disable_tqdm=True",
    "--per_device_train_batch_size=32",
    "--logging_steps=2",
    "--learning_rate=1e-3",
    "--use_cpu=True",
]


@pytest.mark.usefixtures("there")
def test_an_ensemble_on_a_decoder_evaluates_by_steps(tmp_path):
    main([*FAST, f"--output_dir={tmp_path}", "--ensemble_size=3", "--label_noise=0.1", "--eval_samples=10"])
    evaluated = [row for row in lines(tmp_path / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 6, 6]  # the last is of all held-out pairs
    assert {"eval_accuracy", "eval_accuracy_length_baseline"} <= evaluated[0].keys()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["oob_accuracy"]) == 3
    assert len(json.loads((tmp_path / "reward_model.json").read_text())["std"]) == 3
    assert RewardModel.load(tmp_path).score(["Hello"], ["Good day."]).shape == (1, 3)


@pytest.mark.usefixtures("there")
def test_the_saved_configuration_runs_again(tmp_path):
    main([*FAST, f"--output_dir={tmp_path / 'one'}", "--max_steps=1", "--use_peft=True", "--lora_r=2"])
    main([f"--config={tmp_path / 'one' / 'config.yaml'}", f"--output_dir={tmp_path / 'two'}"])
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second


@pytest.mark.usefixtures("there")
def test_without_a_test_split_prompts_are_held_out(tmp_path, caplog):
    caplog.set_level("INFO", "deep_rlhf")
    file = Path("Anthropic/hh-rlhf/train.jsonl.gz")
    main([*FAST, f"--output_dir={tmp_path}", f"--dataset_name={file}", "--max_steps=1"])
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert 1 <= rows["test"]["read"] <= 30
    assert rows["train"]["dropped"]["held out for testing"] == rows["test"]["read"]
    assert rows["train"]["kept"] + sum(rows["train"]["dropped"].values()) == rows["train"]["read"]
    assert_line_names(caplog.text, "5 %", "held out")


def test_no_prompt_is_in_both_training_and_test_data():
    pairs = [Preference(prompt=f"q{i % 40}", a="x", b="y", id=str(i)) for i in range(200)]
    train, held_out = hold_out(pairs)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held_out)
    assert len({p.prompt for p in held_out}) == 2  # 5 % of 40
    assert len(train) + len(held_out) == 200
    assert hold_out(pairs[::-1])[1] == held_out[::-1]  # whatever the order
    with pytest.raises(UserError, match="same prompt"):
        hold_out(pairs[:1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max_lenght=512", "Did you mean --max_length?"),
        ("--dataset_test_split=tset", "tset"),
        ("--model_name_or_path=./no-such-model", "no-such-model"),
        ("--label_noise=1.5", "label_noise"),
        ("--max_length=2", "too long"),
    ],
)
@pytest.mark.usefixtures("there")
def test_a_users_mistake_is_one_sentence(tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as told:
        main([*FAST, f"--output_dir={tmp_path}", flags])
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("there")
def test_a_users_mistake_exits_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        command.run("reward", ["--dataset_name=nowhere.jsonl"])
    assert left.value.code == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(place):
    flags = (
        "reward_modeling.py --model_name_or_path=gpt2 --report_to=none --disable_tqdm=True --logging_steps=1"
        " --max_steps=5 --learning_rate=1e-3 --ensemble_size=2 --use_cpu=True --eval_strategy=no"
    )
    one = run(f"python {flags} --output_dir=one --per_device_train_batch_size=8", place)
    # --multi_gpu only picks the launcher: with `--cpu`, accelerate 1.15 starts a single process unless there is mpirun.
    launch = (
        "python -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        " --dynamo_backend no --main_process_port 0"
    )
    two = run(f"{launch} {flags} --output_dir=two --per_device_train_batch_size=4", place)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    losses = [
        [row["loss"] for row in lines(place / name / "metrics.jsonl") if "loss" in row] for name in ("one", "two")
    ]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    accuracies = [json.loads((place / name / "summary.json").read_text())["accuracy"] for name in ("one", "two")]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)
