"""Generated stand-ins for what the commands name, under the same names: tiny random models, text of the synthetic task.

`from_pretrained` and our loader open a relative folder of that name, so the original's commands run offline as typed.
"""

import gzip
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import generate_prompts, sft_pairs

SCRIPTS = ("ppo.py", "reward_modeling.py", "utils.py")
PROJECT = Path(__file__).resolve().parents[2]


def build_workplace(folder: Path) -> None:
    """The scripts, models and data sets that the two commands name, in `folder`."""
    link_scripts(folder)
    write_gpt2(folder / "gpt2")
    write_distilbert(folder / "distilbert" / "distilbert-base-uncased")
    write_t5(folder / "t5-small")
    write_preferences(folder / "Anthropic" / "hh-rlhf")
    write_prompts(folder / "wentingzhao" / "anthropic-hh-first-prompt")


def link_scripts(folder: Path) -> None:
    """The project's scripts, so that `python ppo.py` is typed as it stands in the README."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        (folder / name).symlink_to(PROJECT / name)


def write_preferences(folder: Path) -> None:
    """hh-rlhf's own layout: whole dialogues, `chosen` and `rejected`; two rows that must be dropped and counted."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    pairs = sft_pairs(480, seed=1)
    rows = []
    for prompt, response in pairs[:220]:
        other = rng.choice(pairs)[1]
        rows.append(
            {"chosen": HH.prompt(prompt) + HH.response(response), "rejected": HH.prompt(prompt) + HH.response(other)}
        )
    same, long = rows[0]["chosen"], HH.prompt("Tell me more.") + " and so on" * 800
    rows.insert(3, {"chosen": same, "rejected": same})
    rows.insert(5, {"chosen": long, "rejected": long + " for ever"})
    write_jsonl(folder / "train.jsonl.gz", rows[:190])
    write_jsonl(folder / "test.jsonl.gz", rows[190:])


def write_prompts(folder: Path) -> None:
    """The published layout of the first prompts: columns `user`, `system`, `source`."""
    folder.mkdir(parents=True)
    rows = [{"user": prompt, "system": "", "source": "world"} for prompt in generate_prompts(1)[:140]]
    write_jsonl(folder / "train.jsonl.gz", rows)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object per line, gzip if the name says so."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_gpt2(folder: Path) -> None:
    """Byte-level BPE, one special token and no padding, as GPT-2's; two tiny layers."""
    tokenizer = _byte_level(["<|endoftext|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=1024
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    end = fast.eos_token_id
    config = GPT2Config(
        vocab_size=len(fast), n_positions=1024, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_distilbert(folder: Path) -> None:
    """Lower-cased WordPiece with [CLS] and [SEP], as BERT's; a masked language model, which has no reward head."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(fast), dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertForMaskedLM(config).save_pretrained(folder)


def write_t5(folder: Path) -> None:
    """A tiny encoder-decoder whose padding starts the decoder, as T5's."""
    tokenizer = _byte_level(["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(fast),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        decoder_start_token_id=fast.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> list[str]:
    return [HH.prompt(prompt) + HH.response(response) for prompt, response in sft_pairs(200, seed=2)]
