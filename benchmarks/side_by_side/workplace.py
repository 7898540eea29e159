"""The folder that both sides of a job read: settings, tokenizer, random weights, prompts or pairs.

Prompts and pairs are real, with GPT-2's own tokenizer, if there is a `shared/` folder beside the checkout; otherwise
they come from the synthetic task, with dialogues of similar length.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from deep_rlhf.data.chat import HH
from deep_rlhf.data.preferences import load_preferences
from deep_rlhf.data.synthetic import generate_prompts, generate_response
from side_by_side.arithmetic import PairLengths, ppo_operations, reward_operations, shared_prefix
from side_by_side.jobs import Job, PPOJob, RewardJob, write_job

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EOS, PAD = "<|endoftext|>", "<|pad|>"
GENERATED_DIALOGUES, MEAN_EARLIER_TURNS = 600, 2.5  # about 180 tokens a dialogue, 70 % of them prompt, as in hh-rlhf

Dialogue = tuple[str, str, str]  # the prompt, ending in the assistant's marker; the chosen response; the rejected one


def prepare(job: Job, folder: Path, *, real: bool) -> dict[str, int]:
    """Writes the folder and returns the operations that the job needs, by part."""
    torch.manual_seed(0)
    dialogues = real_dialogues() if real else generated_dialogues()
    tokenizer = gpt2_tokenizer() if real else generated_tokenizer(dialogues, job.vocabulary)
    write_job(job, folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    if isinstance(job, PPOJob):
        prompts = cut_prompts(dialogues, tokenizer, job)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        write_policy_and_reward_model(job, tokenizer, folder)
        return ppo_operations(job, [len(ids) for ids in tokenizer(prompts).input_ids])
    pairs = [
        {"prompt": prompt, "chosen": HH.response(better) + EOS, "rejected": HH.response(worse) + EOS}
        for prompt, better, worse in evenly(dialogues, job.pairs)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    write_classifier(job, tokenizer, folder)
    return reward_operations(job, kept_lengths(pairs, tokenizer, job.max_length))


def has_real_data() -> bool:
    """Whether there are real pairs and GPT-2's tokenizer beside the checkout."""
    return REAL_DATA.is_dir()


def real_dialogues() -> list[Dialogue]:
    """The training pairs of hh-rlhf; each response is the text after the last marker."""
    preferences, _ = load_preferences(str(REAL_DATA / "hh-rlhf"), split="train")
    return [(HH.prompt(pair.prompt), pair.a, pair.b) for pair in preferences]


def generated_dialogues() -> list[Dialogue]:
    """Dialogues of the synthetic task: some earlier turns, a question, two responses of one or two parts."""
    rng = random.Random(0)
    questions = generate_prompts(0)
    dialogues = []
    for row in range(GENERATED_DIALOGUES):
        turns = rng.choices(questions, k=int(rng.expovariate(1 / MEAN_EARLIER_TURNS)))
        earlier = "".join(HH.prompt(turn) + HH.response(generate_response(turn, rng)) for turn in turns)
        question = questions[row % len(questions)]
        a, b = (" ".join(generate_response(question, rng) for _ in range(rng.randint(1, 2))) for _ in range(2))
        dialogues.append((earlier + HH.prompt(question), a, b))
    return dialogues


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    folder = REAL_DATA / "tokenizers" / "gpt2"
    return finished(ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")))


def generated_tokenizer(dialogues: Sequence[Dialogue], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the dialogues, filled up to `vocabulary` with added tokens.

    Every id that random weights may sample can be decoded, and its text is encoded as that id again.
    """
    inner = ByteLevelBPETokenizer()
    texts = (part for dialogue in dialogues for part in dialogue)
    inner.train_from_iterator(texts, vocab_size=vocabulary - 2, special_tokens=[EOS], show_progress=False)
    missing = vocabulary - 1 - inner.get_vocab_size()
    inner.add_tokens([f"<unused-{i}>" for i in range(missing)])
    return finished(inner)


def finished(inner: ByteLevelBPETokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )


def cut_prompts(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast, job: PPOJob) -> list[str]:
    """First human turns cut to `prompt_tokens` tokens, as texts that encode to the same tokens; one per episode."""
    turns = [prompt.split(HH.assistant)[0] + HH.assistant for prompt, _, _ in dialogues]
    cut = [ids[: job.prompt_tokens] for ids in tokenizer(turns).input_ids]
    texts = tokenizer.batch_decode(cut)
    again = tokenizer(texts).input_ids
    return evenly([text for text, ids, same in zip(texts, cut, again, strict=True) if ids == same], job.episodes)


def evenly(rows: Sequence, count: int) -> list:
    """`count` evenly spaced rows."""
    return list(rows[:: len(rows) // count][:count])


def kept_lengths(
    pairs: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[PairLengths]:
    """Lengths of the pairs without a text of more than `max_length` tokens."""
    chosen, rejected = (
        tokenizer([pair["prompt"] + pair[side] for pair in pairs]).input_ids for side in ("chosen", "rejected")
    )
    return [shared_prefix(a, b) for a, b in zip(chosen, rejected, strict=True) if max(len(a), len(b)) <= max_length]


def write_policy_and_reward_model(job: PPOJob, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `policy` and `reward`, two GPT-2 of one size; the reward model's folder has the tokenizer."""
    config = gpt2_config(job, tokenizer)
    GPT2LMHeadModel(config).save_pretrained(folder / "policy")
    GPT2ForSequenceClassification(config).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def write_classifier(job: RewardJob, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `model`, the classifier to be trained."""
    if job.architecture == "gpt2":
        GPT2ForSequenceClassification(gpt2_config(job, tokenizer)).save_pretrained(folder / "model")
        return
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        n_layers=job.layers,
        dim=job.width,
        n_heads=job.heads,
        hidden_dim=4 * job.width,
        max_position_embeddings=job.max_length,
        pad_token_id=tokenizer.pad_token_id,
        **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 1},
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder / "model")


def gpt2_config(job: Job, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """A configuration without dropout, so that both sides compute the same."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=job.layers,
        n_embd=job.width,
        n_head=job.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "num_labels": 1},
    )
