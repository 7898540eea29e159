"""The sentences that users see most or act on, word for word: a change of one is a change of this file alone.

Every other test gives only the facts of a message (file, line, name, number, cause), with `facts.assert_names`; the
labelling page has its own file, web/test_page_words.py.
"""

import errno
import importlib.util
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deep_rlhf import PPOConfig, PPOTrainer
from deep_rlhf.cli import store
from deep_rlhf.cli.main import run
from deep_rlhf.cli.status_line import format_status
from deep_rlhf.errors import CheckpointError, ResourceError, RewardError
from deep_rlhf.extras import optional_packages
from deep_rlhf.feedback.state import Status
from deep_rlhf.models.function_scorer import FunctionScorer
from deep_rlhf.runtime import checkpoint
from deep_rlhf.runtime.checkpoint import save_checkpoint
from deep_rlhf.runtime.trackers import usable_trackers
from deep_rlhf.types import RowReport

# ---- reward functions


def raises_for(is_bad: Callable[[list[str]], bool]) -> Callable[..., Any]:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if is_bad(responses):
            raise KeyError("user_id")
        return [1.0] * len(responses)

    return reward


def says_bad(prompts: list[str], responses: list[str]) -> Any:
    return [1.0] if len(responses) == 6 else ["bad" if response == "r4" else 1.0 for response in responses]


REWARD_FUNCTIONS: dict[str, tuple[int, Callable[..., Any], str]] = {
    "the only sample": (
        1,
        raises_for(lambda responses: True),
        "f raised KeyError: 'user_id' for sample 0: prompt 'q0', response 'r0'.",
    ),
    "one of several": (
        6,
        raises_for(lambda responses: "r3" in responses),
        "f raised KeyError: 'user_id' for 6 responses; sample 3 alone does the same: prompt 'q3', response 'r3'.",
    ),
    "the whole batch": (
        6,
        raises_for(lambda responses: len(responses) == 6),
        "f raised KeyError: 'user_id' for 6 responses, but for neither half of them: only for the whole batch of 6"
        " samples.",
    ),
    "two together": (
        6,
        lambda prompts, responses: [1.0],
        "f returned 1 rewards for 6 responses; the batch of samples 1 to 2 does the same, but neither half of it:"
        " prompt 'q1', response 'r1'.",
    ),
    "too few rewards": (
        6,
        lambda prompts, responses: [1.0 for response in responses if response != "r1"],
        "f returned 5 rewards for 6 responses; sample 1 alone returned 0 rewards: prompt 'q1', response 'r1'.",
    ),
    "no list": (
        6,
        lambda prompts, responses: 0.5,
        "f must return one number per response, but it returned a float for 6 responses; sample 0 alone does the same:"
        " prompt 'q0', response 'r0'.",
    ),
    "no number": (
        2,
        lambda prompts, responses: [1.0, None],
        "f returned None instead of a number for sample 1: prompt 'q1', response 'r1'.",
    ),
    "no number, later": (
        6,
        says_bad,
        "f returned 1 rewards for 6 responses; sample 4 alone returned 'bad' instead of a number: prompt 'q4', response"
        " 'r4'.",
    ),
    "too slow": (
        2,
        lambda prompts, responses: threading.Event().wait(),
        "f did not return within 0.2 s for 2 responses; sample 0 alone does the same: prompt 'q0', response 'r0'.",
    ),
}


@pytest.mark.parametrize("case", REWARD_FUNCTIONS)
def test_a_reward_function_that_fails(case: str) -> None:
    rows, function, sentence = REWARD_FUNCTIONS[case]
    timeout = 0.2 if case == "too slow" else 60.0
    scorer = FunctionScorer(function, "f", timeout=timeout)
    with pytest.raises(RewardError) as caught:
        scorer.score([f"q{row}" for row in range(rows)], [f"r{row}" for row in range(rows)])
    assert str(caught.value) == sentence


