"""`deep-rlhf`: its commands, and how each of a clumsy user's mistakes ends."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from facts import assert_names

from deep_rlhf import __version__
from deep_rlhf.cli import main as cli_main
from deep_rlhf.cli.commands import COMMANDS


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deep-rlhf", *argv])
    cli_main.main()
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["deep-rlhf", "--version"])
    cli_main.main()
    assert capsys.readouterr().out == f"deep-rlhf {__version__}\n"


@pytest.mark.processes
def test_a_mistake_ends_a_process_with_one_line_and_code_2(tmp_path: Path) -> None:
    """The only test of this file in a process of its own: the others see the same through `run`."""
    command = [sys.executable, "-c", "from deep_rlhf.cli.main import main; main()", "ppoo"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "'ppoo'", ", ".join(cli_main.COMMANDS))
    assert result.stdout == ""


@pytest.mark.processes
@pytest.mark.parametrize("command", ["teach", "label", "store"])
def test_commands_that_only_serve_or_copy_start_without_the_trainers_libraries(command: str) -> None:
    heavy = "{'torch', 'transformers.trainer', 'transformers.modeling_utils', 'datasets', 'peft', 'accelerate'}"
    program = f"""
import sys
from deep_rlhf.cli.main import run
try:
    run("{command}", ["--help"])
except SystemExit:
    pass
print({heavy} & set(sys.modules))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "set()"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(command: str, argv: list[str] | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deep_rlhf.cli.online.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli_main.run("ppo", [])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_only_user_errors_are_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: str, argv: list[str] | None) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("deep_rlhf.cli.online.main", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli_main.run("ppo", [])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model_name_or_path=./nowhere"], "./nowhere"),
        (["--dataset_name=nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--dataset_train_split=trian"], "no split 'trian'; splits: train, test"),
        (["--dataset_test_split=tset"], "no split 'tset'; splits: test, train"),
        (["--dataset_name=wentingzhao/anthropic-hh-first-prompt"], "its columns are"),
        (["--evaluation_strategy=sometimes"], "sometimes is not a valid IntervalStrategy"),
        (["--optim=adamm"], "--optim: invalid choice: 'adamm'"),
        (["--max_length=4"], "larger --max_length"),
        (["--learning_rate=abc"], "--learning_rate: invalid float value: 'abc'"),
        (["--output_dir=a_file"], "a_file"),
        (["--per_device_train_batch_size=0"], "per_device_train_batch_size"),
        (["--resume_from_checkpoint=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_with_the_reward_command(cli: Callable, tmp_path: Path, argv: list[str], said: str) -> None:
    Path("a_file").touch()
    defaults = [] if "--output_dir" in argv[0] else [f"--output_dir={tmp_path / 'out'}"]
    result = cli("reward", "--report_to=none", "--disable_tqdm=True", *defaults, *argv)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if not line.startswith("training pairs:")]
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("command", ["demo", "reward", "ppo"])
@pytest.mark.parametrize(("seed", "bound"), [("-1", "at least 0"), ("4294967296", "at most 4294967295")])
def test_a_seed_that_no_generator_takes_is_one_sentence(
    command: str, seed: str, bound: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli_main.run(command, [f"--seed={seed}"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: seed must be ")
    assert bound in line
    assert seed in line


@pytest.mark.parametrize(("stdout", "code"), [("/dev/full", 2), ("no reader", 0), ("closed", 2)])
def test_a_command_ends_though_its_output_cannot_be_written(
    stdout: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done = tmp_path / "done"

    def chatty(command: str, argv: list[str] | None) -> None:
        print("x" * 100_000, "\udcff", flush=True)  # noqa: T201
        done.touch()

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("deep_rlhf.cli.online.main", chatty)
    with open("/dev/full" if stdout == "/dev/full" else writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        if stdout == "closed":
            stream.close()
        ending = 0
        try:
            cli_main.run("ppo", [])
        except SystemExit as stop:
            ending = int(stop.code or 0)
    assert done.exists()
    assert ending == code
    assert capsys.readouterr().err.count("error: ") == (code == 2)


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr("deep_rlhf.cli.online.main", lambda *_: print("0.43 → 0.82"))  # noqa: T201
        cli_main.run("ppo", [])
    assert (tmp_path / "said").read_text() == "0.43 \\u2192 0.82\n"


def test_line_breaks_in_a_flag_stay_out_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_main.run("loop", ["--labeler=a\nb"])
    (line,) = capsys.readouterr().err.splitlines()
    assert_names(line, "a b")
