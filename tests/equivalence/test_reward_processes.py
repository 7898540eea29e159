"""Two processes train a reward model as one does, with micro-batches of their own number."""

import json
import os
import subprocess
import sys

import pytest
import reward_processes
import torch
import transformers

from deep_rlhf.algorithms.supervised import reward_trainer

pytestmark = pytest.mark.processes


def test_two_processes_have_the_losses_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(reward_trainer.TOKENS_AT_ONCE, "cpu", reward_processes.TOKENS)
    tokenizer.save_pretrained(tmp_path)
    shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.2}
    for kind, name, sizes in (
        ("gpt2", "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("distilbert", "DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    ):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**shared, **sizes)
        getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(tmp_path / kind)
    launch = "-m accelerate.commands.launch --num_processes 2 --cpu --module torch.distributed.run"
    two = "--standalone --nproc_per_node 2"  # as in test_two_processes.py
    finished = subprocess.run(
        [sys.executable, *f"{launch} {two}".split(), reward_processes.__file__, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-9000:]
    written = json.loads((tmp_path / "losses.json").read_text())
    assert written["processes"] == 2
    for name in reward_processes.RUNS:
        expected, tolerance = reward_processes.losses(tmp_path, name, 1), 5e-3 if name == "bf16" else 1e-5
        assert len(expected) == 4
        assert max(expected) - min(expected) > 0.05
        assert written["losses"][name] == pytest.approx(expected, abs=tolerance), name
