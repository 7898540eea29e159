"""`deep-rlhf plan` against the memory that real runs take, as the operating system says."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from deep_rlhf.planning.memory_plan import GIB
from deep_rlhf.runtime.precision import multiplies_bf16

pytestmark = [pytest.mark.processes, pytest.mark.timing]

VOCABULARY = 50_257  # GPT-2's
PROMPT, RESPONSE, TEXT = 64, 48, 250  # in tokens
FORMAT = "bf16" if multiplies_bf16(torch.device("cpu")) else "fp32"  # what is emulated takes minutes, and other memory
GPT2 = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": VOCABULARY, "eos_token_id": 0, "bos_token_id": None}
DISTILBERT = {"n_layers": 6, "dim": 384, "hidden_dim": 1536, "n_heads": 6, "vocab_size": VOCABULARY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with 30 million weights each, and texts of known length in a vocabulary of GPT-2's size."""
    folder = tmp_path_factory.mktemp("plan")
    ids = {"<eos>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<unk>")
    for name, model in (
        ("policy", GPT2LMHeadModel(GPT2Config(**GPT2))),
        ("scorer", GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1, pad_token_id=1))),
        ("encoder", DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT, num_labels=1))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(length))

    write_jsonl(folder / "prompts.jsonl", [{"prompt": text(PROMPT)} for _ in range(16)])
    pairs = [{"prompt": text(TEXT - 20) + " ", "chosen": text(20), "rejected": text(20)} for _ in range(16)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def peak_of(folder: Path, *argv: str) -> int:
    """The most main memory that a command took, as the operating system says, in bytes."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deep_rlhf.cli.main", *argv], cwd=folder, env=env, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        assert status == 0, log.read()
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def planned_peak(folder: Path, *argv: str) -> float:
    """What `plan` says in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-m", "deep_rlhf.cli.main", "plan", *argv],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"Peak: ([\d.]+) GiB", out)
    assert found, out
    return float(found[1]) * GIB


PPO = shlex.split(f"""
    ppo --model_name=./policy --reward_model=./scorer --query_dataset=./prompts.jsonl --template=plain --batch_size=16
    --mini_batch_size=4 --max_prompt_length={PROMPT} --max_new_tokens={RESPONSE} --ppo_epochs=1 --steps=16
""")
REWARD = shlex.split(f"""
    reward --model_name_or_path=./encoder --dataset_name=./pairs.jsonl --template=plain --max_length={TEXT}
    --per_device_train_batch_size=8 --report_to=none
""")


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param([*PPO, f"--precision={FORMAT}"], id=f"ppo {FORMAT}"),
        pytest.param([*REWARD, "--precision=fp32"], id="reward fp32"),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(folder: Path, argv: list[str], tmp_path: Path) -> None:
    argv = [*argv, f"--output_dir={tmp_path}"]
    assert planned_peak(folder, *argv) == pytest.approx(peak_of(folder, *argv), rel=0.15)