# ---- commands and packages


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("ppoo", [])
    assert capsys.readouterr().err == (
        "error: There is no command 'ppoo': choose one of demo, teach, label, loop, store, reward, ppo, trpo, rloo,"
        " grpo, reinforce_plus_plus, dpo, plan.\n"
    )


def test_a_missing_extra() -> None:
    with pytest.raises(ResourceError) as caught, optional_packages("deep_rlhf.Store"):
        raise ModuleNotFoundError(name="sqlalchemy.orm")
    assert str(caught.value) == (
        "deep_rlhf.Store needs the package sqlalchemy, which is not installed: pip install 'deep-rlhf[people]'."
    )


def test_trackers_that_are_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    usable_trackers(["wandb"], run_name="x")
    assert caplog.messages == [
        "wandb is not installed: training continues without it (pip install 'deep-rlhf[wandb]')."
    ]


# ---- checkpoints


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sentence() -> str:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save_file", full)
            with pytest.raises(CheckpointError) as caught:
                save_checkpoint(tmp_path, 6, {})
        return str(caught.value)

    failed = f"The checkpoint of step 6 could not be written to {tmp_path} (No space left on device): "
    assert sentence() == (f"{failed}there is no earlier checkpoint; free disk space, or choose another output_dir.")
    save_checkpoint(tmp_path, 2, {})
    assert sentence() == (
        f"{failed}the previous checkpoint {tmp_path / 'step-2'} is intact; free disk space and continue with --resume."
    )


def test_an_earlier_run_in_the_output_folder(
    make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    def trainer(**settings: Any) -> PPOTrainer:
        sizes = {"batch_size": 2, "mini_batch_size": 2, "steps": 16, "max_new_tokens": 2}
        config = PPOConfig(**sizes, output_dir=str(tmp_path), **settings)
        parts = {"model": make_model("gpt2"), "tokenizer": make_tokenizer(), "prompts": ["red"]}
        return PPOTrainer(config, **parts, reward=lambda prompts, responses: [0.0] * len(responses))

    identity = trainer(learning_rate=1e-3)._identity
    save_checkpoint(tmp_path / "checkpoints", 6, {"updates": 8, "identity": identity | {"seed": 5}})
    with pytest.raises(CheckpointError) as caught:
        trainer()
    assert str(caught.value) == (
        f"'{tmp_path}' holds a run that stopped after 6 of 8 updates: add --resume to continue it, give another"
        f" output_dir, or remove '{tmp_path / 'checkpoints'}'."
    )
    with pytest.raises(CheckpointError) as caught:
        trainer(resume=True, learning_rate=1e-2)
    assert str(caught.value) == (
        f"This is not the run in '{tmp_path}': learning_rate (0.001 when the run began, now 0.01), seed (5 when the run"
        " began, now 0). Undo that, or start a new run."
    )


# ---- summaries


def test_rows_that_were_read() -> None:
    assert str(RowReport(1234, 1234)) == "1,234 of 1,234 rows kept"
    report = RowReport(190, 188, {"chosen equals rejected": 1, "empty": 0, "too long": 1})
    assert str(report) == "188 of 190 rows kept; dropped: 1 chosen equals rejected, 1 too long"


def test_labels_that_were_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}) + "\n")
    for new in (1, 0):
        store.main(["import", str(tmp_path / "labels.db"), str(tmp_path / "pairs.jsonl")])
        assert capsys.readouterr().out == f"1 of 1 rows kept\n1 labels, of which {new} are new to the store.\n"


def test_the_status_line_of_the_loop() -> None:
    status = Status(state="waiting for labels", text="3 of the 20 answers are there.")
    assert format_status(status, {}, 3) == "waiting for labels · 3 labels · 3 of the 20 answers are there."
    row = {"step": 7, "reward": 0.5, "kl": 1.25, "policy_version": 2, "reward_version": 3}
    line = format_status(Status(state="training"), row, 25)
    assert line == "training · 25 labels · update 7 · reward +0.50 · KL 1.2 · policy 2 · reward model 3"
