"""`deep-rlhf loop` in this process: labelers, prompts, where things are kept, and a clumsy user's mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_names
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback

from deep_rlhf.cli import loop, status_line
from deep_rlhf.cli.loop_config import STORE_VARIABLE, TASTES, LoopConfig, mean_taste, open_labeler, open_prompts
from deep_rlhf.cli.status_line import StatusLine
from deep_rlhf.cli.synthetic_policy import PolicyScale, cached_policy, cached_policy_folder
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import generate_prompts
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.annotators.base import People
from deep_rlhf.feedback.annotators.replay import Replay
from deep_rlhf.feedback.state import AGREEMENT, STATUS, STOP, Status, StopRequest, report_status
from deep_rlhf.feedback.store import Store

SMALL = [
    *("--mode=batched", "--updates=2", "--batched_updates=1", "--initial_labels=12", "--labels=20", "--seed=1"),
    *("--batch_size=8", "--mini_batch_size=8", "--max_new_tokens=6", "--max_prompt_length=40", "--held_out_members=0"),
    *("--fixed_prompts=1", "--threads=1", "--members=2"),
]


@pytest.fixture(scope="module")
def policy(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    make_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def votes(path: Path) -> Path:
    """Three people on 30 pairs: two like the first response, one the second."""
    words = ["red", "green", "blue", "cat", "dog", "sun"]
    rows = [
        {
            **{"prompt": words[i % 6], "a": f"the {words[i // 6]}", "b": f"a very old {words[i % 5]} {i}"},
            "votes": [["ann", "a"], ["bob", "a"], ["eve", "b"]],
        }
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_replayed_file_teaches_a_policy(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = votes(tmp_path / "votes.jsonl")
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "elsewhere.db"))
    out = f"--output_dir={tmp_path / 'run'}"
    loop.main([*SMALL, f"--model={policy}", f"--labeler=replay:{file}", "--template=plain", "--pace=0", out])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.n_layer == 2
    with Store(tmp_path / "elsewhere.db") as store:
        labels = store.labels()
        assert {one.annotator for one in labels} == {"ann", "bob", "eve"}
        assert len(labels) >= 12
        assert [row["step"] for row in store.metrics()] == [1, 2]
        assert AGREEMENT.read(store) is not None


def test_labelers_and_the_prompts_they_are_asked_about(tmp_path: Path) -> None:
    web = LoopConfig()
    assert isinstance(open_labeler(web), People)
    train, held_out = open_prompts(web, open_labeler(web))
    assert set(train) == {HH.prompt(text) for text in generate_prompts(1, "train")}
    assert not set(train) & set(held_out)
    replay = LoopConfig(labeler=f"replay:{votes(tmp_path / 'votes.jsonl')}")
    labeler = open_labeler(replay)
    assert isinstance(labeler, Replay)
    assert sorted(open_prompts(replay, labeler)[0]) == sorted(labeler.prompts)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(100)))
    own, measured = open_prompts(LoopConfig(prompts=str(tmp_path / "prompts.txt"), template="plain"), People())
    assert (len(own), len(measured)) == (90, 10)
    assert not set(own) & set(measured)


def test_tastes_that_simulated_annotators_have() -> None:
    prompt = HH.prompt("How do I bake bread?")
    assert TASTES["short"](prompt, "Yes.") > TASTES["short"](prompt, "Yes, and this is why.")
    assert TASTES["polite"](prompt, "Thank you for asking!") > TASTES["polite"](prompt, "What a stupid question.")
    assert mean_taste(LoopConfig(taste="short"), ["p", "p"], ["x " * 25, "x " * 50]) == 0.25


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    assert LoopConfig(output_dir="here").store_address == str(Path("here") / "labels.db")
    monkeypatch.setenv(STORE_VARIABLE, "postgresql://elsewhere")
    assert LoopConfig().store_address == "postgresql://elsewhere"
    assert LoopConfig(store="mine.db").store_address == "mine.db"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--labeler=nobody"], "labeler must be web, simulated or replay:FILE"),
        (["--labeler=replay:"], "labeler must be web, simulated or replay:FILE"),
        (["--labeler=replay:nothing.jsonl"], "There is no file 'nothing.jsonl' to replay"),
        (["--labeler=simulated", "--prompts=mine.txt"], "leave out --prompts"),
        (["--taste=sweet"], "--taste"),
        (["--model=./nothing"], "There is no folder './nothing'"),
        (["--updats=3"], "Did you mean --updates?"),
        (["--initial_labels=0"], "initial_labels must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as mistake:
        loop.main(argv)
    assert told in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_the_status_line() -> None:
    assert status_line.format_status(Status(state="starting"), {}, 49) == "starting · 49 labels"
    row = {"step": 7, "reward": None, "kl": None, "policy_version": 2, "reward_version": 3}  # not finite
    line = status_line.format_status(Status(state="training"), row, 25)
    assert_names(line, "training", "25 labels", "update 7", "reward –", "KL –", "policy 2", "reward model 3")


def test_the_red_button_stops_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address, steps = str(tmp_path / "store.db"), list[int]()

    def press(*_: Any, **__: Any) -> None:
        steps.append(len(steps))
        with Store(address) as store:
            STOP.write(store, StopRequest(by="ann"))

    monkeypatch.setattr(PrinterCallback, "on_step_begin", press)
    monkeypatch.setattr(ProgressCallback, "on_step_begin", press)
    loop.main([f"--store={address}", f"--output_dir={tmp_path / 'run'}", "--threads=1"])
    assert steps == [0]
    assert list((tmp_path / "cache" / "deep-rlhf").iterdir()) == []
    with Store(address) as store:
        assert (STATUS.read(store) or Status()).state == "stopped"


def test_the_status_of_an_earlier_run_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_line, "POLL_SECONDS", 600.0)  # this thread updates the line
    with Store(tmp_path / "labels.db") as store:
        report_status(store, "stopped", step=9, text="The loop was interrupted.")
        line = StatusLine(store)
        with line:
            line.update()
            report_status(store, "training", step=9, text="Update 10 is under way.")
            line.update()
    first, second = capsys.readouterr().err.splitlines()
    assert_names(first, "starting", "0 labels")
    assert_names(second, "training", "0 labels", "Update 10 is under way.")
    assert "interrupted" not in first + second
    assert "9" not in first + second


def test_the_synthetic_policy_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = PolicyScale(layers=1, width=32, corpus_texts=32, sft_pairs=64)
    folder = cached_policy(1, small)
    assert folder == cached_policy_folder(1, small)
    assert folder.parent == tmp_path / "cache" / "deep-rlhf"
    made = (folder / "model.safetensors").stat()
    assert cached_policy(1, small) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert cached_policy_folder(2, small) != folder != cached_policy_folder(1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        cached_policy(1, small)
