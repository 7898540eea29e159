"""Rewards a reader can check by eye, for `--reward_model=python:examples.rewards:happy`."""

import re

HAPPY = {
    *("happy", "happily", "smile", "smiled", "laugh", "laughed", "fun", "love", "loved"),
    *("joy", "glad", "kind", "friend", "friends", "hug", "hugged"),
}


def happy(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of DIFFERENT happy words among the first ten: repeating one word does not help."""
    return [min(10, len(HAPPY & set(re.findall(r"[a-z]+", response.lower())))) / 10 for response in responses]
