"""Dialogues become turns, and any text becomes harmless HTML that hides nothing."""

import re
from html.parser import HTMLParser

import pytest
from payloads import PAYLOADS

from deep_rlhf.web.rendering.markdown import MAX_CACHED, MAX_MARKDOWN, TAGS, Turn, _cached, render, short, turns_of


class _Found(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str, str | None]] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name, value) for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


def found_in(html: str) -> _Found:
    found = _Found()
    found.feed(html)
    return found


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_nothing_but_harmless_tags_comes_out(payload: str) -> None:
    found = found_in(str(render(payload)))
    assert found.tags <= TAGS
    assert found.attributes <= {("p", "class", "heading"), ("span", "class", "address")}


NUMBERS = [
    "|a|b|\n|-|-|\n|x|10|9999|",
    "| 1 | 2 |\n|-|-|\n| 3",
    "1.\n2.",
    "007. Bond",
    "[a](1.html)",
    "# 1\n\n2\n==",
    "1) a\n- 2",
]


@pytest.mark.parametrize("payload", PAYLOADS + NUMBERS, ids=range(len(PAYLOADS + NUMBERS)))
def test_rendering_drops_no_letter_or_digit(payload: str) -> None:
    html = str(render(payload))
    shown = found_in(html).words + " ".join(re.findall(r'<li value="(\d+)">', html))
    for letter in set(filter(str.isalnum, payload)):
        assert shown.count(letter) >= payload.count(letter), letter


def test_items_keep_the_numbers_that_were_written() -> None:
    html = str(render("3. three\n2. two\n1. go"))
    assert re.findall(r"<li value=\"(\d)\">(\w+)", html) == [("3", "three"), ("2", "two"), ("1", "go")]
    assert "<li>dot" in render("- dot")
    assert render("007. Bond") == "<pre>007. Bond</pre>"


def test_only_the_html_of_short_texts_is_cached() -> None:
    """Hostile text, of which there may be much, must not fill the memory."""
    _cached.cache_clear()
    for i in range(3):
        render(f"{i} " + "|a" * 5000)
        render(f"{i} short")
    assert _cached.cache_info().currsize == 3
    grows = ["#\n" * 1000, "- " * 1000, "|a" * 5 + "\n" + "|-" * 5 + "\n" + "a\n" * 1000]
    assert max(len(render(text[:MAX_CACHED])) for text in grows) * _cached.cache_parameters()["maxsize"] < 10e6


def test_markdown_is_shown_as_it_is_meant() -> None:
    html = str(
        render("# Bread\n\n**Mix** and *wait*:\nthen\n\n3. knead\n4. bake\n\n```py\nx < 1\n```\n\n~~no~~ `code`")
    )
    assert '<p class="heading">Bread</p>' in html
    assert "<strong>Mix</strong> and <em>wait</em>:<br>" in html
    assert '<li value="3">knead' in html
    assert "<code>x &lt; 1" in html
    assert "<s>no</s> <code>code</code>" in html
    assert "<td>2</td>" in render("|a|b|\n|-|-|\n|1|2|")


def test_an_address_is_shown_as_text() -> None:
    html = str(render('[here](https://a.example/x "why") ![pic](https://b.example/y.png) <https://c.example>'))
    assert re.findall(r"<(\w+)", html) == ["p", "span", "span"]
    assert "here" in html
    assert "(https://a.example/x why)" in html
    assert "[image: pic]" in html
    assert "https://c.example" in html


@pytest.mark.parametrize(
    "text",
    [
        "*a " * 2000,
        "[" * 6000,
        "![" * 3000,
        "`" * 5999,
        ">" * 6000,
        "- " * 3000,
        "|a" * 15 + "\n" + "|-" * 15 + "\nx" * 2500,
    ],
)
def test_the_html_of_hostile_markdown_is_bounded(text: str) -> None:
    """Bounded by its size: tables, which grow, and nesting, which swallows, are shown as written."""
    assert len(text) <= MAX_MARKDOWN
    assert len(render(text)) < 20 * MAX_MARKDOWN


def test_long_text_is_shown_as_it_was_written_and_cut_at_last() -> None:
    long = "*no emphasis* <b>" * 10_000
    html = str(render(long))
    assert html.startswith("<pre>*no emphasis* &lt;b&gt;")
    assert "70,000 more characters" in html


@pytest.mark.parametrize("blank", ["", "  \n ", "\x00\x1b"])
def test_blank_text_is_seen_as_blank(blank: str) -> None:
    assert not render(blank)


def test_a_dialogue_becomes_turns() -> None:
    assert turns_of("\n\nHuman: Hi\nthere\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:") == [
        Turn("person", "Hi\nthere"),
        Turn("model", "Hello"),
        Turn("person", "More"),
    ]
    assert turns_of("Human: Hi\n\nAssistant: It is") == [Turn("person", "Hi"), Turn("model", "It is")]
    assert turns_of("\n\nHuman:\n\nAssistant:") == [Turn("person", "")]


def test_text_without_markers_is_one_turn() -> None:
    assert turns_of("Say Human: or Assistant: twice") == [Turn("person", "Say Human: or Assistant: twice")]
    assert turns_of("") == [Turn("person", "")]
    assert turns_of("\n\nHuman: I said Assistant: x\n\nAssistant:") == [Turn("person", "I said Assistant: x")]


def test_the_beginning_of_a_text_is_one_line() -> None:
    assert short("one\n two\x00", 20) == "one two"
    assert short("abcdefgh", 5) == "abcd…"
