"""Scripts written for TRL run whole, with nothing changed but the name they import from, and they learn."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from deep_rlhf.compat.trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

pytestmark = pytest.mark.processes

SCRIPTS = Path(__file__).parent / "trl_scripts"
SETTINGS = {
    "steps": 480,
    "batch_size": 32,
    "mini_batch_size": 16,
    "learning_rate": 5e-3,
    "init_kl_coef": 0.02,
    "max_grad_norm": 1.0,
    "seed": 1,
}


@pytest.fixture
def run_script(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """run_script(name, kind, *arguments): the globals that the script left behind."""

    def run(name: str, kind: str, *arguments: str, spread: float = 0.02) -> dict[str, Any]:
        make_model(kind, spread=spread).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        source = (SCRIPTS / name).read_text(encoding="utf-8")
        changed = source.replace("from trl", "from deep_rlhf.compat.trl")
        assert changed.count("deep_rlhf") == source.count("\nfrom trl")  # import lines, and nothing else
        (tmp_path / name).write_text(changed, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        return runpy.run_path(str(tmp_path / name), run_name="__main__")

    return run


def flags(**settings: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def assert_learned(history: list[dict[str, Any]], *, by: float) -> None:
    scores = [stats["ppo/mean_scores"] for stats in history]
    assert len(scores) == 15
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + by, scores


def test_the_sentiment_script_learns_and_saves_a_plain_folder(run_script: Callable[..., dict[str, Any]]) -> None:
    left = run_script("sentiment.py", "gpt2", *flags(model_name="model", **SETTINGS))
    assert_learned(left["history"], by=1.0)
    assert left["history"][-1]["objective/kl"] > 0.1
    trained = left["model"]
    plain = AutoModelForCausalLM.from_pretrained("tuned")
    assert torch.equal(plain.transformer.wte.weight, trained.pretrained_model.transformer.wte.weight)
    reopened = AutoModelForCausalLMWithValueHead.from_pretrained("tuned")
    assert torch.equal(reopened.v_head.summary.weight, trained.v_head.summary.weight)
    assert reopened.v_head.summary.weight.abs().sum() > 0
    ids = torch.tensor([[3, 4, 5]])
    for mine, theirs in zip(reopened(ids), trained(ids), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:  # the trained model has faster kernels
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_same_script_learns_with_t5(run_script: Callable[..., dict[str, Any]]) -> None:
    left = run_script("sentiment.py", "t5", *flags(model_name="model", use_seq2seq=True, **SETTINGS))
    assert_learned(left["history"], by=1.0)
    reopened = AutoModelForSeq2SeqLMWithValueHead.from_pretrained("tuned")
    assert torch.equal(reopened.v_head.summary.weight, left["model"].v_head.summary.weight)
    AutoModelForSeq2SeqLM.from_pretrained("tuned")


@pytest.mark.slow
def test_the_same_script_learns_with_adapters_and_no_second_model(run_script: Callable[..., dict[str, Any]]) -> None:
    arguments = flags(model_name="model", use_peft=True, **SETTINGS | {"learning_rate": 2e-2})
    left = run_script("sentiment.py", "gpt2", *arguments, spread=0.2)  # frozen embeddings of 0.02 say nothing
    assert left["ppo_trainer"].ref_model is None
    assert_learned(left["history"], by=0.5)
    base = AutoModelForCausalLM.from_pretrained("model").state_dict()
    trained = left["model"].pretrained_model.get_base_model().state_dict()
    name = "transformer.h.0.attn.c_attn"
    assert torch.equal(trained[f"{name}.base_layer.weight"], base[f"{name}.weight"])
    reopened = AutoModelForCausalLMWithValueHead.from_pretrained("tuned")  # the folder holds adapters and head
    assert reopened.is_peft_model
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(reopened(ids)[0], left["model"](ids)[0])
    assert torch.equal(reopened.v_head.summary.weight, left["model"].v_head.summary.weight)


def test_the_quick_start_steps_with_an_optimizer_of_its_own(run_script: Callable[..., dict[str, Any]]) -> None:
    left = run_script("quickstart.py", "gpt2", "model")
    before = AutoModelForCausalLM.from_pretrained("model").transformer
    after = left["model"].pretrained_model.transformer
    assert torch.equal(after.h[0].mlp.c_fc.weight, before.h[0].mlp.c_fc.weight)  # the shared layer is frozen
    assert not torch.equal(after.h[1].mlp.c_fc.weight, before.h[1].mlp.c_fc.weight)
    assert left["train_stats"]["tokens/responses_len_mean"] == 4
    assert left["second_stats"]["tokens/responses_len_mean"] in (2, 3)
    assert left["train_stats"]["ppo/learning_rate"] == pytest.approx(0.1)
    assert left["second_stats"]["ppo/learning_rate"] == pytest.approx(0.05)
    assert left["second_stats"]["objective/kl_coef"] == 0.2
