"""How a dialogue becomes text: the turn markers of hh-rlhf (Bai et al. 2022, arXiv 2204.05862), or none at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deep_rlhf.data.sources import closest_first
from deep_rlhf.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Template:
    """The strings around a prompt and an answer; empty strings leave text as it is."""

    name: str
    human: str = "\n\nHuman:"
    assistant: str = "\n\nAssistant:"
    separator: str = " "  # between a marker and the words of the turn

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when any format string does."""
        strings = json.dumps([self.human, self.assistant, self.separator])
        return hashlib.sha256(strings.encode()).hexdigest()[:16]

    def prompt(self, text: str) -> str:
        """Return `text` as a prompt that an answer can follow directly.

        A bare string becomes one human turn; a dialogue that already begins with the human marker is kept, and closed
        with the assistant's marker if that is missing, so rendering twice changes nothing.
        """
        if not self.human:
            return text
        words = text.strip()
        if not words.startswith(self.human.lstrip()):
            return f"{self.human}{self.separator}{words}{self.assistant}"
        opening = self.human[: -len(self.human.lstrip())]
        return opening + words + ("" if words.endswith(self.assistant) else self.assistant)

    def answer(self, text: str) -> str:
        """Return `text` as it follows a prompt: after exactly one separator."""
        return self.separator + text.lstrip() if self.human else text


HH = Template("hh")
TEMPLATES = {template.name: template for template in (HH, Template("plain", human="", assistant="", separator=""))}


def get_template(name: str) -> Template:
    """Return the template called `name`; raises UserError with the names that exist."""
    if name not in TEMPLATES:
        raise UserError(f"there is no template '{name}'; templates: {closest_first(name, TEMPLATES)}")
    return TEMPLATES[name]


def render_turns(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages of roles system, user and assistant as hh text.

    hh text has no system turn: a system message opens the human turn that follows it.
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
    """Return prompt messages as hh text that ends in the assistant's marker."""
    return render_turns(messages) + HH.assistant
