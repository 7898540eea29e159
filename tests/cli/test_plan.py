"""`deep-rlhf plan`: what it prints, what it refuses, and how near it comes to the memory of real runs."""

import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from facts import assert_line_names, assert_names
from transformers import (
    DistilBertConfig,
    GPT2Config,
)

from deep_rlhf.cli.console import silence_libraries
from deep_rlhf.cli.main import run
from deep_rlhf.cli.plan import advice, ladders
from deep_rlhf.errors import UserError
from deep_rlhf.planning.memory_plan import GIB, MemoryPlan, Phase, gpu_of

VOCABULARY = 50_257  # GPT-2's
FUNCTION = "--reward_model=python:my_rewards:length"  # never called, and not even imported


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """plan("ppo", "--flag=value", …) -> exit code, output, errors, beside two layers of GPT-2 and DistilBERT.

    Only their configurations are there: nothing else is looked at.
    """
    GPT2Config(n_layer=2).save_pretrained(tmp_path / "gpt2")
    DistilBertConfig().save_pretrained(tmp_path / "distilbert")

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            run("plan", [word.replace("./", f"{tmp_path}/") for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_table_of_parts_and_phases(plan: Callable) -> None:
    code, out, _ = plan("ppo", "--model_name=./gpt2", "--reward_model=./distilbert", "--gpu=A100", "--precision=fp32")
    assert code == 0
    rows = {cells[0].strip(): cells[1:] for line in out.splitlines() if len(cells := line.strip("│").split("│")) > 3}
    assert {"policy", "reference", "reward model", "gradients", "optimiser", "activations", "logits"} <= rows.keys()
    assert float(rows["policy"][0]) == pytest.approx(53.6e6 * 4 / GIB, abs=0.01)
    assert float(rows["optimiser"][0]) == pytest.approx(53.6e6 * 8 / GIB, abs=0.01)
    assert float(rows["reward model"][0]) == pytest.approx(67e6 * 4 / GIB, abs=0.01)
    phases = [float(total) for total in rows["total"]]
    assert f"Peak: {max(phases):.2f} GiB" in out
    assert_line_names(out, "fits in A100", "39.40 GiB")
    assert "not fit" not in out


def test_the_flags_that_it_gives_make_it_fit(plan: Callable) -> None:
    argv = ["ppo", "--model_name=./gpt2", FUNCTION, "--precision=fp32", "--gpu=4GiB"]
    _, out, _ = plan(*argv)
    assert_names(" ".join(out.split()), "not fit in a GPU with 4GiB", "4.00 GiB")
    flags = shlex.split(out.splitlines()[-1])
    assert flags
    assert "It fits in" in plan(*argv, *flags)[1]
    for flag in flags:  # none of them is given for nothing
        assert "does not fit" in plan(*argv, *(other for other in flags if other != flag))[1]


def test_nothing_makes_a_large_model_fit_in_a_small_gpu(plan: Callable) -> None:
    _, out, _ = plan("reward", "--model_name_or_path=./distilbert", "--gpu", "0.7GiB")
    assert "the smallest peak is" in " ".join(out.split())
    assert "--use_peft=True" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["trpo"], "There is no plan for 'trpo'"),
        (["ppo", "--model_name=./gpt2", FUNCTION, "--gpu=big"], "--gpu must be one of"),
        (["ppo", "--model_name=./gpt2", FUNCTION, "--gpu"], "--gpu needs a card or a size"),
        (["ppo", "--model_name=./gpt2", FUNCTION, "--bach_size=4"], "Did you mean --batch_size?"),
        (["ppo", "--model_name=./gpt2", FUNCTION, "--max_new_tokens=2000"], "leaves no room for a prompt"),
        (["ppo", "--model_name=./nothing", FUNCTION], "no folder '.*/nothing'"),
        (["ppo", "--model_name=./distilbert", FUNCTION], "distilbert.*its architecture is of another kind"),
        (["ppo", "--model_name=./gpt2", FUNCTION, "--critic=reward"], "critic=reward needs a reward model"),
    ],
)
def test_wrong_input_is_one_sentence(plan: Callable, argv: list[str], error: str) -> None:
    code, out, err = plan(*argv)
    assert (code, out) == (2, "")
    assert re.search(error, err.splitlines()[-1])


def test_a_hub_that_is_not_reached_is_not_the_models_fault(plan: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = plan("ppo", "--model_name=nobody/nothing", FUNCTION)
    assert code == 2
    assert re.search(r"--model_name 'nobody/nothing': .*Hub cannot be reached", err.splitlines()[-1])
    assert "config.json" not in err


def test_a_request_that_is_tried_again_is_told_of_once() -> None:
    silence_libraries()
    logger = logging.getLogger("huggingface_hub.utils._http")
    failed = "'Connection refused' thrown while requesting HEAD http://hub.example.org/config.json"
    limited = "Rate limited. Waiting 9s before retry [Retry 5/5]."
    tries = [line for number in range(1, 6) for line in (failed, f"Retrying in {number}s [Retry {number}/5].")]
    records = {
        line: logger.makeRecord(logger.name, logging.WARNING, "", 0, line, (), None) for line in [*tries, limited]
    }
    assert [line for line in [*tries, limited] if logger.filter(records[line])] == [*tries[:2], limited]


def test_help(plan: Callable) -> None:
    assert "T4, L4, A100, H200" in plan("--help")[1]


def test_the_advice_is_as_short_as_it_can_be() -> None:
    saves = {"--precision=bf16": 1, "--gradient_checkpointing=True": 2, "--critic=shared": 0}
    saves |= {"--forward_batch_size=16": 0, "--forward_batch_size=4": 3, "--forward_batch_size=1": 4}

    def planner(flags: tuple[str, ...]) -> MemoryPlan:
        if "--optimizer=adamw_8bit" in flags:
            raise UserError("It contradicts something.")
        return MemoryPlan((Phase("training", {"all": 10 - sum(saves.get(flag, 0) for flag in flags)}),))

    def steps() -> Any:
        return ladders("ppo", gpu_of("L4"))

    assert ["--precision=bf16"] not in list(ladders("ppo", gpu_of("T4")))  # it would emulate it
    assert advice(planner, (), steps(), 9) == ("--precision=bf16",)
    assert advice(planner, (), steps(), 8) == ("--gradient_checkpointing=True",)
    assert advice(planner, (), steps(), 5) == ("--gradient_checkpointing=True", "--forward_batch_size=4")
    assert advice(planner, ("--precision=bf16",), steps(), 10) == ()
    assert len(advice(planner, (), steps(), 1)) == 3  # it never fits
