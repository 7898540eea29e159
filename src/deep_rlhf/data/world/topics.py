"""The forty everyday topics of the embedded world: what people ask about, and the good tips for each."""

import re
from dataclasses import dataclass
from functools import cache

WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case and in order, without punctuation."""
    return WORD.findall(text.lower())


# Words that belong to no topic: they say nothing about what a sentence is about.
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


def content_words(text: str) -> frozenset[str]:
    """The distinct words of a text that are about something."""
    return frozenset(words(text)) - FUNCTION_WORDS


def topic_of(prompt: str) -> Topic | None:
    """The topic that a question (bare, or rendered by a template) names; None when it names none."""
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
        "Knead the bread dough until it feels soft and smooth.",
        "Let the bread rise in a warm bowl for an hour.",
        "Bake the loaf of bread until the crust turns golden.",
    ),
    _topic(
        "kitchen", "cook rice", "cooking rice",
        "Rinse the rice until the water runs clear.",
        "Use two cups of water for each cup of rice.",
        "Cover the pot and let the rice steam on low heat.",
    ),
    _topic(
        "kitchen", "make tea", "making tea",
        "Boil fresh water for the tea and warm the pot.",
        "Let the tea leaves steep for four minutes.",
        "Add milk, honey or a slice of lemon to the tea.",
    ),
    _topic(
        "kitchen", "fry eggs", "frying eggs",
        "Melt some butter in a pan for the eggs.",
        "Crack the eggs on the edge of a bowl.",
        "Fry the eggs until the white is firm, and add salt.",
    ),
    _topic(
        "kitchen", "make soup", "making soup",
        "Chop onions and carrots for the soup.",
        "Let the soup simmer gently for half an hour.",
        "Stir the soup often and taste it before adding pepper.",
    ),
    _topic(
        "garden", "grow tomatoes", "growing tomatoes",
        "Put the tomatoes where the summer sun shines all day.",
        "Tie the stems of the tomatoes to tall sticks.",
        "Pick the tomatoes when they are red and ripe.",
    ),
    _topic(
        "garden", "plant roses", "planting roses",
        "Dig a deep hole for the roots of the roses.",
        "Cut the dead flowers off the roses in early spring.",
        "Wear gloves, because the thorns of roses are sharp.",
    ),
    _topic(
        "garden", "mow the lawn", "mowing the lawn",
        "Wait until the grass of the lawn is dry.",
        "Sharpen the blade of the mower before you cut the lawn.",
        "Rake the lawn and leave the edges neat.",
    ),
    _topic(
        "garden", "make compost", "making compost",
        "Mix kitchen scraps with dry leaves for the compost.",
        "Turn the compost heap with a garden fork every month.",
        "Keep the compost damp so that the worms stay healthy.",
    ),
    _topic(
        "garden", "trim a hedge", "trimming a hedge",
        "Stretch a string along the hedge to keep the top level.",
        "Check the branches of the hedge for bird nests.",
        "Cut the hedge so that the bottom is wider than the top.",
    ),
    _topic(
        "home", "clean windows", "cleaning windows",
        "Wipe the windows with soapy water and a sponge.",
        "Polish the windows with a dry sheet of newspaper.",
        "Scrub the frames of the windows, and choose a cloudy day.",
    ),
    _topic(
        "home", "wash clothes", "washing clothes",
        "Sort the dark clothes from the white ones.",
        "Follow the label of the clothes for the right temperature.",
        "Hang the wet clothes on a line in the breeze.",
    ),
    _topic(
        "home", "paint a wall", "painting a wall",
        "Cover the floor beside the wall with an old sheet.",
        "Use a brush for the corners and a roller for the wall.",
        "Let the first coat of paint dry before the second.",
    ),
    _topic(
        "home", "fix a tap", "fixing a tap",
        "Close the water valve before you open the tap.",
        "Loosen the nut of the tap with a wrench.",
        "Replace the worn rubber ring inside the tap.",
    ),
    _topic(
        "home", "hang a picture", "hanging a picture",
        "Measure the height of the picture and use a pencil.",
        "Hang the picture on a strong nail or a hook.",
        "Check with a level that the picture frame is straight.",
    ),
    _topic(
        "road", "ride a bike", "riding a bike",
        "Set the saddle of the bike as high as your hips.",
        "Pump up the tyres and test both brakes of the bike.",
        "Pedal the bike slowly until you find your balance.",
    ),
    _topic(
        "road", "drive in snow", "driving in snow",
        "Fit winter tyres before the first snow.",
        "Brake gently on snow and leave a long gap.",
        "Clear the snow from the windscreen and the lights.",
    ),
    _topic(
        "road", "park a car", "parking a car",
        "Check the mirrors, signal, and slowly turn the car.",
        "Reverse the car slowly until the wheels reach the kerb.",
        "Pull the handbrake and lock the doors of the car.",
    ),
    _topic(
        "road", "pack a suitcase", "packing a suitcase",
        "Roll your shirts and fill the suitcase from the edges.",
        "Put the heavy shoes at the bottom of the suitcase.",
        "Make a list before you pack, and carry your passport.",
    ),
    _topic(
        "road", "catch a train", "catching a train",
        "Buy the train ticket early and find the right platform.",
        "Arrive at the station ten minutes before the train departs.",
        "Reserve a seat on the train and note the timetable.",
    ),
    _topic(
        "body", "sleep better", "sleeping better",
        "Go to bed and sleep at the same hour every night.",
        "You sleep best if the bedroom is dark, cool and quiet.",
        "For better sleep, avoid screens and coffee in the evening.",
    ),
    _topic(
        "body", "run a race", "running a race",
        "Warm up your legs with an easy jog before the race.",
        "Start the race at a steady pace and save strength.",
        "Run in light shoes and sip water at every mile.",
    ),
    _topic(
        "body", "learn to swim", "learning to swim",
        "Practise floating before you swim in the deep end.",
        "Kick from the hips as you swim, with long legs.",
        "Blow bubbles to breathe out under water when you swim.",
    ),
    _topic(
        "body", "lift weights", "lifting weights",
        "Begin with light weights and add a little each month.",
        "Bend your knees and lift weights with a straight spine.",
        "Rest sore muscles for two days after you lift weights.",
    ),
    _topic(
        "body", "learn to dance", "learning to dance",
        "Count the beat of the music while you dance.",
        "Practise each dance step slowly in front of a mirror.",
        "Relax your shoulders and let your partner lead the dance.",
    ),
    _topic(
        "animal", "teach a puppy", "teaching a puppy",
        "Reward the puppy with a treat when it sits.",
        "Speak to the puppy in a calm and clear voice.",
        "Walk the puppy on a short leash twice a day.",
    ),
    _topic(
        "animal", "feed a cat", "feeding a cat",
        "Serve the cat two small meals of tuna or chicken.",
        "Feed the cat from a clean dish beside fresh water.",
        "Ask the vet about the right portion for your cat.",
    ),
    _topic(
        "animal", "keep goldfish", "keeping goldfish",
        "Give the goldfish a wide tank with a good filter.",
        "Change part of the water for the goldfish every weekend.",
        "Sprinkle a pinch of flakes for the goldfish each morning.",
    ),
    _topic(
        "animal", "brush a horse", "brushing a horse",
        "Stand beside the horse and stroke its neck and shoulder.",
        "Brush the horse from front to tail, along the hair.",
        "Comb the tangles out of the mane of the horse.",
    ),
    _topic(
        "animal", "keep hens", "keeping hens",
        "Shut the hens in at sunset so that the fox stays out.",
        "Scatter grain and corn in the yard for the hens.",
        "Give the hens fresh straw and a dry coop.",
    ),
    _topic(
        "outdoors", "light a campfire", "lighting a campfire",
        "Build a ring of stones around the campfire.",
        "Start the campfire with dry twigs and add thick logs.",
        "Pour sand or water on the embers of the campfire.",
    ),
    _topic(
        "outdoors", "pitch a tent", "pitching a tent",
        "Find flat ground for the tent away from the river.",
        "Push in the pegs of the tent and tighten the ropes.",
        "Slide the poles through the sleeves of the tent.",
    ),
    _topic(
        "outdoors", "catch fish", "catching fish",
        "Put a fat worm on the hook to tempt the fish.",
        "Cast the line near the reeds, where the fish hide.",
        "Wind the reel slowly when a fish bends the rod.",
    ),
    _topic(
        "outdoors", "read a map", "reading a map",
        "Use a compass to find north and hold the map flat.",
        "Study the symbols and the scale of the map.",
        "Follow the path on the map and look for landmarks.",
    ),
    _topic(
        "outdoors", "row a boat", "rowing a boat",
        "Sit in the middle of the boat and face the back.",
        "Row with both oars and dip them at the same time.",
        "Wear a life jacket, and steer the boat with one oar.",
    ),
    _topic(
        "desk", "write a letter", "writing a letter",
        "Begin the letter with a warm greeting and the date.",
        "Give each paragraph of the letter one main thought.",
        "Sign the letter, and put a stamp on the envelope.",
    ),
    _topic(
        "desk", "save money", "saving money",
        "Note what money you spend and set a monthly budget.",
        "Move some money from your wages to a savings account.",
        "Compare prices and cook at home to save money.",
    ),
    _topic(
        "desk", "play chess", "playing chess",
        "In chess, attack with your knights and bishops first.",
        "In chess, control the centre of the board with pawns.",
        "Castle early in chess and guard your king from danger.",
    ),
    _topic(
        "desk", "give a speech", "giving a speech",
        "Practise the speech aloud and time it with a clock.",
        "Open the speech with a joke and face the audience.",
        "Write the points of the speech on cards.",
    ),
    _topic(
        "desk", "learn the piano", "learning the piano",
        "Practise scales on the piano for ten minutes.",
        "Sit up at the piano and curve your fingers.",
        "Play the piano with the left hand first, then join both.",
    ),
)  # fmt: skip
