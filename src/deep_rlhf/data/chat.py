"""Dialogues as text: the turn markers of hh-rlhf (Bai et al. 2022, arXiv 2204.05862), or none."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deep_rlhf.data.sources import closest_first
from deep_rlhf.errors import ConfigError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Template:
    """The strings around a prompt and a response; empty strings leave text unchanged."""

    name: str
    human: str = "\n\nHuman:"
    assistant: str = "\n\nAssistant:"
    separator: str = " "  # between a marker and the text of the turn

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits that change with any of the strings."""
        strings = json.dumps([self.human, self.assistant, self.separator])
        return hashlib.sha256(strings.encode()).hexdigest()[:16]

    def prompt(self, text: str) -> str:
        """Returns `text` as a prompt that a response can follow directly.

        A bare string becomes one human turn. A dialogue that begins with the human marker is kept, and the assistant's
        marker is appended if it is missing, so rendering twice changes nothing.
        """
        if not self.human:
            return text
        words = text.strip()
        if not words.startswith(self.human.lstrip()):
            return f"{self.human}{self.separator}{words}{self.assistant}"
        opening = self.human[: -len(self.human.lstrip())]
        return opening + words + ("" if words.endswith(self.assistant) else self.assistant)

    def response(self, text: str) -> str:
        """Returns `text` as it follows a prompt: after exactly one separator."""
        return self.separator + text.lstrip() if self.human else text


HH = Template("hh")
TEMPLATES = {template.name: template for template in (HH, Template("plain", human="", assistant="", separator=""))}


def get_template(name: str) -> Template:
    """Returns the template called `name`. Raises ConfigError, with the names that exist, if there is none."""
    if name not in TEMPLATES:
        raise ConfigError(f"there is no template '{name}'; templates: {closest_first(name, TEMPLATES)}")
    return TEMPLATES[name]


def render_turns(messages: Sequence[Mapping[str, str]]) -> str:
    """Returns messages with the roles system, user and assistant as hh-rlhf text.

    hh-rlhf has no system turn: a system message becomes the beginning of the human turn that follows it.
    """
    text, after_system = "", False
    for message in messages:
        words = message["content"].strip()
        if message["role"] == "assistant":
            text += f"{HH.assistant}{HH.separator}{words}"
        else:
            text += f"\n\n{words}" if after_system else f"{HH.human}{HH.separator}{words}"
        after_system = message["role"] == "system"
    return text


def render_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """Returns the messages of a prompt as hh-rlhf text that ends with the assistant's marker."""
    return render_turns(messages) + HH.assistant
