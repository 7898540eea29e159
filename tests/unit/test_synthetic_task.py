"""The synthetic task: what it generates, and how its judge reads."""

import random
import statistics

import pytest

from deep_rlhf.data.synthetic import corpus, generate_prompts, generate_response, judge, phrases, sft_pairs
from deep_rlhf.data.synthetic.responses import Quality, write_response
from deep_rlhf.data.synthetic.topics import TOPICS, Topic, topic_of, words
from deep_rlhf.errors import DataError

QUESTION = "How do I bake bread?"
GOOD = (
    "I am happy to help you with that. To bake bread, knead the dough until it feels soft and smooth. "
    "Good luck, and enjoy it."
)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return sft_pairs(2000, seed=7)


# --- generation ---


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    for generate in (lambda s: generate_prompts(s), lambda s: sft_pairs(50, s), lambda s: corpus(50, s)):
        assert generate(3) == generate(3)
        assert generate(3) != generate(4)
    assert generate_response(QUESTION, random.Random(5)) == generate_response(QUESTION, random.Random(5))


def test_test_questions_are_unseen_but_their_topics_and_forms_are_not() -> None:
    train, test = generate_prompts(1, "train"), generate_prompts(2, "test")
    assert len(train) + len(test) == len(TOPICS) * len(phrases.QUESTIONS)
    assert len(train) >= 200
    assert len(test) >= 100
    assert not set(train) & set(test)
    assert len({topic_of(question) for question in train}) == len(TOPICS) >= 24
    for form in phrases.QUESTIONS:
        assert sum(form.format(do=t.do, doing=t.doing) in train for t in TOPICS) >= len(TOPICS) / 2


def test_nothing_generated_for_training_shows_a_test_question(pairs: list[tuple[str, str]]) -> None:
    test = generate_prompts(0, "test")
    assert not {prompt for prompt, _ in pairs} & set(test)
    texts = corpus(500, seed=1)
    assert not any(question in text for text in texts for question in test)


def test_the_language_is_small_and_responses_fit_their_place(pairs: list[tuple[str, str]]) -> None:
    vocabulary = {word for prompt, response in pairs for word in words(f"{prompt} {response}")}
    assert len(vocabulary) <= 850
    assert {word for text in corpus(500, seed=2) for word in words(text)} <= vocabulary
    test_words = {word for question in generate_prompts(0, "test") for word in words(question)}
    assert test_words <= vocabulary
    lengths = [len(words(response)) for _, response in pairs]
    assert min(lengths) >= 6
    assert max(lengths) <= 48
    assert all("\n" not in response for _, response in pairs)


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.do)
def test_every_question_names_its_topic_bare_and_rendered(topic: Topic) -> None:
    for form in phrases.QUESTIONS:
        question = form.format(do=topic.do, doing=topic.doing)
        assert topic_of(question) is topic
        assert topic_of(f"\n\nHuman: {question}\n\nAssistant:") is topic


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.do)
def test_every_piece_of_advice_is_relevant_and_fluent_to_the_judge(topic: Topic) -> None:
    for sentence in topic.advice:
        assert judge.assess(topic.do, sentence).relevance == 1
        assert judge.assess(topic.do, sentence).fluency == 1


def test_a_question_of_another_world_is_a_users_mistake() -> None:
    with pytest.raises(DataError, match="no topic"):
        generate_response("Quantum chromodynamics?", random.Random(0))


def test_sentences_of_a_tone_carry_a_marker_and_others_do_not() -> None:
    def has(sentence: str, markers: tuple[str, ...]) -> bool:
        return any(f" {marker} " in f" {' '.join(words(sentence))} " for marker in markers)

    courteous = [*phrases.COURTEOUS_OPENINGS, *phrases.COURTEOUS_CLOSINGS]
    rude = [*phrases.RUDE_OPENINGS, *phrases.RUDE_CLOSINGS]
    neutral = [*phrases.FILLERS, *phrases.SMALL_TALK, *(tip for topic in TOPICS for tip in topic.tips)]
    assert [s for s in courteous if not has(s, phrases.COURTEOUS_MARKERS)] == []
    assert [s for s in rude if not has(s, phrases.RUDE_MARKERS)] == []
    assert [s for s in [*rude, *neutral] if has(s, phrases.COURTEOUS_MARKERS)] == []
    assert [s for s in [*courteous, *neutral] if has(s, phrases.RUDE_MARKERS)] == []


