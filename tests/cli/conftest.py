"""Workplaces in which the two commands run as typed, in processes of their own or in this one."""

import sys
from collections.abc import Callable

import pytest
from commands import PPO_COMMAND, REWARD_COMMAND, Result, Workplace, run_script
from fixtures import build_workplace

from deep_rlhf.cli.main import run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Both commands on generated models and data: the reward without a wandb key, PPO with wandb offline."""
    folder = tmp_path_factory.mktemp("workplace")
    build_workplace(folder)
    reward = run_script(folder, *REWARD_COMMAND, HF_HUB_OFFLINE="1")
    ppo = run_script(folder, *PPO_COMMAND, HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_DIR=str(folder))
    return Workplace(folder, reward, ppo)


@pytest.fixture
def cli(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """cli("ppo", "--flag=value", …) in the workplace's folder, in this process."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", [str(workplace.folder), *sys.path])

    def call(command: str, *argv: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            run(command, list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
