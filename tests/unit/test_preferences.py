import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from deep_rlhf.data.chat import HH
from deep_rlhf.data.preferences import load_preferences
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.types import Preference

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
H, A = "\n\nHuman:", "\n\nAssistant:"
START = f"{H} Hi{A} Hello.{H} Why?{A}"

Write = Callable[[list[Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (or raw lines) as JSON lines and return the file's name."""

    def write_rows(rows: list[Any]) -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "prefs.jsonl").write_bytes(b"\n".join(lines))
        return str(tmp_path / "prefs.jsonl")

    return write_rows


def load_one(name: str, **options: Any) -> Preference:
    (preference,), _ = load_preferences(name, split="train", **options)
    return preference


def texts(preference: Preference) -> tuple[str, str, str]:
    return preference.prompt, preference.a, preference.b


# ---- hh-rlhf text


@pytest.mark.parametrize("template", ["hh", "plain"])
@pytest.mark.parametrize(
    ("prompt", "a", "b"),
    [
        (START, " So.", " Because."),
        (START, " Because it is.", " Because it was."),  # the responses share a beginning
        (START, " Yes", " Yes and no"),  # one response begins the other
        (f"{H} Hi{A}", f" Hello.{H} Why?{A} So.", f" Go.{H} No!{A} Well."),  # they part before the last turn
        (f"{H} Hi{A}", f" Hello.{H} Why?{A} So.", f" Hello.{H} Who?{A} So."),  # they part in a human turn
        (START, f" So.{H} Ah.{A} Indeed.", " So."),  # one dialogue is longer
        (START, f" So.{A} Indeed.", " Well."),  # the marker inside one response
        (f"{A} Hello.{H} Why?{A}", " So.", " No."),  # the assistant opens
        (f"{H} Hi\n{A}", "  So. ", "No."),  # spaces stay as they are
    ],
)
def test_dialogues_are_split_at_the_last_shared_assistant(
    write: Write, prompt: str, a: str, b: str, template: str
) -> None:
    name = write([{"chosen": prompt + a, "rejected": prompt + b}])
    preference = load_one(name, template=template)
    assert texts(preference) == (prompt, a, b)
    assert (preference.mu, preference.weight, preference.margin, preference.source) == (1.0, 1.0, 0.0, name)


def test_dropped_rows_are_counted_with_the_reason(write: Write) -> None:
    good = {"chosen": START + " So.", "rejected": START + " No."}
    rows = [
        good,
        {"chosen": START + " So.", "rejected": START + " So. "},
        {"chosen": START + " So.", "rejected": START},
        {"chosen": START + " \n", "rejected": START + " So."},
        {"chosen": f"{H} Hi{A} So.", "rejected": f"{H} Ho{A} So."},
        {"chosen": "no dialogue", "rejected": "nor this"},
        good,
    ]
    preferences, report = load_preferences(write(rows), split="train")
    assert [preference.a for preference in preferences] == [" So.", " So."]
    assert (report.read, report.kept) == (7, 2)
    assert report.dropped == {"chosen equals rejected": 1, "empty response": 2, "no shared prompt": 2}


def test_sub_folder_becomes_the_subset(tmp_path: Path) -> None:
    for folder in ("harmless", "helpful"):
        (tmp_path / folder).mkdir()
        row = {"chosen": START + " So.", "rejected": START + " No."}
        (tmp_path / folder / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    preferences, _ = load_preferences(str(tmp_path), split="train")
    assert [preference.subset for preference in preferences] == ["harmless", "helpful"]
    assert load_one(str(tmp_path), data_dir="helpful").a == " So."


# ---- explicit prompts


def test_explicit_prompt_follows_the_template(write: Write) -> None:
    name = write([{"prompt": "Why?", "chosen": "So.", "rejected": " No."}])
    assert texts(load_one(name)) == (f"{H} Why?{A}", " So.", " No.")
    assert texts(load_one(name, template="plain")) == ("Why?", "So.", " No.")


def test_explicit_prompt_that_is_a_dialogue_already(write: Write) -> None:
    name = write([{"prompt": START, "chosen": " So.", "rejected": " No."}])
    assert texts(load_one(name)) == (START, " So.", " No.")


# ---- messages


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HI, HELLO, WHY = turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Why?")
SO, NO = turn("assistant", "So."), turn("assistant", "No.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": [HI, HELLO, WHY, SO], "rejected": [HI, HELLO, WHY, NO]}, (START, " So.", " No.")),
        ({"prompt": [HI, HELLO, WHY], "chosen": [SO], "rejected": [NO]}, (START, " So.", " No.")),
        ({"prompt": [HI, HELLO, WHY], "chosen": "So.", "rejected": "No."}, (START, " So.", " No.")),
        # the column `prompt` beside whole dialogues repeats what they begin with
        ({"prompt": "Hi", "chosen": [HI, HELLO, WHY, SO], "rejected": [HI, HELLO, WHY, NO]}, (START, " So.", " No.")),
        ({"prompt": "Hi", "chosen": [SO], "rejected": [NO]}, (f"{H} Hi{A}", " So.", " No.")),
        (
            {"chosen": [HI, HELLO, WHY, SO], "rejected": [HI, HELLO, turn("user", "Who?"), SO]},
            (f"{H} Hi{A}", f" Hello.{H} Why?{A} So.", f" Hello.{H} Who?{A} So."),
        ),
        (
            {"chosen": [HI, HELLO, WHY, SO], "rejected": [HI, HELLO]},
            (f"{H} Hi{A}", f" Hello.{H} Why?{A} So.", " Hello."),
        ),
        (
            {"prompt": [turn("system", "Be brief."), HI], "chosen": [SO], "rejected": [NO]},
            (f"{H} Be brief.\n\nHi{A}", " So.", " No."),
        ),
    ],
)
def test_messages(write: Write, row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert texts(load_one(write([row]))) == expected


def test_messages_of_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"chosen": [HI, SO], "rejected": [HI, NO]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "prefs.parquet"))
    assert texts(load_one(str(tmp_path / "prefs.parquet"))) == (f"{H} Hi{A}", " So.", " No.")


