"""Text of people and models as HTML. It is hostile input, whoever wrote it.

Markdown-it escapes all HTML (`html: False`), nothing becomes a link or an image, and nh3 passes only a handful of tags
without addresses. The page's content security policy is the last line, should anything slip through. Nor may a text
hide from who judges it: where Markdown would swallow a letter or a digit, it is shown as it was written.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from deep_rlhf.data.chat import HH

LONGEST_MARKDOWN = 6_000  # characters; longer text is shown as it was written
LONGEST_SHOWN = 100_000
LONGEST_KEPT = 2_000  # whose HTML is kept for the next time; hostile text could fill the memory
MOST_CELLS = 2_000  # that a table could have: short rows are filled up, so a few letters could make megabytes
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "span"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
_CLASSES = {"p": {"heading"}, "span": {"address"}}
_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r'<li value="(\d+)">')
_OVERRIDES = dict.fromkeys((0x202D, 0x202E), "\N{REPLACEMENT CHARACTER}")  # would turn words round
_MARKER = re.compile(rf"(?:^|{re.escape(HH.human[:2])})({HH.human.strip()}|{HH.assistant.strip()})[ \t]*")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a dialogue says."""

    role: Literal["person", "model"]
    text: str


def turns_of(prompt: str) -> list[Turn]:
    """A prompt as the turns of its dialogue; text that has no turn markers is one turn of a person.

    The last marker of a prompt stands for the answers, so it makes no turn.
    """
    words = prompt.strip()
    if not words.startswith(HH.human.strip()):
        return [Turn("person", prompt.strip("\n"))]
    pieces = _MARKER.split(words)  # "", marker, text, marker, text …
    turns = [
        Turn("person" if marker == HH.human.strip() else "model", text.strip())
        for marker, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns[-1].role == "model" and not turns[-1].text:
        turns.pop()
    return turns


def render(text: str) -> Markup:
    """Safe HTML of a text in Markdown. Blank text is empty Markup."""
    return _kept(text) if len(text) <= LONGEST_KEPT else _rendered(text)


def _rendered(text: str) -> Markup:
    text = _readable(text)
    lines = text.split("\n")
    cells = len(lines) * max(line.count("|") for line in lines)
    if len(text) <= LONGEST_MARKDOWN and cells <= MOST_CELLS:
        written = _MARKDOWN.render(text)
        clean = nh3.clean(written, tags=TAGS, attributes={"li": {"value"}}, allowed_classes=_CLASSES, link_rel=None)
        shown = html.unescape(_TAG.sub("", _NUMBER.sub(r"\1 ", clean)))
        if not _letters_and_digits(text) - _letters_and_digits(shown):
            return Markup(clean.strip())
    left = len(text) - LONGEST_SHOWN
    note = f"\n… and {left:,} more characters" if left > 0 else ""
    return Markup("<pre>{}</pre>").format(text[:LONGEST_SHOWN] + note)


_kept = lru_cache(maxsize=256)(_rendered)


def short(text: str, most: int = 120) -> str:
    """The beginning of a text on one line."""
    words = " ".join(_readable(text[: most * 4]).split())
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def _readable(text: str) -> str:
    """Without control characters and halves of characters, which a sampled token can be."""
    whole = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    visible = whole.translate(_OVERRIDES)
    return "".join(c for c in visible if c in "\n\t" or unicodedata.category(c) != "Cc")


def _letters_and_digits(text: str) -> Counter[str]:
    return Counter(c for c in text if c.isalnum())


class _Renderer(RendererHTML):
    """Addresses are shown as text and lead nowhere; headings do not get among those of the page.

    Items have the numbers that were written: Markdown would count on from the first one.
    """

    def link_open(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        return ""

    def link_close(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        opening = next(
            token
            for token in reversed(tokens[:index])
            if token.type == "link_open" and token.level == tokens[index].level
        )
        return "" if opening.info == "auto" else _address(opening.attrGet("href"), opening.attrGet("title"))

    def image(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        token = tokens[index]
        return f"[image: {escape(token.content)}]" + _address(token.attrGet("src"), token.attrGet("title"))

    def fence(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        token = tokens[index]
        return str(
            Markup("<pre>{}<code>{}</code></pre>\n").format(_address(token.info.strip(), form="{}\n"), token.content)
        )

    def ordered_list_open(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        return "<ol>\n"

    def list_item_open(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        number = tokens[index].info
        return f'<li value="{int(number)}">' if number else "<li>"

    def heading_open(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        return '<p class="heading">'

    def heading_close(self, tokens: Sequence[Token], index: int, *_: Any) -> str:
        return "</p>\n"


def _address(*words: object, form: str = " ({})") -> Markup:
    given = " ".join(str(word) for word in words if word)
    return Markup('<span class="address">{}</span>').format(form.format(given)) if given else Markup()


def _markdown() -> MarkdownIt:
    # A reference definition would vanish from what is judged, and entities are not what the model wrote.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer)
    parser.normalizeLink = parser.normalizeLinkText = str  # type: ignore[assignment]  # shown as it was written
    return parser.enable(["table", "strikethrough"]).disable(["reference", "entity", "html_block", "html_inline"])


_MARKDOWN = _markdown()
