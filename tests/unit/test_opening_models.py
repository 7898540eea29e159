"""The error for a model that cannot be opened is one sentence, whatever the library's message looks like."""

from typing import Any

import pytest

from deep_rlhf.errors import ModelError
from deep_rlhf.models import load

NO_BACKEND = """Couldn't instantiate the backend tokenizer from one of:\x20
(1) a `tokenizers` library serialization file,\x20
(2) a slow tokenizer instance to convert or\x20
(3) an equivalent slow tokenizer class to instantiate and convert.\x20
You need to have sentencepiece or tiktoken installed."""
NO_CONNECTION = """We couldn't connect to 'https://huggingface.co' to load the files.
Check your internet connection."""
SIZES = """Error(s) in loading state_dict for Linear:
\tsize mismatch for weight: the shape in current model is torch.Size([2, 1]).
\tsize mismatch for bias: the shape in current model is torch.Size([2])."""


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            NO_BACKEND,
            "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library serialization file, (2)"
            " a slow tokenizer instance to convert or (3) an equivalent slow tokenizer class to instantiate and"
            " convert.",
        ),
        (NO_CONNECTION, "We couldn't connect to 'https://huggingface.co' to load the files."),
        (
            SIZES,
            "Error(s) in loading state_dict for Linear: size mismatch for weight: the shape in current model is"
            " torch.Size([2, 1]).",
        ),
        ("is no valid model identifier\nIf this is private", "is no valid model identifier."),
        ("What is wrong:", "What is wrong."),
        ("", "OSError."),
    ],
)
def test_a_reason_is_a_whole_sentence(message: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(message)

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError) as error:
        load.load_tokenizer("gpt2")
    assert f"'gpt2': {sentence} Give a folder" in str(error.value)