def test_messages_that_are_the_same_are_dropped(write: Write) -> None:
    rows = [
        {"chosen": [HI, SO], "rejected": [HI, NO]},
        {"chosen": [HI, SO], "rejected": [HI, SO]},
        {"chosen": [HI, SO], "rejected": [WHY, SO]},
        {"chosen": [SO], "rejected": [NO]},
    ]
    _, report = load_preferences(write(rows), split="train")
    assert report.dropped == {"chosen equals rejected": 1, "no shared prompt": 2}


# ---- who is better


@pytest.mark.parametrize(
    ("judgement", "mu"),
    [
        ({"mu": 0.25}, 0.25),
        ({"mu": 1}, 1.0),
        ({"label": "a1"}, 1.0),
        ({"label": "a2"}, 0.0),
        ({"label": "tie"}, 0.5),
        ({"votes": ["a", "a1", "b", "equal"]}, 0.625),
        ({"votes": ["a2", "tie"]}, 0.25),
        ({"votes": [[0, "a2", 0.27], [1, "equal", 0.58], [2, "a2", 0.0], [3, "a2", 0.41], [4, "a1", 0.58]]}, 0.3),
        ({"mu": 0.75, "votes": ["a2"], "label": "a2"}, 0.75),
    ],
)
@pytest.mark.parametrize(("a", "b"), [("a", "b"), ("a1", "a2"), ("chosen", "rejected")])
def test_mu_votes_and_labels(write: Write, a: str, b: str, judgement: dict[str, Any], mu: float) -> None:
    preference = load_one(write([{"prompt": "Why?", a: "So.", b: "No.", **judgement}]))
    assert texts(preference) == (f"{H} Why?{A}", " So.", " No.")
    assert preference.mu == pytest.approx(mu, abs=1e-12)


@pytest.mark.parametrize("other", [{"label": 3}, {"label": "toxic"}, {"votes": 17}])
def test_unrelated_columns_beside_chosen_are_left_alone(write: Write, other: dict[str, Any]) -> None:
    assert load_one(write([{"prompt": "Why?", "chosen": "So.", "rejected": "No.", **other}])).mu == 1.0


def test_csv_cells_become_numbers(tmp_path: Path) -> None:
    (tmp_path / "prefs.csv").write_text("prompt,a,b,mu,weight,margin\nWhy?,So.,No.,0.25,2,\n")
    preference = load_one(str(tmp_path / "prefs.csv"))
    assert (preference.mu, preference.weight, preference.margin) == (0.25, 2.0, 0.0)


def test_optional_columns_are_carried(write: Write) -> None:
    more = {"weight": 0.5, "margin": 2, "id": 17, "annotator": "w1", "subset": "topic", "other": None}
    preference = load_one(write([{"prompt": "Why?", "chosen": "So.", "rejected": "No.", **more}]))
    carried = (preference.weight, preference.margin, preference.id, preference.annotator, preference.subset)
    assert carried == (0.5, 2.0, "17", "w1", "topic")


