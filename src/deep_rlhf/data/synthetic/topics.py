"""The two dozen everyday topics of the synthetic task, with good tips for each."""

import re
from dataclasses import dataclass
from functools import cache

WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case and in order, without punctuation."""
    return WORD.findall(text.lower())


# Words that belong to no topic.
FUNCTION_WORDS = frozenset(
    words(
        """
        a about add after afterwards again against ahead alone along an and any are as at away because before begin
        beside both bring but by can check choose do each early every find first for from get give giving good have
        her his how i if in inside instead into is it its keep keeping learn learning leave less let long look make
        making me middle most move much my near next of off often on once one ones open or out part plenty put set
        side sides small so some soon start stays than that the their them then there they this through time to top
        turn turns two under until up use what when where with you your
        """
    )
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One subject: `do` follows "how to", `doing` follows "about", `kind` chooses bad advice in `phrases.HARMFUL`."""

    do: str
    doing: str
    kind: str
    tips: tuple[str, ...]

    @property
    def advice(self) -> tuple[str, ...]:
        """The tips as sentences that name the topic."""
        return tuple(f"To {self.do}, {tip}." for tip in self.tips)


def content_words(text: str) -> frozenset[str]:
    """The distinct words of a text without function words."""
    return frozenset(words(text)) - FUNCTION_WORDS


def topic_of(prompt: str) -> Topic | None:
    """The topic named by a question (bare or rendered), or None."""
    asked = content_words(prompt)
    best = max(TOPICS, key=lambda topic: len(name_words(topic) & asked))
    return best if name_words(best) & asked else None


@cache
def name_words(topic: Topic) -> frozenset[str]:
    """The words that name a topic in a question."""
    return content_words(f"{topic.do} {topic.doing}")


def _topic(kind: str, do: str, doing: str, *tips: str) -> Topic:
    return Topic(do=do, doing=doing, kind=kind, tips=tips)


TOPICS: tuple[Topic, ...] = (
    _topic(
        "kitchen", "bake bread", "baking bread",
        "knead the dough until it feels soft and smooth",
        "let the dough rise in a warm bowl for an hour",
        "leave the loaf in the oven until the crust turns golden",
    ),
    _topic(
        "kitchen", "brew tea", "brewing tea",
        "heat fresh water and warm the pot",
        "let the leaves steep for four minutes",
        "add milk, honey or a slice of lemon at the end",
    ),
    _topic(
        "kitchen", "fry eggs", "frying eggs",
        "melt some butter in a hot pan",
        "crack the shells on the edge of a bowl",
        "wait until the white is firm, and add salt",
    ),
    _topic(
        "garden", "grow tomatoes", "growing tomatoes",
        "put the seedlings where the summer sun shines",
        "tie the stems to tall sticks",
        "give them water, and pick them when ripe and red",
    ),
    _topic(
        "garden", "plant roses", "planting roses",
        "dig a deep hole for the roots",
        "cut off the dead flowers in early spring",
        "wear gloves, because the thorns are sharp",
    ),
    _topic(
        "garden", "mow the lawn", "mowing the lawn",
        "wait until the long grass is dry in the morning",
        "sharpen the blade of the mower in summer",
        "rake up the grass and leave the edges neat",
    ),
    _topic(
        "home", "clean windows", "cleaning windows",
        "wipe the glass with soapy water and a sponge",
        "polish the glass with a dry sheet of newspaper",
        "scrub the frames first, and choose a cloudy day",
    ),
    _topic(
        "home", "paint a wall", "painting a wall",
        "cover the floor and the furniture with an old sheet",
        "use a brush for the corners and a wide roller",
        "let the first coat dry before the second",
    ),
    _topic(
        "home", "hang a picture", "hanging a picture",
        "measure the height and mark it with a pencil",
        "use a hammer and a strong nail",
        "check with a level that the frame is straight",
    ),
    _topic(
        "road", "ride a bike", "riding a bike",
        "set the saddle as high as your hips",
        "pump up the tyres and test both brakes",
        "pedal slowly until you find your balance",
    ),
    _topic(
        "road", "pack a suitcase", "packing a suitcase",
        "roll your shirts and fill the edges with socks",
        "put the heavy shoes at the bottom",
        "make a list, and carry your passport",
    ),
    _topic(
        "road", "catch a train", "catching a train",
        "buy the ticket early and find the right platform",
        "arrive at the station ten minutes early",
        "reserve a seat and note the timetable",
    ),
    _topic(
        "body", "run a race", "running a race",
        "warm up your legs with an easy jog",
        "start at a steady pace and save strength",
        "wear light shoes and sip water at every mile",
    ),
    _topic(
        "body", "learn to swim", "learning to swim",
        "practise floating in the shallow end",
        "kick from the hips with long legs",
        "blow bubbles to breathe out under water",
    ),
    _topic(
        "body", "lift weights", "lifting weights",
        "begin with a light bar and add a little each month",
        "bend your knees and keep a straight spine",
        "rest sore muscles for two days",
    ),
    _topic(
        "animal", "teach a puppy", "teaching a puppy",
        "use a treat as a reward when it sits",
        "speak in a calm and clear voice",
        "walk it on a short leash twice a day",
    ),
    _topic(
        "animal", "feed a cat", "feeding a cat",
        "serve two small meals of tuna or chicken",
        "fill a clean dish and offer fresh water",
        "ask the vet about the right portion",
    ),
    _topic(
        "animal", "brush a horse", "brushing a horse",
        "stand beside it and stroke its neck and shoulder",
        "work from front to tail, along the hair",
        "comb the tangles out of the mane",
    ),
    _topic(
        "outdoors", "pitch a tent", "pitching a tent",
        "find flat ground away from the river",
        "push in the pegs and tighten the ropes",
        "slide the poles through the sleeves",
    ),
    _topic(
        "outdoors", "catch fish", "catching fish",
        "put a fat worm on the hook as bait",
        "cast the line near the reeds and wait",
        "wind the reel slowly when the rod bends",
    ),
    _topic(
        "outdoors", "row a boat", "rowing a boat",
        "sit in the middle of the bench and face the back",
        "dip both oars into the lake at the same time",
        "wear a life jacket, and steer with one oar",
    ),
    _topic(
        "desk", "write a letter", "writing a letter",
        "begin with a warm greeting and the date",
        "give each paragraph one main thought",
        "sign your name, and put a stamp on the envelope",
    ),
    _topic(
        "desk", "save money", "saving money",
        "note what you spend and set a monthly budget",
        "put part of your wages into a savings account",
        "compare prices and cook at home on weekdays",
    ),
    _topic(
        "desk", "play chess", "playing chess",
        "attack with your knights and bishops first",
        "control the centre of the board with pawns",
        "castle early and guard your king from danger",
    ),
)  # fmt: skip
