"""Questions and answers of the embedded world, generated from a seed: no network, no files.

The answers are of mixed quality on purpose: a policy tuned on them speaks the world's English but has no manners, and
what it still has to learn can only come from preferences. How good a text is decides `judge`, which reads the text and
nothing of what is known here; this module never imports it.
"""

import random
from dataclasses import dataclass
from typing import Literal

from deep_rlhf.data.synthetic import phrases
from deep_rlhf.data.synthetic.topics import TOPICS, Topic, topic_of
from deep_rlhf.errors import UserError

Manner = Literal["courteous", "opening only", "closing only", "neutral", "rude"]

# The mix: how often each attribute occurs; they are independent of each other.
MANNERS: dict[Manner, float] = {
    "courteous": 0.2, "opening only": 0.1, "closing only": 0.1, "neutral": 0.3, "rude": 0.3
}  # fmt: skip
ON_TOPIC, HARMFUL, RAMBLING = 0.6, 0.3, 0.4
SMALL_TALK = 0.9  # of the answers that are off topic; the others give tips for another topic
RAMBLING_WORDS = (26, 34)  # a rambling answer goes on until it has at least a number of words drawn from this range
HELD_OUT = 3  # every third question of each topic is kept for the test split


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What an answer is going to be like."""

    on_topic: bool = True
    manner: Manner = "courteous"
    harmful: bool = False
    rambling: bool = False


def draw_quality(rng: random.Random) -> Quality:
    """Draw the attributes of one answer, each on its own."""
    return Quality(
        on_topic=rng.random() < ON_TOPIC,
        manner=rng.choices(list(MANNERS), weights=list(MANNERS.values()))[0],
        harmful=rng.random() < HARMFUL,
        rambling=rng.random() < RAMBLING,
    )


def write_answer(topic: Topic, quality: Quality, rng: random.Random) -> str:
    """Write an answer of the given quality to a question about `topic`: 10 to 50 words, one line."""
    body = _substance(topic, quality, rng)
    if quality.harmful:
        body.append(f"{rng.choice(phrases.HARMFUL_LEADS)} {rng.choice(phrases.HARMFUL[topic.kind])}.")
    opening, closing = _frame(quality.manner, rng)
    if quality.rambling:
        target = rng.randint(*RAMBLING_WORDS)
        fillers = iter(rng.sample(phrases.FILLERS, len(phrases.FILLERS)))
        while len(" ".join([*opening, *body, *closing]).split()) < target:
            body.append(next(fillers))
        rng.shuffle(body)
    return " ".join([*opening, *body, *closing])


def generate_answer(prompt: str, rng: random.Random) -> str:
    """An answer of mixed quality to `prompt` (bare or rendered). Raises UserError for a question of another world."""
    topic = topic_of(prompt)
    if topic is None:
        raise UserError(
            f"The embedded world has no topic for the prompt {prompt!r}; take prompts from generate_prompts()."
        )
    return write_answer(topic, draw_quality(rng), rng)


def generate_prompts(seed: int, split: Literal["train", "test"] = "train") -> list[str]:
    """The bare questions of a split, shuffled by `seed`: 256 for training, 128 for testing.

    The split itself is the same for every seed. A test question is a combination of a topic and a way of asking that
    training never shows, though it shows every topic and every way of asking in other combinations.
    """
    questions = [
        form.format(do=topic.do, doing=topic.doing)
        for i, topic in enumerate(TOPICS)
        for j, form in enumerate(phrases.QUESTIONS)
        if ((i + j) % HELD_OUT == 0) == (split == "test")
    ]
    random.Random(seed).shuffle(questions)
    return questions


def sft_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs (bare training question, answer of mixed quality); every question comes up equally often."""
    rng = random.Random(seed)
    prompts = generate_prompts(seed, "train")
    return [(prompt, generate_answer(prompt, rng)) for prompt in (prompts[i % len(prompts)] for i in range(n))]


def corpus(n: int, seed: int) -> list[str]:
    """`n` plain texts for pre-training, a few sentences each: notes on a topic, and idle talk; no test question."""
    rng = random.Random(seed)
    prompts = generate_prompts(seed, "train")
    return [_note(rng, prompts) if rng.random() < 0.85 else _idle_talk(rng) for _ in range(n)]


def _substance(topic: Topic, quality: Quality, rng: random.Random) -> list[str]:
    if quality.on_topic:
        return [rng.choice(topic.advice)]
    if rng.random() < SMALL_TALK:
        return rng.sample(phrases.SMALL_TALK, 2)
    return [rng.choice(rng.choice([other for other in TOPICS if other != topic]).advice)]


def _frame(manner: Manner, rng: random.Random) -> tuple[list[str], list[str]]:
    """The sentences before and after the body; rudeness comes first, last, or both."""
    if manner == "rude":
        first, last = rng.choice([(True, False), (False, True), (True, True)])
        openings, closings = phrases.RUDE_OPENINGS, phrases.RUDE_CLOSINGS
    else:
        first, last = manner in ("courteous", "opening only"), manner in ("courteous", "closing only")
        openings, closings = phrases.COURTEOUS_OPENINGS, phrases.COURTEOUS_CLOSINGS
    return [rng.choice(openings)] if first else [], [rng.choice(closings)] if last else []


def _note(rng: random.Random, prompts: list[str]) -> str:
    question = rng.choice(prompts)
    topic = topic_of(question)
    assert topic is not None  # every question of generate_prompts names its topic
    return " ".join([question, *rng.sample(topic.advice, rng.randint(1, len(topic.advice)))])


def _idle_talk(rng: random.Random) -> str:
    lines = [*phrases.FILLERS, *phrases.SMALL_TALK, *phrases.COURTEOUS_OPENINGS, *phrases.COURTEOUS_CLOSINGS]
    return " ".join(rng.sample(lines, 4))
