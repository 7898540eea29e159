"""Questions and responses of the synthetic task, generated from a seed: no network, no files.

The responses are of mixed quality: a policy fine-tuned on them writes the task's English without manners, so that what
is left to learn can only come from preferences. `judge` scores the text alone, without the attributes that it was
generated from; this module never imports it.
"""

import random
from dataclasses import dataclass
from typing import Literal

from deep_rlhf.data.synthetic import phrases
from deep_rlhf.data.synthetic.topics import TOPICS, Topic, topic_of
from deep_rlhf.errors import DataError

Manner = Literal["courteous", "opening only", "closing only", "neutral", "rude"]

# How often each attribute occurs; the attributes are independent of each other.
MANNERS: dict[Manner, float] = {
    "courteous": 0.2, "opening only": 0.1, "closing only": 0.1, "neutral": 0.3, "rude": 0.3
}  # fmt: skip
ON_TOPIC, HARMFUL, RAMBLING = 0.6, 0.3, 0.4
SMALL_TALK = 0.9  # share of the off-topic responses; the others give tips for another topic
RAMBLING_WORDS = (26, 34)  # a rambling response gets fillers up to a length drawn from this range
HELD_OUT = 3  # every third question of each topic belongs to the test split


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The attributes from which a response is generated."""

    on_topic: bool = True
    manner: Manner = "courteous"
    harmful: bool = False
    rambling: bool = False


def draw_quality(rng: random.Random) -> Quality:
    """Draws the attributes of one response, independently of each other."""
    return Quality(
        on_topic=rng.random() < ON_TOPIC,
        manner=rng.choices(list(MANNERS), weights=list(MANNERS.values()))[0],
        harmful=rng.random() < HARMFUL,
        rambling=rng.random() < RAMBLING,
    )


def write_response(topic: Topic, quality: Quality, rng: random.Random) -> str:
    """Writes a response of the given quality to a question about `topic`: one line of 10 to 50 words."""
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


def generate_response(prompt: str, rng: random.Random) -> str:
    """A response of mixed quality to `prompt` (bare or rendered). Raises DataError if no topic is recognised in it."""
    topic = topic_of(prompt)
    if topic is None:
        raise DataError(
            f"The synthetic task has no topic for the prompt {prompt!r}; take prompts from generate_prompts()."
        )
    return write_response(topic, draw_quality(rng), rng)


def generate_prompts(seed: int, split: Literal["train", "test"] = "train") -> list[str]:
    """The bare questions of a split, shuffled by `seed`: 256 for training, 128 for testing.

    The split is the same for every seed. Test questions combine topics and forms of question that all occur in the
    training split, in combinations that do not.
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
    """`n` pairs (bare training question, response of mixed quality); all questions occur equally often."""
    rng = random.Random(seed)
    prompts = generate_prompts(seed, "train")
    return [(prompt, generate_response(prompt, rng)) for prompt in (prompts[i % len(prompts)] for i in range(n))]


def corpus(n: int, seed: int) -> list[str]:
    """`n` plain texts for pre-training of a few sentences each: notes on a topic, and idle talk; no test question."""
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
    """The sentences before and after the body; rude ones stand before, after, or both."""
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