def test_id_is_the_hash_of_the_texts(write: Write) -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    empty = {**row, "weight": None, "margin": None, "id": None, "annotator": None, "subset": None}
    swapped = {**row, "chosen": "No.", "rejected": "So."}
    preferences, _ = load_preferences(write([row, empty, swapped]), split="train")
    expected = hashlib.sha256(json.dumps([f"{H} Why?{A}", " So.", " No."]).encode()).hexdigest()[:16]
    assert [preference.id for preference in preferences[:2]] == [expected, expected]
    assert preferences[2].id != expected


# ---- malformed rows


TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
TURNS = {"chosen": [HI, SO], "rejected": [HI, NO]}
PAIR = {"prompt": "Why?", "a": "So.", "b": "No.", "mu": 0.5, "votes": None, "label": None}
VOTED = {"prompt": "Why?", "a": "So.", "b": "No.", "votes": ["a"]}

BAD_ROWS = [
    # a good row, a bad one, what the sentence says of it, the reason under which skip counts it
    (TEXT, b'{"prompt": ', "line 2: expected one JSON object", "bad JSON"),
    (TEXT, b'{"prompt": "\xff"}', "line 2: expected UTF-8 text", "not UTF-8"),
    (TEXT, {"prompt": "x", "chosen": "y"}, "column 'rejected' is missing; the row has: ", "missing column"),
    (TEXT, {"prompt": "x", "chosen": "y", "rejectd": "z"}, "missing; the row has: rejectd, ", "missing column"),
    (TEXT, {**TEXT, "rejected": None}, "column 'rejected' is empty (null)", "missing value"),
    (TEXT, {**TEXT, "rejected": 3}, "column 'rejected' must be text, but is int 3", "wrong type"),
    (TEXT, {**TEXT, "chosen": [HI]}, "column 'chosen' must be text, but is list [", "wrong type"),
    (TEXT, {**TEXT, "prompt": {"a": 1}}, "column 'prompt' must be text, but is dict", "wrong type"),
    (TEXT, {**TEXT, "chosen": "\ud800"}, "column 'chosen' must be UTF-8 text", "not UTF-8"),
    (TEXT, {**TEXT, "weight": "much"}, "column 'weight' must be a finite number, but is str 'much'", "wrong type"),
    (TEXT, {**TEXT, "weight": 1e308}, "column 'weight' must be at most 1e+06, but is float 1e+308", "wrong type"),
    (TEXT, {**TEXT, "margin": -1e9}, "column 'margin' must be at most 1e+06, but is float -1000000000.0", "wrong type"),
    (TEXT, {**TEXT, "weight": -1}, "column 'weight' must not be negative, but is -1", "wrong type"),
    (TEXT, {**TEXT, "margin": float("nan")}, "column 'margin' must be a finite number", "wrong type"),
    (TEXT, {**TEXT, "margin": True}, "column 'margin' must be a finite number, but is bool True", "wrong type"),
    (TEXT, {**TEXT, "margin": 10**400}, "column 'margin' must be a finite number, but is int 1000", "wrong type"),
    (TEXT, {**TEXT, "id": ["x"]}, "column 'id' must be text, but is list ['x']", "wrong type"),
    (TURNS, {**TURNS, "chosen": "So."}, "column 'chosen' must be a list of messages, but is str 'So.'", "wrong type"),
    (TURNS, {**TURNS, "chosen": []}, "column 'chosen' must be a list of messages, but is list []", "wrong type"),
    (TURNS, {**TURNS, "chosen": ["x"]}, "each message of 'chosen' must have role and content", "wrong type"),
    (TURNS, {**TURNS, "chosen": [{"role": "user"}]}, "must have role and content, but one is dict", "wrong type"),
    (TURNS, {**TURNS, "chosen": [turn("human", "x")]}, "must be one of system, user, assistant, but is", "wrong type"),
    (TURNS, {**TURNS, "chosen": [turn("user", 3)]}, "content of a message of 'chosen' must be text", "wrong type"),  # type: ignore[arg-type]
    (
        {"prompt": [HI], "chosen": [SO], "rejected": [NO]},
        {"prompt": [HI], "chosen": [WHY], "rejected": [NO]},
        "column 'chosen' must continue with the assistant, not with user",
        "wrong type",
    ),
    (PAIR, {**PAIR, "mu": 1.5}, "column 'mu' must be a probability from 0 to 1, but is float 1.5", "wrong type"),
    (PAIR, {**PAIR, "mu": "high"}, "column 'mu' must be a finite number, but is str 'high'", "wrong type"),
    (PAIR, {**PAIR, "mu": None}, "column 'mu' is empty (null)", "missing value"),
    (PAIR, {**PAIR, "mu": ""}, "column 'mu' must be a probability from 0 to 1, but is str ''", "wrong type"),
    (VOTED, {**VOTED, "votes": []}, "column 'votes' must be a list with at least one vote", "wrong type"),
    (VOTED, {**VOTED, "votes": "a"}, "column 'votes' must be a list with at least one vote", "wrong type"),
    (VOTED, {**VOTED, "votes": ["a", "c"]}, "a vote must be one of a, a1, b, a2, equal, tie", "wrong type"),
    (VOTED, {**VOTED, "votes": [["w", "a"]]}, "or [worker, vote, competence] with one of them", "wrong type"),
    (VOTED, {**VOTED, "votes": [{"vote": "a"}]}, "a vote must be one of", "wrong type"),
]


