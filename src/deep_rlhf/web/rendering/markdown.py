"""Renders text of people and models as HTML. All of it is untrusted input.

Markdown-it escapes all HTML (`html: False`), nothing becomes a link or an image, and nh3 passes only a few tags without
URLs. The content security policy is the last line of defence. A text cannot hide anything from annotators either:
where Markdown would drop a letter or a digit, the source is shown instead.
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

MAX_MARKDOWN = 6_000  # characters; the source of longer text is shown
MAX_SHOWN = 100_000
MAX_CACHED = 2_000  # characters of a text whose HTML is cached; more would let hostile text fill the memory
MAX_CELLS = 2_000  # of a table: short rows are padded, so a few letters could make megabytes
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "span"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
_CLASSES = {"p": {"heading"}, "span": {"address"}}
_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r'<li value="(\d+)">')
_OVERRIDES = dict.fromkeys((0x202D, 0x202E), "\N{REPLACEMENT CHARACTER}")  # they reverse the order of words
_MARKER = re.compile(rf"(?:^|{re.escape(HH.human[:2])})({HH.human.strip()}|{HH.assistant.strip()})[ \t]*")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue."""

    role: Literal["person", "model"]
    text: str


def turns_of(prompt: str) -> list[Turn]:
    """Splits a prompt into the turns of its dialogue; text without turn markers is one turn of a person.

    An empty last turn of the model is dropped: it is where the response begins.
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
    """Renders Markdown as safe HTML; blank text gives empty Markup."""
    return _cached(text) if len(text) <= MAX_CACHED else _rendered(text)


def _rendered(text: str) -> Markup:
    text = _readable(text)
    lines = text.split("\n")
    cells = len(lines) * max(line.count("|") for line in lines)
    if len(text) <= MAX_MARKDOWN and cells <= MAX_CELLS:
        written = _MARKDOWN.render(text)
        clean = nh3.clean(written, tags=TAGS, attributes={"li": {"value"}}, allowed_classes=_CLASSES, link_rel=None)
        shown = html.unescape(_TAG.sub("", _NUMBER.sub(r"\1 ", clean)))
        if not _letters_and_digits(text) - _letters_and_digits(shown):
            return Markup(clean.strip())
    left = len(text) - MAX_SHOWN
    note = f"\n… and {left:,} more characters" if left > 0 else ""
    return Markup("<pre>{}</pre>").format(text[:MAX_SHOWN] + note)


_cached = lru_cache(maxsize=256)(_rendered)


def short(text: str, most: int = 120) -> str:
    """Returns the beginning of a text on one line, at most `most` characters."""
    words = " ".join(_readable(text[: most * 4]).split())
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def _readable(text: str) -> str:
    """Removes control characters, and half characters, which a sampled token can be."""
    whole = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    visible = whole.translate(_OVERRIDES)
    return "".join(c for c in visible if c in "\n\t" or unicodedata.category(c) != "Cc")


def _letters_and_digits(text: str) -> Counter[str]:
    return Counter(c for c in text if c.isalnum())


class _Renderer(RendererHTML):
    """Shows URLs as text, without links, and headings as paragraphs, outside the page's own outline.

    List items keep the numbers that were written; Markdown would renumber them.
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
    # Reference definitions would disappear from the text, and entities would differ from what the model wrote.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer)
    parser.normalizeLink = parser.normalizeLinkText = str  # type: ignore[assignment]  # shown unchanged
    return parser.enable(["table", "strikethrough"]).disable(["reference", "entity", "html_block", "html_inline"])


_MARKDOWN = _markdown()
