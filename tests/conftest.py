"""Tiny tokenizers and models that every test can make in milliseconds, the same on every machine."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the expectations are those of a CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: workers of pytest share the cores
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # no thread: see processes.py

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = 0, 1, 2
# fmt: off
WORDS = [
    "red", "green", "blue", "black", "white", "gold", "grey", "pink", "one", "two", "three", "four", "five",
    "six", "seven", "eight", "the", "a", "cat", "dog", "bird", "fish", "sees", "likes", "finds", "eats",
    "and", "or", "not", "very", "small", "big", "old", "new", "good", "bad", "sun", "moon", "tree", "house",
]
# fmt: on
VOCABULARY = 3 + len(WORDS)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, for tests of Ctrl-C
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it saves

# The marker of every test that uses a fixture of this name, or that has this parameter.
MARKED_BY_FIXTURE = {
    "browser": pytest.mark.browser,
    "postgres": pytest.mark.postgres,
    "own_server": pytest.mark.postgres,
    "workplace": pytest.mark.processes,
}
MARKED_BY_PARAMETER = {"postgresql": pytest.mark.postgres}
MARKED_BY_FOLDER = {"learning": pytest.mark.learning}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by the fixtures they use and the folder they are in, so that no test forgets its marker."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = [value for value in _parameters(item) if isinstance(value, str)]
        marks = [mark for name, mark in MARKED_BY_FIXTURE.items() if name in item.fixturenames]
        marks += [mark for name, mark in MARKED_BY_PARAMETER.items() if name in parameters]
        marks += [mark for name, mark in MARKED_BY_FOLDER.items() if item.path.parent.name == name]
        for mark in marks:
            item.add_marker(mark)


def _parameters(item: pytest.Function) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(words=WORDS): one token per word; ids 0 <pad>, 1 <eos>, 2 <unk>, then the words."""

    def make(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
        ids = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
        backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """make_model(kind, seed=0, spread=0.2, **config): a two-layer model; kind is a key of `_CONFIGS` or "lora".

    `spread` is the standard deviation of the random weights: large enough that a wrong mask or position is seen.
    """

    def make(kind: str, *, seed: int = 0, spread: float = 0.2, **overrides: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if kind == "lora":
                return _with_lora(make("gpt2", seed=seed, spread=spread, **overrides), spread)
            config_class, model_class, settings = _CONFIGS[kind]
            shared = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
            config = getattr(transformers, config_class)(**(shared | settings | overrides))
            model: PreTrainedModel = getattr(transformers, model_class)(config).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=spread)
            model.tie_weights()
            return model

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and models for development that lie beside the checkout, where they do."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared/ folder beside the checkout")
    return folder


def _with_lora(model: PreTrainedModel, spread: float) -> Any:
    """Adapters that already do something: peft's start at zero."""
    from deep_rlhf.models.adapters import add_lora

    adapted = add_lora(model, r=4, alpha=8, task_type="CAUSAL_LM")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return adapted


_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA_LIKE),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _LLAMA_LIKE | {"logits_scaling": 0.5}),
    "gemma2": (  # soft-capped logits, and every other layer sees only the last four tokens
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _LLAMA_LIKE | {"sliding_window": 4, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5 | {"tie_word_embeddings": True}),
    "t5-untied": (
        "T5Config",
        "T5ForConditionalGeneration",
        _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "bart": (  # an encoder-decoder with absolute positions
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
    ),
}