@pytest.mark.parametrize(("good", "bad", "sentence", "reason"), BAD_ROWS)
def test_malformed_rows(write: Write, good: Any, bad: Any, sentence: str, reason: str) -> None:
    name = write([good, bad, good])
    with pytest.raises(DataError) as caught:
        load_preferences(name, split="train")
    assert str(caught.value).startswith(f"{name}, line 2: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    preferences, report = load_preferences(name, split="train", on_bad_rows="skip")
    assert len(preferences) == 2
    assert (report.read, report.kept, report.dropped) == (3, 2, {reason: 1})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"chosn": "x", "rejected": "y"},
            "its columns are rejected, chosn; accepted are chosen + rejected",
        ),
        ({"text": "x"}, "its columns are text; accepted are"),
        ({"chosen": "x", "rejected": "y"}, "no column 'prompt' and its 'chosen' is no dialogue with '\\n\\nHuman:'"),
        ({"prompt": "w", "a": "x", "b": "y"}, "has 'a' and 'b' but no mu, votes or label"),
    ],
)
def test_unknown_formats_list_what_is_accepted(write: Write, row: dict[str, str], sentence: str) -> None:
    name = write([row])
    for on_bad_rows in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            load_preferences(name, split="train", on_bad_rows=on_bad_rows)
        assert sentence in str(caught.value)
        assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("rows", "on_bad_rows", "sentence"),
    [
        ([], "error", "is empty: split 'train' holds no rows"),
        ([b" \n\n"], "error", "is empty: split 'train' holds no rows"),
        ([{**TEXT, "chosen": " "}], "error", "split 'train': 0 of 1 rows kept; dropped: 1 empty response"),
        ([b"{", b"}"], "skip", "split 'train': 0 of 2 rows kept; dropped: 2 bad JSON"),
    ],
)
def test_no_rows_left(write: Write, rows: list[Any], on_bad_rows: str, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        load_preferences(write(rows), split="train", on_bad_rows=on_bad_rows)
    assert sentence in str(caught.value)


def test_unknown_template(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"template 'h'.* hh, plain"):
        load_preferences(write([TEXT]), split="train", template="h")


# ---- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout")
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("folder", ["harmless-base", "helpful-base"])
def test_every_real_pair_is_its_dialogue_again(folder: str, split: str) -> None:
    with gzip.open(SHARED / "hh-rlhf" / folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    preferences, report = load_preferences(str(SHARED / "hh-rlhf"), split=split, data_dir=folder)
    assert report.read == len(pairs) == report.kept + sum(report.dropped.values())
    assert set(report.dropped) <= {"empty response", "chosen equals rejected"}
    assert report.kept >= len(pairs) - 4
    whole = {(pair["chosen"], pair["rejected"]) for pair in pairs}
    for preference in preferences:
        assert (preference.prompt + preference.a, preference.prompt + preference.b) in whole
        assert preference.prompt.startswith(H)
        assert HH.prompt(preference.prompt) == preference.prompt
        assert [HH.response(response) for response in (preference.a, preference.b)] == [preference.a, preference.b]
        assert preference.mu == 1.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout")
def test_real_votes(tmp_path: Path) -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        with gzip.open(SHARED / f"convarg/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    arguments = {row["id"]: row["text"] for row in rows("arguments")}
    votes = rows("votes")[:2000]
    with (tmp_path / "votes.jsonl").open("w") as file:
        for row in votes:
            a, b = row["id"].split("_")
            joined = {**row, "prompt": row["topic"], "a": arguments[a], "b": arguments[b]}
            file.write(json.dumps(joined) + "\n")
    preferences, report = load_preferences(str(tmp_path / "votes.jsonl"), split="train")
    assert report.read == len(votes)
    assert preferences[0].id == votes[0]["id"]
    assert preferences[0].mu == pytest.approx(1.5 / 5)  # a2, equal, a2, a2, a1
    assert {preference.mu for preference in preferences} > {0.0, 0.5, 1.0}
    with pytest.raises(DataError, match=r"votes\.jsonl\.gz.* columns"):
        load_preferences(str(SHARED / "convarg/votes.jsonl.gz"), split="train")
