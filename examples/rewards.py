"""Rewards a reader can check by eye, for `--reward_model=python:examples.rewards:happy`."""

import re

HAPPY = {
    *("happy", "happily", "smile", "smiled", "laugh", "laughed", "fun", "love", "loved"),
    *("joy", "glad", "kind", "friend", "friends", "hug", "hugged"),
}


def happy(prompts: list[str], responses: list[str]) -> list[float]:
    """How many DIFFERENT happy words an answer has, at most five: repeating one word does not help."""
    return [min(5, len(HAPPY & set(re.findall(r"[a-z]+", response.lower())))) for response in responses]
