"""The published sizes of GPT-2 and DistilBERT-base, and whole prompts, for headline.py and gpu.py."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

GPT2 = {"layers": 12, "width": 768, "heads": 12}  # 124M parameters with its vocabulary
DISTILBERT = {"layers": 6, "width": 768, "heads": 12, "vocabulary": 30_522}  # 66M


def whole_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, longest: int, count: int
) -> tuple[list[str], list[int]]:
    """`count` of the texts with at most `longest` tokens, and their lengths in tokens.

    They are evenly spaced in order of length, from the shortest to the longest; few texts are repeated.
    """
    texts = list(dict.fromkeys(texts))
    by_length = sorted(zip(map(len, tokenizer(texts).input_ids), texts, strict=True))
    usable = [(length, text) for length, text in by_length if length <= longest]
    chosen = [usable[i * (len(usable) - 1) // (count - 1)] for i in range(count)]
    return [text for _, text in chosen], [length for length, _ in chosen]
