"""The two commands of the original program, word for word, on generated copies and on the offline Hub."""

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import PPO_COMMAND, REWARD_COMMAND, Workplace, run_script
from facts import assert_names
from fixtures import link_scripts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel, pipeline

pytestmark = pytest.mark.processes

PPO_FILES = {"config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "summary.json", "model", "checkpoints"}


@pytest.fixture(scope="session")
def hub(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Hub on this machine with the repositories that the commands name."""
    root = tmp_path_factory.mktemp("hub")
    tools = shared / "tools"
    subprocess.run([sys.executable, tools / "build_hub.py", root], check=True, capture_output=True)
    # The real data would take minutes: the commands are the same on the first rows of each file.
    for path in (root / "datasets").rglob("*.jsonl.gz"):
        rows = 140 if "first-prompt" in str(path) else 40 if "train" in path.name else 10
        path.write_bytes(gzip.compress(b"".join(gzip.decompress(path.read_bytes()).splitlines(True)[:rows])))
    make_eos_likely(root / "models" / "gpt2")
    server = subprocess.Popen(
        [sys.executable, tools / "local_hub.py", root, "--port=0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait()


def make_eos_likely(folder: Path) -> None:
    """Random weights always write 32 tokens of 50,257 logits each, a minute per update: one in three shall be EOS."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight[model.config.eos_token_id, 0] += math.log(model.config.vocab_size / 2)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def hub_workplace(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("hub_workplace")
    link_scripts(folder)
    env = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    return Workplace(folder, run_script(folder, *REWARD_COMMAND, **env), run_script(folder, *PPO_COMMAND, **env))


@pytest.fixture(params=["generated", "hub"])
def done(request: pytest.FixtureRequest) -> Workplace:
    return request.getfixturevalue("workplace" if request.param == "generated" else "hub_workplace")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_both_commands_succeed(done: Workplace) -> None:
    assert done.reward.returncode == 0, done.reward.stderr
    assert done.ppo.returncode == 0, done.ppo.stderr


def test_the_reward_model_opens_with_plain_transformers(done: Workplace) -> None:
    folder = done.folder / "reward_modeling_anthropic_hh"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("\n\nHuman: Hi\n\nAssistant: Hello.", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 1)
    card = json.loads((folder / "reward_model.json").read_text())
    assert {"template_fingerprint", "mean", "std", "metrics"} <= card.keys()


def test_the_rows_that_were_dropped_are_counted_by_reason(workplace: Workplace) -> None:
    summary = json.loads((workplace.folder / "reward_modeling_anthropic_hh" / "summary.json").read_text())
    assert summary["rows"]["train"] == {
        "read": 190,
        "kept": 188,
        "dropped": {"chosen equals rejected": 1, "too long": 1},
    }
    said = " ".join(workplace.reward.stdout.replace("│", " ").split())
    assert_names(said, "188 of 190", "1 chosen equals rejected", "1 too long")


def test_the_policy_works_in_a_text_generation_pipeline(done: Workplace) -> None:
    generate = pipeline("text-generation", model=str(done.folder / "outputs" / "ppo" / "model"))
    response = generate("\n\nHuman: Hi\n\nAssistant:", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert isinstance(response[0]["generated_text"], str)


def test_ppo_writes_every_file_of_a_run(done: Workplace) -> None:
    folder = done.folder / "outputs" / "ppo"
    assert {path.name for path in folder.iterdir()} == PPO_FILES
    (metrics,) = lines(folder / "metrics.jsonl")  # one pass over 140 prompts in batches of 128
    wanted = {"score_mean", "kl", "entropy", "policy_clip_fraction", "value_clip_fraction", "explained_variance"}
    wanted |= {"response_tokens", "missing_eos", "tokens_per_second", "memory_gb"}
    assert wanted <= metrics.keys()
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4)  # the first batch is drawn from the reference itself
    samples = lines(folder / "samples.jsonl")
    assert samples
    assert {"prompt", "response", "score"} <= samples[0].keys()
    assert samples[0]["prompt"].startswith("\n\nHuman:")  # the reward model's template
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8").lower()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prompts"]["read"] == 140
    assert summary["updates"] == 1


def test_wandb_without_a_key_is_one_line(workplace: Workplace) -> None:
    said = [line for line in workplace.reward.stderr.splitlines() if "wandb" in line]
    assert len(said) == 1
    assert "training continues without it" in said[0]


def test_wandb_offline_leaves_a_run(workplace: Workplace) -> None:
    assert list((workplace.folder / "wandb").glob("offline-run-*"))


def test_the_console_shows_no_warnings_of_libraries(done: Workplace) -> None:
    noises = ("Warning", "LOAD REPORT", "Loading weights", "Writing model", "{'", "UNEXPECTED")
    bars = ("training", "evaluation", "ppo:", "Generating", "it/s]", "B/s]")
    for said in (done.reward, done.ppo):
        assert not [noise for noise in noises if noise in said.stdout + said.stderr]
        lines = said.stderr.replace("\x1b[A", "").splitlines()
        others = [line for line in lines if line.strip() and not any(bar in line for bar in bars)]
        assert all("wandb" in line or "pairs: " in line for line in others), others


def test_a_wandb_that_cannot_be_imported_stops_nothing(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('half installed')")
    small = ("--batch_size=4", "--steps=4", "--max_new_tokens=4", "--output_dir=outputs/broken_wandb")
    result = run_script(workplace.folder, *PPO_COMMAND, *small, HF_HUB_OFFLINE="1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "training continues without it" in result.stderr
