"""The small policy of the synthetic task, pretrained from random weights: where the demo and `teach` start.

It writes the task's English, in responses of mixed quality. Pretraining takes a minute or two on two cores;
`cached_policy` does it once and keeps the result.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import corpus, sft_pairs
from deep_rlhf.errors import ResourceError
from deep_rlhf.models.saving import save_model

QUIET: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
RECIPE = 1  # raise it whenever the same texts and sizes would give another policy


@dataclass(frozen=True)
class PolicyScale:
    """The size of the policy and of its training data."""

    layers: int = 4
    width: int = 128
    corpus_texts: int = 1_500
    sft_pairs: int = 8_000


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the task's texts, with a padding token distinct from EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_536,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = [HH.prompt(prompt) + HH.response(response) for prompt, response in sft_pairs(4_000, seed)]
    tokenizer.train_from_iterator(pairs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=256,
    )


def pretrain(
    seed: int, scale: PolicyScale, tokenizer: PreTrainedTokenizerFast, on_step: Callable[[], None] | None = None
) -> GPT2LMHeadModel:
    """Trains a GPT-2 from random weights on plain text, then on responses of mixed quality.

    `on_step` is called after every update; what it raises ends the training.
    """
    set_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=scale.width,
            n_layer=scale.layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = [("", text) for text in corpus(scale.corpus_texts, seed)]
    responses = [(HH.prompt(prompt), HH.response(response)) for prompt, response in sft_pairs(scale.sft_pairs, seed)]
    for examples in (texts, responses):
        with TemporaryDirectory() as folder:
            train_sft(
                SFTConfig(
                    output_dir=folder,
                    per_device_train_batch_size=16,
                    num_train_epochs=1,
                    learning_rate=3e-3,
                    adam_beta2=0.98,
                    lr_scheduler_type="cosine",
                    warmup_steps=20,
                    seed=seed,
                    **QUIET,
                ),
                model,
                tokenizer,
                examples,
                on_step,
            )
    return model


def cached_policy(seed: int = 1, scale: PolicyScale | None = None, on_step: Callable[[], None] | None = None) -> Path:
    """The folder of the policy and its tokenizer, as plain transformers opens it; pretrained if it does not exist.

    It is in $XDG_CACHE_HOME (~/.cache) under deep-rlhf/, its name contains a fingerprint of the data and sizes, and it
    appears only when it is complete. Raises ResourceError if the folder cannot be written, and what `on_step` raises.
    """
    scale = scale or PolicyScale()
    folder = cached_policy_folder(seed, scale)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ResourceError(
            f"The policy cannot be saved in '{folder.parent}' ({error.strerror}): set XDG_CACHE_HOME to a folder that"
            " can be written, or give --model."
        ) from error
    try:
        tokenizer = build_tokenizer(seed)
        save_model(pretrain(seed, scale, tokenizer, on_step), tokenizer, temporary)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process has just saved the same policy
            raise ResourceError(
                f"The policy cannot be saved in '{folder.parent}' ({error.strerror}): free some disk space."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cached_policy_folder(seed: int = 1, scale: PolicyScale | None = None) -> Path:
    """The folder that `cached_policy` returns, whether it exists or not."""
    scale = scale or PolicyScale()
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    made_from = {
        "recipe": RECIPE,
        "seed": seed,
        "scale": dataclasses.asdict(scale),
        "texts": [corpus(scale.corpus_texts, seed), sft_pairs(scale.sft_pairs, seed)],
    }
    fingerprint = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    return root / "deep-rlhf" / f"synthetic-policy-{fingerprint}"