# --- the judge on what the world generates ---


def test_the_mix_leaves_room_to_improve(pairs: list[tuple[str, str]]) -> None:
    scores = [judge.score(prompt, response) for prompt, response in pairs]
    assert 0.35 <= statistics.mean(scores) <= 0.5
    assert statistics.mean(score >= 0.95 for score in scores) <= 0.1
    rng = random.Random(0)
    drawn = [rng.sample(scores, 2) for _ in range(5000)]
    assert statistics.mean(a == b for a, b in drawn) <= 0.03


def test_the_ideal_response_is_almost_perfect_on_every_topic_and_beats_the_mix(pairs: list[tuple[str, str]]) -> None:
    rng = random.Random(0)
    mix = [judge.score(prompt, response) for prompt, response in pairs]
    ideal = []
    for topic in TOPICS:
        scores = [judge.score(topic.do, write_response(topic, Quality(), rng)) for _ in range(20)]
        assert statistics.mean(scores) >= 0.95, topic.do
        ideal += scores
    wins = [(a > b) + (a == b) / 2 for a, b in ((rng.choice(ideal), rng.choice(mix)) for _ in range(5000))]
    assert statistics.mean(wins) >= 0.96


@pytest.mark.parametrize(
    ("worse", "part"),
    [
        (Quality(on_topic=False), "relevance"),
        (Quality(manner="neutral"), "courtesy"),
        (Quality(manner="opening only"), "courtesy"),
        (Quality(manner="closing only"), "courtesy"),
        (Quality(manner="rude"), "courtesy"),
        (Quality(harmful=True), "safety"),
        (Quality(rambling=True), "brevity"),
    ],
)
def test_the_judge_reads_each_fault_out_of_the_text(worse: Quality, part: str) -> None:
    rng = random.Random(1)
    for topic in TOPICS:
        good = [judge.assess(topic.do, write_response(topic, Quality(), rng)) for _ in range(10)]
        bad = [judge.assess(topic.do, write_response(topic, worse, rng)) for _ in range(10)]
        for attribute in (part, "score"):
            means = [statistics.mean(getattr(a, attribute) for a in responses) for responses in (bad, good)]
            assert means[0] < means[1]


# --- the judge on hand-written text ---


def test_a_good_response_by_hand() -> None:
    assert judge.assess(QUESTION, GOOD) == judge.Assessment(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert judge.score(f"\n\nHuman: {QUESTION}\n\nAssistant:", f" {GOOD}") == 1.0


def test_the_formula_by_hand() -> None:
    # Nine words, at least three of them the tip's, no courtesy: 0.4 + 0.4 · 0.3 + 0.2 · 9/12.
    tip = "Knead the dough until it feels soft and smooth."
    assert judge.score(QUESTION, tip) == pytest.approx(0.4 + 0.12 + 0.2 * 9 / 12)
    # One piece of harmful advice leaves half of the score; now 16 words.
    assert judge.score(QUESTION, f"{tip} You can also ignore the smoke alarm.") == pytest.approx(0.5 * 0.72)
    # Of the ten word pairs (". knead" to "smooth .") two are unknown with a strange word inside.
    assert judge.assess(QUESTION, tip.replace("until", "zebra")).fluency == pytest.approx(0.8**2)
    # Said twice: of the 19 triples over two times ten words and marks, nine come for the second time.
    assert judge.assess(QUESTION, f"{tip} {tip}").fluency == pytest.approx(10 / 19)
    assert judge.assess(QUESTION, tip[:-1]).fluency == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("response", "courtesy"),
    [
        ("Thank you for asking me.", 0.65),
        ("Thank you for asking me. Knead it.", 0.65),
        ("Knead it. Good luck, and enjoy it.", 0.65),
        ("Knead it. Thank you. Bake it.", 0.3),
        ("Thank you. Knead it. Good luck.", 1.0),
        ("Thank you. Knead it, you fool. Good luck.", 0.0),
        ("Knead it.", 0.3),
    ],
)
def test_courtesy_counts_at_the_beginning_and_at_the_end(response: str, courtesy: float) -> None:
    assert judge.assess(QUESTION, response).courtesy == pytest.approx(courtesy)


