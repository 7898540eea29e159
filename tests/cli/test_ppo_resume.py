"""PPO and its relatives, killed at any moment and resumed, end as if nothing had stopped them: to the last bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_line_names, assert_names
from fixtures import write_jsonl
from grids import slow_but
from killed_ppo_runs import BAD, PPO, RUNS, WHOLE, whole
from safetensors.torch import load_file, save_file
from stopped_runs import Runs

from deep_rlhf.cli.main import run

TIMED = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}
EVERYDAY = ("update", "rename", "interrupt")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Runs:
    """The runs of `killed_ppo_runs`, in a folder with what they need."""
    folder = tmp_path_factory.mktemp("killed")
    make_model("gpt2").save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    adjectives, nouns = ("small", "big", "old", "new", "moon"), ("cat", "dog", "sun", "house")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in adjectives for b in nouns])
    return Runs(folder, "killed_ppo_runs", RUNS, WHOLE)


@pytest.fixture
def again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """again(folder, *flags): PPO in a copy of a folder, in this process; its exit code and what it said."""
    monkeypatch.chdir(runs.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(folder: Path, *flags: str, command: list[str] = PPO) -> tuple[int, str]:
        shutil.copytree(folder, tmp_path / "run")
        code = 0
        try:
            run(command[0], [*command[1:], f"--output_dir={tmp_path / 'run'}", *flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All but what measures time and memory."""
    rows = lines(folder / "metrics.jsonl")
    assert all(row.keys() >= TIMED for row in rows)
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted({path.name for path in (folder / "checkpoints").iterdir()} - {"history.jsonl"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", slow_but(EVERYDAY, RUNS))
def test_a_stopped_run_goes_on_to_the_same_end(runs: Runs, name: str) -> None:
    """Metrics, samples and model; and every tensor of the last checkpoint: Adam's and the random states."""
    resumed, unstopped = runs.resumed(name), runs.whole(whole(RUNS[name].command))
    assert metrics(resumed) == metrics(unstopped)
    last = f"step-{len(metrics(unstopped))}"
    assert checkpoints(resumed)[-1] == last
    files = ["samples.jsonl", "model/model.safetensors", f"checkpoints/{last}/state.safetensors"]
    files += ["best/model.safetensors"] if RUNS[name].command == PPO else []
    for file in files:
        assert (resumed / file).read_bytes() == (unstopped / file).read_bytes(), file
    assert (resumed / "report.html").exists()


@pytest.mark.slow
def test_the_uninterrupted_runs_have_state_that_resuming_could_lose(runs: Runs) -> None:
    ppo, lora, rloo, trpo = (metrics(runs.whole(f"whole {name}")) for name in ("ppo", "ppo lora", "rloo", "trpo"))
    assert [row["step"] for row in ppo] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in lines(runs.whole("whole ppo") / "samples.jsonl")] == [
        step for step in range(1, 9) for _ in range(4)
    ]
    assert [row["bad_batches"] for row in ppo] == [0, 0, 0, 1, 1, 1, 1, 1]
    ppo, lora, rloo, trpo = ([row for row in rows if row["score_mean"] is not None] for rows in (ppo, lora, rloo, trpo))
    assert max(ppo, key=lambda row: row["score_mean"])["step"] == 3  # what is pushed has to outlive a later stop
    assert [row["learning_rate"] for row in ppo] == pytest.approx([1e-3 * (8 - i) / 8 for i in range(7)])
    for rows in (ppo, lora, rloo):
        assert len({row["kl_coef"] for row in rows}) == len(rows)  # it adapts all the time
    for rows in (ppo, lora, rloo, trpo):
        assert max(row["kl"] for row in rows) > 0.01


@pytest.mark.parametrize(
    ("name", "left"),
    slow_but(
        EVERYDAY,
        [
            ("first update", None),
            ("scoring", ["step-2"]),  # none after update 4, whose batch was bad
            ("update", ["step-2", "step-6"]),
            ("file", [".step-6.tmp", "step-2"]),
            ("rename", [".step-6.tmp", "step-2"]),
            ("disk full", ["step-2"]),
            ("hang", ["step-2"]),
            ("interrupt", ["step-2", "step-5"]),
            ("interrupt twice", ["step-2"]),
            ("ending", ["step-6", "step-8"]),
        ],
    ),
)
def test_what_a_stopped_run_leaves(runs: Runs, name: str, left: list[str] | None) -> None:
    folder = runs.stopped(name)
    assert (checkpoints(folder) if left else (folder / "checkpoints").exists()) == (left or False)
    saved = {"disk full": False, "hang": True, "interrupt": True}
    assert (folder / "model" / "model.safetensors").exists() == saved.get(name, False)


@pytest.mark.parametrize(
    ("name", "facts"),
    slow_but(
        EVERYDAY,
        [
            ("first update", ("no complete checkpoint", "first update/checkpoints", "from the beginning")),
            ("update", ("Resuming", "update 6 of 8", "update/checkpoints/step-6")),
            ("file", ("Resuming", "update 2 of 8", "file/checkpoints/step-2")),
            ("torn", ("torn/checkpoints/step-6", "damaged", "skipped")),
            ("torn", ("Resuming", "update 2 of 8", "torn/checkpoints/step-2")),
            ("changed tree", ("changed tree/checkpoints/step-6", "damaged", "skipped", "state.json")),
            ("changed tree", ("metrics.jsonl", "not as the run wrote it")),
            ("changed tree", ("samples.jsonl", "not as the run wrote it")),
            ("changed history", ("changed history/checkpoints/step-6", "damaged", "skipped", "history.jsonl")),
            ("terminate", ("SIGTERM", "stopping after this update")),
            ("interrupt", ("Stopping after this update", "Ctrl-C")),
            ("interrupt", ("Stopped", "update 5", "--resume")),
            ("interrupt", ("Resuming", "update 5 of 8", "interrupt/checkpoints/step-5")),
            ("interrupt twice", ("Resuming", "update 2 of 8", "interrupt twice/checkpoints/step-2")),
            ("ending", ("8 updates", "already done", "ending/checkpoints/step-8")),
        ],
    ),
)
def test_a_run_says_where_it_stops_and_goes_on(runs: Runs, name: str, facts: tuple[str, ...]) -> None:
    assert_line_names(runs.log(name), *facts)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_stays(runs: Runs) -> None:
    (error,) = [line for line in runs.log("disk full").splitlines() if line.startswith("error: ")]
    assert_names(error, "step 6", "disk full/checkpoints", "File too large", "--resume")
    assert_names(error, "disk full/checkpoints/step-2 is intact")


@pytest.mark.slow
def test_a_reward_function_that_hangs_is_reported_with_the_sample(runs: Runs) -> None:
    (error,) = [line for line in runs.log("hang").splitlines() if line.startswith("error: ")]
    assert_names(error, "killed_ppo_runs.noisy", "2 s", "8 responses", "sample 0", f"'{BAD}'")


def test_changed_flags_are_named_and_nothing_is_touched(again: Callable[..., Any], runs: Runs, tmp_path: Path) -> None:
    changed = ["--learning_rate=1e-2", "--steps=32", "--save_freq=3", "--exp_name=other", "--max_bad_batches=9"]
    code, said = again(runs.stopped("update"), "--resume", *changed)
    assert code == 2
    error = said.splitlines()[-1]
    assert_names(error, f"'{tmp_path / 'run'}'", "learning_rate (0.001", "now 0.01", "steps (64", "now 32")
    for name in ("save_freq", "exp_name", "max_bad_batches"):
        assert name not in error
    assert contents(tmp_path / "run") == contents(runs.stopped("update"))


def test_another_algorithm_is_named(again: Callable[..., Any], runs: Runs) -> None:
    code, said = again(runs.stopped("update"), "--resume", command=RUNS["rloo"].command)
    assert code == 2
    assert_names(said, "group_size (None", "now 4")


def test_other_prompts_and_other_weights_are_named(again: Callable[..., Any], runs: Runs, tmp_path: Path) -> None:
    rows = Path("prompts.jsonl").read_text().replace("big cat", "big red cat")
    (tmp_path / "prompts.jsonl").write_text(rows)
    shutil.copytree("policy", tmp_path / "policy")
    weights = load_file("policy/model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1e-6
    save_file(weights, tmp_path / "policy" / "model.safetensors", metadata={"format": "pt"})
    flags = [f"--query_dataset={tmp_path / 'prompts.jsonl'}", f"--model_name={tmp_path / 'policy'}"]
    code, said = again(runs.stopped("update"), "--resume", *flags)
    assert code == 2
    for name in (
        "prompts ('",
        "weights of the reference ('",
        "model_name ('policy' when the run began",
        "query_dataset",
    ):
        assert name in said


def test_free_flags_and_the_saved_settings_are_the_same_run(
    again: Callable[..., Any], runs: Runs, tmp_path: Path
) -> None:
    settings = ["--config=update, stopped/config.yaml", f"--output_dir={tmp_path / 'run'}"]
    code, said = again(
        runs.stopped("update"), "--resume", "--save_freq=1", "--exp_name=other", command=["ppo", *settings]
    )
    assert code == 0, said
    assert metrics(tmp_path / "run") == metrics(runs.whole("whole ppo"))
    assert checkpoints(tmp_path / "run") == ["step-7", "step-8"]


def test_an_unfinished_run_is_not_overwritten(again: Callable[..., Any], runs: Runs, tmp_path: Path) -> None:
    code, said = again(runs.stopped("update"))
    assert code == 2
    error = said.splitlines()[-1]
    assert_names(error, f"'{tmp_path / 'run'}'", "6 of 8 updates", "--resume", f"'{tmp_path / 'run' / 'checkpoints'}'")
    assert contents(tmp_path / "run") == contents(runs.stopped("update"))


def test_a_finished_run_learns_no_more_and_writes_its_report(
    again: Callable[..., Any], runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "deep_rlhf"):
        code, said = again(runs.whole("whole ppo"), "--resume")
    assert code == 0, said
    assert_line_names(caplog.text, "8 updates", "done")
    before, after = contents(runs.whole("whole ppo")), contents(tmp_path / "run")
    assert before.keys() == after.keys()
    assert "report.html" in after
    for name in before:
        assert before[name] == after[name] or not name.endswith((".jsonl", ".safetensors")), name


def test_a_run_whose_learning_rate_falls_is_not_made_longer(
    again: Callable[..., Any], runs: Runs, tmp_path: Path
) -> None:
    code, said = again(runs.whole("whole ppo"), "--resume", "--steps=128")
    assert code == 2
    assert_names(said.splitlines()[-1], "steps (64", "now 128", "lr_scheduler_type=linear", "constant")
    assert contents(tmp_path / "run") == contents(runs.whole("whole ppo"))


def test_a_new_run_sets_the_results_of_a_finished_one_aside(
    again: Callable[..., Any], runs: Runs, tmp_path: Path
) -> None:
    before = contents(runs.whole("whole ppo"))
    code, said = again(runs.whole("whole ppo"), "--steps=8", "--reward_model=python:killed_ppo_runs:nothing")
    assert code == 2, said  # a reward without a function: nothing has begun
    assert contents(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run")
    code, said = again(runs.whole("whole ppo"), "--steps=8")
    assert code == 0, said
    after = contents(tmp_path / "run")
    for name in ("model/model.safetensors", "best/model.safetensors", "report.html", "summary.json", "metrics.jsonl"):
        assert after[f"earlier_run/{name}"] == before[name]
        assert after[name] != before[name]
    assert checkpoints(tmp_path / "run") == ["step-1"]
