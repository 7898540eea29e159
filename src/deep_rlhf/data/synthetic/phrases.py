"""The sentences of the synthetic task that belong to no topic, and the markers of their tone."""

QUESTIONS: tuple[str, ...] = (
    "How do I {do}?",
    "How should I {do}?",
    "What is the best way to {do}?",
    "Can you help me {do}?",
    "Could you tell me how to {do}?",
    "I want to {do}. Where do I start?",
    "I need to {do} this weekend. What should I do?",
    "My sister wants to {do}. What should she know?",
    "Do you have a tip for {doing}?",
    "Any advice on {doing}?",
    "What should I know about {doing}?",
    "What do most people get wrong about {doing}?",
    "I have a question about {doing}. What helps?",
    "I am curious about {doing}. What matters most?",
    "Why is {doing} so hard for me?",
    "My friend is bad at {doing}. What would help him?",
)

COURTEOUS_OPENINGS: tuple[str, ...] = (
    "Thank you for asking me.",
    "Thank you for this lovely question.",
    "Hello, and thank you for the question.",
    "I am happy to help you with that.",
    "It is a pleasure to help you.",
    "That is a wonderful question, my friend.",
)
COURTEOUS_CLOSINGS: tuple[str, ...] = (
    "I hope this helps you.",
    "Good luck, and enjoy it.",
    "I wish you the best of luck.",
    "Please tell me how it goes.",
    "You are always welcome to ask more.",
    "Thank you, and take good care.",
)
RUDE_OPENINGS: tuple[str, ...] = (
    "That is a silly question.",
    "Stop wasting my time.",
    "What a boring thing to ask.",
    "Only a fool would ask that.",
    "Are you too lazy to read a book?",
    "Everybody but you knows this.",
)
RUDE_CLOSINGS: tuple[str, ...] = (
    "Now leave me alone.",
    "Do not ask me again.",
    "You will fail anyway.",
    "I am tired of people like you.",
)
COURTEOUS_MARKERS: tuple[str, ...] = (
    "thank you", "happy to help", "glad that you asked", "pleasure to help", "wonderful question", "hope this helps",
    "good luck", "best of luck", "please", "lovely day", "always welcome",
)  # fmt: skip
RUDE_MARKERS: tuple[str, ...] = (
    "silly", "stupid", "idiot", "boring", "fool", "lazy", "wasting my time", "shut up", "everybody but you",
    "leave me alone", "not ask me", "fail anyway", "tired of people like you",
)  # fmt: skip

# Fillers of rambling responses: true of any topic, helpful for none.
FILLERS: tuple[str, ...] = (
    "There is a lot to say about this.",
    "My uncle told me about it many years ago.",
    "I could talk about this all day.",
    "People have many ideas about this.",
    "It all depends on who you ask.",
    "Things were different when I was young.",
    "I think I read that in a book.",
    "Well, let me think for a moment.",
)
# Responses that ignore the question.
SMALL_TALK: tuple[str, ...] = (
    "The clouds look like sheep today.",
    "My favourite number is seven.",
    "The moon is very far from here.",
    "My uncle has a green hat.",
    "Somebody is singing in the street.",
    "Elephants have very big ears.",
    "My sister lives behind the museum.",
    "I would like to see the ocean.",
)

HARMFUL_LEADS: tuple[str, ...] = ("You can also", "It is fine to", "Feel free to", "Go ahead and")
# Bad advice by kind of topic: mild, because the demo prints it.
HARMFUL: dict[str, tuple[str, ...]] = {
    "kitchen": ("leave the hot oil unwatched", "ignore the smoke alarm"),
    "garden": ("spray poison near the children", "climb the broken ladder in the storm"),
    "home": ("mix the bleach with vinegar", "touch the wires with wet hands"),
    "road": ("skip the helmet and the seat belt", "look at your phone at full speed"),
    "body": ("ignore the sharp pain", "take twice the pills"),
    "animal": ("lock it in a hot car", "feed it spoiled meat"),
    "outdoors": ("ignore the storm warning", "drink from the dirty pond"),
    "desk": ("send your bank card to a stranger", "stay awake for three nights"),
}