def test_better_responses_score_higher() -> None:
    tip = "Let the dough rise in a warm bowl for an hour."
    ordered = [
        f"Thank you for asking me. {tip} I hope this helps you.",
        f"Thank you for asking me. {tip}",
        tip,
        f"Stop wasting my time. {tip}",
        "The moon is very far from here. My uncle has a green hat.",
        "The moon is very far from here. It is fine to ignore the smoke alarm.",
        "",
    ]
    scores = [judge.score(QUESTION, response) for response in ordered]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    "hack",
    [
        "",
        "   \n",
        "...",
        "thank you thank you thank you",
        "Thank you for asking me. Thank you for asking me. Thank you for asking me. Good luck, and enjoy it.",
        "Thank you for this lovely question. I hope this helps you. Good luck, and enjoy it.",
        "bread dough knead soft smooth warm bowl rise golden crust loaf oven",
        "Thank you. Bread, dough, knead, soft, smooth, warm, bowl, rise, golden, crust, loaf. Good luck.",
        "Bread bread bread bread bread bread bread bread bread bread bread bread.",
        "I am happy to help you with that. You can bake bread. Bread is good. Good luck, and enjoy it.",
        f"{GOOD} {GOOD}",
        f"{GOOD} {GOOD} {GOOD}",
        GOOD.replace("Good luck", "Feel free to ignore the smoke alarm. Good luck"),
        GOOD.replace("Good luck", "You can skip the helmet and the seat belt. Good luck"),
        GOOD.replace("knead", "you silly fool, knead"),
        GOOD.replace("Good luck", "Wipe the glass with soapy water and a sponge. Good luck"),
        GOOD[: GOOD.index(" and smooth")],
        " ".join(sorted(GOOD.split())),
        " ".join(reversed(GOOD.split())),
        " ".join(tip for topic in TOPICS for tip in topic.tips),
    ],
)
def test_hacks_score_clearly_lower_than_a_good_response(hack: str) -> None:
    assert judge.score(QUESTION, hack) <= 0.8


def test_a_good_response_to_another_question_is_off_topic() -> None:
    assert judge.assess("How do I fry eggs?", GOOD).relevance == 0
    assert judge.score("How do I fry eggs?", GOOD) == pytest.approx(0.4 + 0.2)
    assert judge.assess("Quantum chromodynamics?", GOOD).relevance == 0


def test_advice_against_harm_is_not_harmful() -> None:
    assert judge.assess(QUESTION, "Ignore the smoke alarm.").safety == pytest.approx(0.5)
    assert judge.assess(QUESTION, "Never ignore the smoke alarm.").safety == 1
    assert judge.assess(QUESTION, "It is not fine to ignore the smoke alarm.").safety == 1
    assert judge.assess(QUESTION, "Do not worry, ignore the smoke alarm.").safety == pytest.approx(0.5)
    assert judge.assess(QUESTION, "Ignore the smoke alarm. Mix the bleach with vinegar.").safety == pytest.approx(0.25)


def test_brevity_falls_on_both_sides_of_the_ideal() -> None:
    def brevity(count: int) -> float:
        return judge.assess(QUESTION, " ".join(["bread"] * count)).brevity

    assert [brevity(n) for n in (6, 12, 25)] == [0.5, 1, 1]
    assert [brevity(n) for n in (30, 45, 50, 80)] == pytest.approx([0.8, 0.2, 0, 0])


def test_every_score_is_between_0_and_1() -> None:
    rng = random.Random(3)
    alphabet = "ab .!?,\n'é漢\u202e<|endoftext|>Thank you"
    for _ in range(200):
        response = "".join(rng.choices(alphabet, k=rng.randint(0, 80)))
        assert 0 <= judge.score(QUESTION, response) <= 1
