"""What the processes of test_store_kills do until somebody kills them."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store


def label(address: str, person: str, told: Connection) -> None:
    """Answers whatever is asked; tells before each label and, with the event, after it."""
    with Store(address, seed=1) as store:
        while questions := store.ask(person, count=2):
            number = questions[0].id
            told.send(("begins", number, 0))
            event = store.add_label(number, person, token=f"{person} {number}", choice="a")
            told.send(("acknowledged", number, event))
    told.send(("finished", 0, 0))


def open_new(address: str, person: str, told: Connection) -> None:
    """Opens a store that may be new, and leaves a question in it."""
    told.send(("begins", 0, 0))
    with Store(address) as store:
        (number,) = store.add([Comparison(prompt=person, responses=("x", "y"))])
    told.send(("acknowledged", number, 0))
    told.send(("finished", 0, 0))


Work = Callable[[str, str, Connection], Any]
