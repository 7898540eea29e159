"""A tiny policy, annotators with a planted taste, and the settings with which a whole session takes seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from deep_rlhf.feedback.annotators.simulated import AnnotatorHabits, SimulatedLabeler
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.session import Session
from deep_rlhf.feedback.state import STOP
from deep_rlhf.feedback.store import Store

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
HELD_OUT = ["the dog likes", "blue", "three birds", "sun"]
TOKENS = 8
HONEST = AnnotatorHabits(temperature=0.02, error_rate=0.05, cant_tell_rate=0.05)
SETTINGS: dict[str, Any] = {
    **{"seed": 1, "updates": 9, "initial_labels": 48, "labels": 96, "label_decay": 50, "mode": "batched"},
    **{"batch_size": 32, "mini_batch_size": 32, "ppo_epochs": 4, "learning_rate": 3e-3, "init_kl_coef": 0.005},
    **{"max_new_tokens": TOKENS, "max_prompt_length": 40, "template": "plain", "reward_learning_rate": 3e-3},
    **{"members": 3, "held_out_members": 0, "fixed_prompts": 2, "batched_updates": 3, "refit_after": 12},
    **{"pace": 0.0, "threads": 1},
}


def brevity(prompt: str, response: str) -> float:
    """The share of the longest response that is left unused: about 0.1 for an untrained policy."""
    return 1 - len(response.split()) / TOKENS


def judge(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """The mean of `brevity`."""
    return sum(map(brevity, prompts, responses)) / len(responses)


def policy_folder(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> str:
    """A plain transformers folder of an untrained policy."""
    make_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_session(model: str, folder: Path, store: Store, **settings: Any) -> Session:
    """A session with three simulated annotators, unless `labeler` says otherwise."""
    STOP.write(store, None)
    others = {name: settings.pop(name) for name in ("labeler", "on_update") if name in settings}
    return Session(
        SessionConfig(**(SETTINGS | settings)),
        store=store,
        output_dir=folder,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model),
        prompts=PROMPTS,
        held_out_prompts=HELD_OUT,
        judge=judge,
        **({"labeler": SimulatedLabeler(brevity, seed=1, habits=HONEST)} | others),
    )
