"""Facts in the program's messages: a test gives the numbers, names and causes, and leaves the sentence free.

The few sentences that are fixed word for word are in unit/test_messages.py and web/test_page_words.py.
"""

import re


def assert_names(message: object, *facts: object) -> None:
    """Each fact is in the message (or the error) as a whole word or number: 5 is not in "step-15", "0.5" or "5.1"."""
    missing = [str(fact) for fact in facts if not _holds(str(message), str(fact))]
    assert not missing, f"{missing} not in: {message}"


def assert_line_names(text: str, *facts: object) -> None:
    """One line of the text has all the facts."""
    assert any(all(_holds(line, str(fact)) for fact in facts) for line in text.splitlines()), f"{facts} not in: {text}"


def _holds(text: str, fact: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(fact)}(?!\w|\.\d)", text) is not None
