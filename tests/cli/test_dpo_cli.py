"""`deep-rlhf dpo` on small generated stand-ins for the model and data that its defaults name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures import write_gpt2, write_preferences, write_t5
from transformers import AutoModelForSeq2SeqLM, pipeline

from deep_rlhf.cli.dpo import main
from deep_rlhf.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_gpt2(folder / "gpt2")
    write_t5(folder / "t5-small")
    write_preferences(folder / "Anthropic" / "hh-rlhf")
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


SHORT = ["--report_to=none", "--max_steps=4", "--per_device_train_batch_size=8", "--logging_steps=2", "--use_cpu"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_with_the_defaults_leaves_a_policy_and_its_figures(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*SHORT, "--learning_rate=1e-3"])
    folder = place / "outputs" / "dpo"
    said = pipeline("text-generation", model=str(folder / "model"))("\n\nHuman: Hello\n\nAssistant:", max_new_tokens=4)
    assert said[0]["generated_text"].startswith("\n\nHuman: Hello")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rows"]["train"] == {
        "read": 190,
        "kept": 188,
        "dropped": {"chosen equals rejected": 1, "too long": 1},
    }
    assert {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "seconds"} <= summary.keys()
    metrics = read(folder / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=0.05)  # ln 2 before the first update
    assert [row["step"] for row in metrics if "eval_accuracy" in row] == [2, 4, 4]
    assert metrics[-1]["eval_margin"] == summary["margin"]
    out = capsys.readouterr().out
    assert "1 too long" in out
    assert "held-out accuracy" in out
    assert str(Path("outputs/dpo/model")) in out


def test_the_resolved_flags_run_again(place: Path) -> None:
    main([*SHORT, "--beta=0.3", "--output_dir=first", "--save_strategy=no"])
    resolved = yaml.safe_load((place / "first" / "config.yaml").read_text())
    assert resolved["beta"] == 0.3
    assert resolved["model_name_or_path"] == "gpt2"
    main(["--config=first/config.yaml", "--output_dir=second"])
    first, second = (json.loads((place / name / "summary.json").read_text()) for name in ("first", "second"))
    assert second["loss"] == first["loss"]


def test_an_encoder_decoder_with_adapters(place: Path) -> None:
    flags = ["--model_name_or_path=t5-small", "--use_seq2seq", "--use_peft", "--output_dir=t5", "--save_strategy=no"]
    main([*SHORT, *flags])
    assert AutoModelForSeq2SeqLM.from_pretrained(place / "t5" / "model").config.model_type == "t5"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--beta=-1"], "beta must be greater than 0.0, not -1.0."),
        (["--betta=1"], "Unknown argument --betta. Did you mean --beta?"),
        (["--model_name_or_path=./nowhere"], "There is no folder './nowhere'"),
        (["--model_name_or_path=t5-small"], "Cannot open the decoder-only language model 't5-small'"),
        (["--max_length=3"], "No training pair is left"),
    ],
)
def test_a_mistake_is_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        main([*SHORT, "--output_dir=wrong", *flags])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
