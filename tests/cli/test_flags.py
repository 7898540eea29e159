"""From flags and YAML to dataclasses, and back to a file that gives the same run."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from facts import assert_line_names, assert_names
from transformers import HfArgumentParser

from deep_rlhf.algorithms.ppo import PPOConfig
from deep_rlhf.algorithms.supervised.reward import RewardConfig
from deep_rlhf.cli.console import silence_libraries
from deep_rlhf.cli.flags import output_folder, parse_flags, print_config, save_config
from deep_rlhf.cli.reward import RewardArguments
from deep_rlhf.errors import CheckpointError, ConfigError
from utils import ScriptArguments

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    size: int = field(default=4, metadata={"help": "half of it, 50 % in all"})
    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["a"])
    loud: bool = False
    limit: int | None = None


def parsed(*argv: str) -> Settings:
    (settings,) = parse_flags(list(argv), Settings, prog="x", description="y")
    return settings


def ppo(*argv: str) -> PPOConfig:
    (config,) = parse_flags(list(argv), PPOConfig, prog="ppo.py", description="y")
    return config


def reward(*argv: str) -> tuple[RewardArguments, RewardConfig]:
    return parse_flags(list(argv), RewardArguments, RewardConfig, prog="reward_modeling.py", description="y")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("size: 7\nrate: 1e-3\nnames: [b, c]\nloud: true\nlimit: null\n")
    assert parsed() == Settings()
    assert parsed("--config", str(path)) == Settings(size=7, rate=0.001, names=["b", "c"], loud=True)
    assert parsed("--rate=2", f"--config={path}", "--names", "d").rate == 2.0
    assert parsed("--names", "d", f"--config={path}").names == ["d"]
    assert parsed(f"--config={path}", "--loud=False").loud is False


def test_a_saved_config_gives_the_same_ppo_run(tmp_path: Path) -> None:
    config = ppo("--seed=3", "--learning_rate=1e-6", "--use_peft=True", "--steps=64", "--exp_name=a: b # c")
    save_config(tmp_path / "config.yaml", config)
    assert ppo(f"--config={tmp_path / 'config.yaml'}") == config
    assert ppo(f"--config={tmp_path / 'config.yaml'}", "--seed=4").seed == 4


def test_a_saved_config_gives_the_same_reward_run(tmp_path: Path) -> None:
    arguments, config = reward("--evaluation_strategy=epoch", "--report_to=none", "--lr_scheduler_type=cosine")
    save_config(tmp_path / "config.yaml", arguments, config)
    again_arguments, again = reward(f"--config={tmp_path / 'config.yaml'}")
    assert again_arguments == arguments
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("spelling", ["--evaluation_strategy", "--evaluation-strategy", "--eval_strategy"])
def test_old_spellings_still_mean_the_same(spelling: str) -> None:
    assert reward(f"{spelling}=epoch")[1].eval_strategy == "epoch"
    assert reward(spelling, "epoch")[1].eval_strategy == "epoch"


def test_old_spellings_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("evaluation_strategy: epoch\nper_gpu_train_batch_size: 2\n")
    config = reward(f"--config={tmp_path / 'old.yaml'}")[1]
    assert (config.eval_strategy, config.per_device_train_batch_size) == ("epoch", 2)


def test_gradient_checkpointing_is_understood_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silence_libraries()
        assert reward("--gradient_checkpointing=True", "--report_to=none")[1].gradient_checkpointing is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sise=3"], "Unknown argument --sise. Did you mean --size?"),
        (["--sise", "3"], "Did you mean --size?"),
        (["stray"], "Unknown argument stray."),
        (["--size=many"], "--size: invalid int value: 'many'"),
        (["--size=1.5"], "--size: invalid int value: '1.5'"),
        (["--loud=perhaps"], "--loud: Truthy value expected"),
        (["--size"], "--size: expected one argument"),
        (["--size=--"], "--size needs a value"),
        (["--limit=--"], "--limit needs a value"),
        (["--config"], "--config: expected one argument"),
        (["--config=nowhere.yaml"], "There is no configuration file 'nowhere.yaml'."),
        (["--config="], "--config needs the name of a YAML file"),
        (["--config=."], "Cannot read the configuration file '.'"),
    ],
)
def test_a_wrong_flag_is_one_sentence(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"size: [1,\n", "line 2, is not valid YAML"),
        (b"", "must hold `name: value` lines"),
        (b"- size\n", "must hold `name: value` lines"),
        (b"sise: 3\n", "Unknown key 'sise' in '{path}'. Did you mean 'size'?"),
        (b"3: 3\n", "Unknown key '3'"),
        (b"size: many\n", "In '{path}': --size: invalid int value: 'many'"),
        (b"size: [1, 2]\n", "In '{path}'"),
        (b"size: {a: 1}\n", "In '{path}'"),
        (b"rate: [1]\n", "In '{path}': rate takes one value, not a list"),
        (b"size: 1\nrate: 2\nsize: 3\n", "line 3, is not valid YAML: the key 'size' is there twice"),
        (b"size: " + b"9" * 5000, "line 1, is not valid YAML: '999"),
        (b"rate: 2\nloud: !!bool perhaps\n", "line 2, is not valid YAML: 'perhaps' is no bool"),
        (b"rate: !!timestamp x\n", "line 1, is not valid YAML: 'x' is no timestamp"),
        (b"size: !!int x\n", "line 1, is not valid YAML: 'x' is no int"),
        (b"rate: !!float {a: 1}\n", "line 1, is not valid YAML"),
        (b"size: " + b"[" * 20_000, "Cannot read the configuration file '{path}'"),
        (b"size: &a {b: *a}\n", "In '{path}': size"),
        (b"size: {b: 2020-01-01}\n", "In '{path}': size"),
        (b"\xff\xfe\x00", "Cannot read the configuration file '{path}'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config={path}")
    assert said.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_old_and_a_new_spelling_in_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("evaluation_strategy: epoch\neval_strategy: steps\n")
    with pytest.raises(ConfigError) as caught:
        reward(f"--config={tmp_path / 'both.yaml'}")
    assert_names(caught.value, "evaluation_strategy", "eval_strategy", "both.yaml")


@pytest.mark.parametrize("text", ["on_bad_rows: maybe", "model_name_or_path: ''", "output_dir: ' '"])
def test_names_and_choices_of_a_reward_run_are_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        reward(f"--config={tmp_path / 'wrong.yaml'}")
    assert_names(caught.value, text.split(":")[0])


def test_help_is_short_and_takes_a_per_cent_sign_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: x [--flag=value ...]" in said
    assert_line_names(said, "50 %", "default: 4")
    assert "default: None" not in said


def test_help_explains_our_flags_and_names_those_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reward("--help")
    said = capsys.readouterr().out
    explained, named = said.split("And every flag of transformers.TrainingArguments:")
    assert "--ensemble_size" in explained
    assert "--max_grad_norm" not in explained
    assert "max_grad_norm" in named


def test_print_config_shows_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    print_config(Settings(size=9, names=["[bold]"]))
    said = capsys.readouterr().out
    assert "size" in said
    assert "9" in said
    assert "[bold]" in said
    assert "rate" not in said


def test_the_parser_of_transformers_reads_the_flags_of_the_original() -> None:
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--use_peft=True", "--lora_r=8", "--model_name=gpt2-medium", "--learning_rate=1e-6"]
    )
    assert isinstance(config, ScriptArguments)
    assert config == PPOConfig(use_peft=True, lora_r=8, model_name="gpt2-medium", learning_rate=1e-6)
    (arguments,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(["--use_seq2seq", "--lora_alpha=32"])
    assert arguments == ScriptArguments(use_seq2seq=True, lora_alpha=32)


@pytest.mark.parametrize("name", ["", "/below"])
def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write to --output_dir"):
        output_folder(f"{tmp_path / 'file'}{name}")


def test_every_recipe_is_understood() -> None:
    assert ppo("--config", str(PROJECT / "configs" / "ppo_hh.yaml")).ppo_epochs == 8
    arguments, config = reward("--config", str(PROJECT / "configs" / "reward_hh.yaml"), "--report_to=none")
    assert arguments.dataset_name == "Anthropic/hh-rlhf"
    assert config.learning_rate == 1.41e-5


@pytest.mark.parametrize(("value", "problem"), [("a\udcff", "UTF-8"), ("\ud800", "UTF-8"), ("a\0b", "null")])
def test_a_value_that_is_not_utf8_names_its_flag(value: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        ppo(f"--query_dataset={value}")
    assert_names(error.value, "--query_dataset", problem, repr(value))
    with pytest.raises(ConfigError) as error:
        parsed("--names", "b", value)
    assert_names(error.value, "--names", problem, repr(value))
    (tmp_path / "run.yaml").write_text(f'output_dir: "{ascii(value)[1:-1]}"\n')
    with pytest.raises(ConfigError) as error:
        reward(f"--config={tmp_path / 'run.yaml'}")
    assert_names(error.value, "output_dir", "run.yaml")


def test_an_output_folder_is_no_url_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="s3://bucket/run"):
        output_folder("s3://bucket/run")
    assert list(tmp_path.iterdir()) == []
    assert output_folder("run") == tmp_path / "run"
