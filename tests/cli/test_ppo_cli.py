"""`ppo.py` beyond the original's command: adapters, encoder-decoders, functions as rewards, and wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fixtures import write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

SMALL = ("--batch_size=8", "--steps=8", "--max_new_tokens=4", "--ppo_epochs=1")
LENGTH = "--reward_model=python:length_reward:length"


@pytest.fixture(autouse=True)
def _reward_functions(workplace: object, cli: Callable) -> None:
    Path("length_reward.py").write_text(
        "def length(prompts, responses): return [len(text) for text in responses]\n"
        "def too_few(prompts, responses): return [1.0]\n"
        "def not_finite(prompts, responses): return [float('nan')] * len(responses)\n"
        "def one_number(prompts, responses): return 1.0\n"
        "def raising(prompts, responses): raise KeyError('user_id')\n"
    )
    Path("a_file").touch()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lora_trains_and_saves_a_plain_merged_model(cli: Callable, tmp_path: Path) -> None:
    result = cli("ppo", *SMALL, LENGTH, "--use_peft=True", "--learning_rate=0.01", f"--output_dir={tmp_path}")
    assert result.code == 0, result.err
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    before = AutoModelForCausalLM.from_pretrained("gpt2").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed
    assert all("attn" in name for name in changed)


def test_an_encoder_decoder_trains_and_is_saved(cli: Callable, tmp_path: Path) -> None:
    argv = (*SMALL, LENGTH, "--use_seq2seq=True", "--model_name=t5-small", f"--output_dir={tmp_path}")
    result = cli("ppo", *argv)
    assert result.code == 0, result.err
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("How do I bake bread?", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3).shape[1] > 1


def test_an_encoder_decoder_with_adapters(cli: Callable, tmp_path: Path) -> None:
    argv = ("--use_seq2seq=True", "--use_peft=True", "--model_name=t5-small", f"--output_dir={tmp_path}")
    result = cli("ppo", *SMALL, LENGTH, *argv)
    assert result.code == 0, result.err
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")


def test_the_saved_config_repeats_the_run(cli: Callable, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("ppo", *SMALL, LENGTH, "--seed=5", f"--output_dir={first}").code == 0
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert (config["seed"], config["model_name"], config["max_prompt_length"]) == (5, "gpt2", 512)
    assert cli("ppo", f"--config={first / 'config.yaml'}", f"--output_dir={second}").code == 0
    for name in ("score_mean", "entropy", "policy_loss", "value_loss"):
        assert metrics(first)[0][name] == pytest.approx(metrics(second)[0][name], rel=1e-5)


def test_a_function_as_reward_sees_prompts_as_they_are(cli: Callable, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}."} for number in range(8)])
    out = tmp_path / "out"
    result = cli("ppo", *SMALL, LENGTH, f"--query_dataset={tmp_path / 'prompts.jsonl'}", f"--output_dir={out}")
    assert result.code == 0, result.err
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("Say ") and row["score"] == len(row["response"]) for row in samples)


def test_prompts_that_are_too_long_are_counted(cli: Callable, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {number}."} for number in range(4)] + [{"prompt": "word " * 700}, {"prompt": "Say 1."}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out"
    result = cli("ppo", *SMALL, LENGTH, f"--query_dataset={tmp_path / 'prompts.jsonl'}", f"--output_dir={out}")
    assert result.code == 0, result.err
    assert "1 duplicate" in result.out
    assert "1 too long" in result.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["prompts"] == {"read": 6, "kept": 5, "dropped": {"duplicate": 1}}
    assert summary["prompts_in_tokens"] == {"read": 5, "kept": 4, "dropped": {"too long": 1}}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch_size=0"], "batch_size must be at least 1, not 0."),
        (["--max_new_tokens=abc"], "--max_new_tokens: invalid int value: 'abc'"),
        (["--temperature=0"], "temperature must be greater than 0"),
        (["--temprature=1"], "Did you mean --temperature?"),
        (["--kl_penalty=k9"], "--kl_penalty: invalid choice: 'k9'"),
        (["--model_name=./nowhere"], "'./nowhere'"),
        (["--model_name="], "model_name must not be empty"),
        (["--model_name=Anthropic/hh-rlhf"], "'Anthropic/hh-rlhf'"),
        (["--model_name=distilbert/distilbert-base-uncased"], "'distilbert/distilbert-base-uncased'"),
        (["--model_name=gpt2", "--use_seq2seq=True"], "'gpt2'"),
        (["--model_name=t5-small"], "'t5-small'"),
        (["--query_dataset=nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--query_split=trian"], "no split 'trian'; splits: train"),
        (["--query_dataset=a_file"], "a_file has an unknown file type"),
        (["--max_prompt_length=1"], "None of the 140 prompts can be used (140 have more than 1 tokens"),
        (["--reward_model=./nowhere"], "'./nowhere'"),
        (["--reward_model=gpt2"], "'gpt2' has no reward head"),
        (["--reward_model=distilbert/distilbert-base-uncased"], "has no reward head"),
        (["--reward_model=python:nope:fn"], "The import of the module 'nope'"),
        (["--reward_model=python:length_reward:nope"], "has no function 'nope'"),
        (["--reward_model=python:length_reward"], "must have the form python:module:function"),
        (["--output_dir=a_file"], "Cannot write to --output_dir 'a_file': File exists."),
        (["--output_dir=a_file/below"], "Cannot write to --output_dir 'a_file/below'"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(
    cli: Callable, tmp_path: Path, argv: list[str], said: str
) -> None:
    defaults = [] if "--output_dir" in argv[0] else [f"--output_dir={tmp_path / 'out'}"]
    reward = [] if "--reward_model" in argv[0] else [LENGTH]
    result = cli("ppo", *SMALL, *reward, *defaults, *argv)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": ""}\n'])
def test_a_file_without_prompts(cli: Callable, tmp_path: Path, content: str) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    result = cli("ppo", *SMALL, LENGTH, f"--query_dataset={path}", f"--output_dir={tmp_path / 'out'}")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "none.jsonl" in result.err


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("too_few", "length_reward.too_few returned 1 rewards for 8 responses;"),
        ("not_finite", "1 batches in a row could not be learned from, the last because the reward of sample 0 is nan"),
        ("one_number", "length_reward.one_number must return one number per response"),
        ("raising", "length_reward.raising"),
    ],
)
def test_a_wrong_reward_function_is_named(cli: Callable, tmp_path: Path, function: str, said: str) -> None:
    reward = f"--reward_model=python:length_reward:{function}"
    result = cli("ppo", *SMALL, reward, f"--output_dir={tmp_path / 'out'}")
    assert result.code == 2
    assert "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last


def test_an_exception_of_the_reward_function_is_told_with_the_number_of_samples(cli: Callable, tmp_path: Path) -> None:
    result = cli("ppo", *SMALL, "--reward_model=python:length_reward:raising", f"--output_dir={tmp_path / 'out'}")
    last = result.err.splitlines()[-1]
    assert "KeyError" in last
    assert "user_id" in last
    assert "8" in last
