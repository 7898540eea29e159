import pytest

from deep_rlhf.data.chat import (
    HH,
    TEMPLATES,
    Template,
    get_template,
    render_messages,
    render_turns,
)
from deep_rlhf.errors import ConfigError

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("  Hi \n", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("Human: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        (DIALOGUE, DIALOGUE),
    ],
)
def test_hh_prompt(text: str, expected: str) -> None:
    assert HH.prompt(text) == expected
    assert HH.prompt(expected) == expected  # rendering twice changes nothing


@pytest.mark.parametrize("text", ["Sure", " Sure", "\n  Sure"])
def test_hh_response_follows_exactly_one_space(text: str) -> None:
    assert HH.response(text) == " Sure"


def test_responses_keep_their_end_and_inner_spaces() -> None:
    assert HH.response("a  b\n") == " a  b\n"


@pytest.mark.parametrize("text", ["", " Hi ", "\n\nHuman: Hi"])
def test_plain_changes_nothing(text: str) -> None:
    plain = TEMPLATES["plain"]
    assert (plain.prompt(text), plain.response(text)) == (text, text)


def test_fingerprint_is_that_of_the_format_strings() -> None:
    assert HH.fingerprint() == Template("other name").fingerprint()
    prints = {HH.fingerprint(), TEMPLATES["plain"].fingerprint(), Template("hh", separator="").fingerprint()}
    assert len(prints) == 3
    assert all(len(print_) == 16 and int(print_, 16) >= 0 for print_ in prints)


def test_unknown_template_lists_what_exists() -> None:
    with pytest.raises(ConfigError, match=r"no template 'plane'.*plain, hh"):
        get_template("plane")


def test_render_messages() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why? "},
    ]
    assert render_messages(messages) == DIALOGUE


def test_system_message_opens_the_next_human_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = render_messages(messages)
    assert rendered == "\n\nHuman: Be brief.\n\nHi\n\nAssistant:"
    assert HH.prompt(rendered) == rendered
    assert render_turns(messages[:1]) == "\n\nHuman: Be brief."


def test_system_message_is_not_put_into_the_assistants_mouth() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello."}]
    assert render_turns(messages) == "\n\nHuman: Be brief.\n\nAssistant: Hello."
