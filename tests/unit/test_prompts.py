import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
H, A = "\n\nHuman:", "\n\nAssistant:"
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
WHY, SO = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def write(folder: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("column", ["prompt", "query", "text", "user", "instruction"])
def test_known_columns(tmp_path: Path, column: str) -> None:
    name = write(tmp_path, [{"source": "x", column: "Why? "}, {"source": "x", column: "Who?"}])
    assert load_prompts(name, split="train")[0] == ["Why? ", "Who?"]
    assert load_prompts(name, split="train", template="hh")[0] == [f"{H} Why?{A}", f"{H} Who?{A}"]


def test_first_known_column_wins_and_a_named_one_beats_it(tmp_path: Path) -> None:
    name = write(tmp_path, [{"messages": [HI], "user": "u", "query": "q", "title": "t"}])
    assert load_prompts(name, split="train")[0] == ["q"]
    assert load_prompts(name, split="train", column="title")[0] == ["t"]
    assert load_prompts(name, split="train", column="messages")[0] == [f"{H} Hi{A}"]


def test_plain_text_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time\n\nThere was\n")
    assert load_prompts(str(tmp_path / "prompts.txt"), split="train")[0] == ["Once upon a time", "There was"]


def test_prompts_are_whole(tmp_path: Path) -> None:
    long = "word " * 5000
    assert load_prompts(write(tmp_path, [{"prompt": long}]), split="train")[0] == [long]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_conversations_end_before_their_last_response(tmp_path: Path, column: str) -> None:
    rows = [{column: [HI, HELLO, WHY, SO]}, {column: [HI]}, {column: [HELLO]}]
    prompts, report = load_prompts(write(tmp_path, rows), split="train")
    assert prompts == [f"{H} Hi{A} Hello.{H} Why?{A}", f"{H} Hi{A}"]
    assert report.dropped == {"empty prompt": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{H} Hi{A} Hello.{H} Why?{A} So.", "rejected": f"{H} Hi{A} Hello.{H} Why?{A} No."},
        {"chosen": [HI, HELLO, WHY, SO], "rejected": [HI, HELLO, WHY, HELLO]},
        # a pair that teaches a reward model nothing still has a prompt
        {"chosen": f"{H} Hi{A} Hello.{H} Why?{A} So.", "rejected": f"{H} Hi{A} Hello.{H} Why?{A} So."},
    ],
)
def test_prompts_of_preferences(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load_prompts(write(tmp_path, [row]), split="train")[0] == [f"{H} Hi{A} Hello.{H} Why?{A}"]


def test_duplicates_and_empty_prompts_are_counted(tmp_path: Path) -> None:
    rows = [{"user": text} for text in ("b", "a", " ", "b", "a", "b", "")]
    prompts, report = load_prompts(write(tmp_path, rows), split="train")
    assert prompts == ["b", "a"]
    assert (report.read, report.kept, report.dropped) == (7, 2, {"empty prompt": 2, "duplicate": 3})


def test_duplicates_are_those_of_the_rendered_text(tmp_path: Path) -> None:
    name = write(tmp_path, [{"user": "a"}, {"user": "a "}])
    assert load_prompts(name, split="train")[1].kept == 2
    assert load_prompts(name, split="train", template="hh")[1].dropped == {"duplicate": 1}


@pytest.mark.parametrize(
    ("good", "bad", "sentence", "reason"),
    [
        ({"user": "a"}, b"{", "expected one JSON object", "bad JSON"),
        ({"user": "a"}, {"usr": "a"}, "column 'user' is missing; the row has: usr", "missing column"),
        ({"user": "a"}, {"user": None}, "column 'user' is empty (null)", "missing value"),
        ({"user": "a"}, {"user": 3}, "column 'user' must be text, but is int 3", "wrong type"),
        ({"messages": [HI]}, {"messages": "Hi"}, "column 'messages' must be a list of messages", "wrong type"),
    ],
)
def test_malformed_rows(tmp_path: Path, good: Any, bad: Any, sentence: str, reason: str) -> None:
    name = write(tmp_path, [good, bad])
    with pytest.raises(DataError) as caught:
        load_prompts(name, split="train")
    assert str(caught.value).startswith(f"{name}, line 2: ")
    assert sentence in str(caught.value)
    assert load_prompts(name, split="train", on_bad_rows="skip")[1].dropped == {reason: 1}


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"user": "a", "source": "b"}], {"column": "usr"}, "has no column 'usr'; columns: user, source"),
        (
            [{"promt": "a", "source": "b"}],
            {},
            "has no column of prompts; columns: promt, source; a prompt is read from",
        ),
        ([{"chosen": "a", "rejected": "b"}], {}, "has no column 'prompt' and its 'chosen' is no dialogue"),
        ([{"user": "a"}], {"split": "test"}, "has no split 'test'; splits: train"),
        ([{"user": " "}], {}, "no rows are left of"),
        ([], {}, "is empty: split 'train' holds no rows"),
    ],
)
def test_unusable_data_is_one_sentence(tmp_path: Path, rows: list[Any], options: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        load_prompts(write(tmp_path, rows), **{"split": "train", **options})  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "facts"),
    [({"template": "plane"}, ("template", "'plane'")), ({"on_bad_rows": "ignore"}, ("on_bad_rows", "error", "skip"))],
)
def test_unknown_options_are_configuration_errors(
    tmp_path: Path, options: dict[str, str], facts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prompts(write(tmp_path, [{"user": "a"}]), split="train", **options)  # type: ignore[arg-type]
    assert all(fact in str(caught.value) for fact in facts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_processes_are_for_data_sets_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_proc: int | None
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text(json.dumps({"user": file.name}) + "\n")
    asked: list[int | None] = []
    load = datasets.load_dataset

    def load_files(name: str, config: str | None, *, num_proc: int | None, **options: Any) -> datasets.Dataset:
        asked.append(num_proc)
        cache = str(tmp_path / "cache")
        # in this process: datasets would fork one that has threads
        return load("json", data_files=[str(file) for file in files], split="train", cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_files)
    assert load_prompts("org/prompts", split="train", num_proc=num_proc)[0] == ["a.jsonl", "b.jsonl"]
    assert asked == [num_proc]
    assert load_prompts(str(files[0]), split="train", num_proc=num_proc)[0] == ["a.jsonl"]
    assert asked == [num_proc]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout")
def test_real_prompts() -> None:
    prompts, report = load_prompts(str(SHARED / "anthropic-hh-first-prompt"), split="train")
    assert (report.read, report.kept) == (3662, 3662)
    assert prompts[0] == "what are some pranks with a pen i can do?"
    from_pairs, report = load_prompts(str(SHARED / "hh-rlhf"), split="test")
    assert report.read == report.kept + report.dropped.get("duplicate", 0)
    assert all(prompt.startswith(H) and prompt.endswith(A) for prompt in from_pairs)
