import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from facts import assert_names

from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.data.sources import SourceRow, Tally, closest_first, read_rows, split_names
from deep_rlhf.errors import ConfigError, DataError

ROWS = [{"prompt": "Why?", "n": "1"}, {"prompt": "Wie, “so”?\nÄh", "n": "2"}]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CSV = 'prompt,n\nWhy?,1\n"Wie, “so”?\nÄh",2\n'.encode()
FILES = {
    "rows.jsonl": as_jsonl(ROWS),
    "spaced.jsonl": b"\xef\xbb\xbf" + as_jsonl(ROWS).replace(b"\n", b"\r\n\r\n"),
    "lines.json": as_jsonl(ROWS),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV,
    "rows.parquet": as_parquet(ROWS),
}


def read(name: object, on_bad_rows: str = "error", split: str = "train", **where: Any) -> tuple[list[SourceRow], Tally]:
    tally = Tally(on_bad_rows)
    return list(read_rows(str(name), split=split, tally=tally, **where)), tally


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_type_of_file_gives_the_same_rows(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(FILES[name]) if zipped else FILES[name])
    rows, tally = read(path)
    assert [row.values for row in rows] == ROWS
    assert tally.read == 2
    assert split_names(str(path)) == ["train"]


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("rows.jsonl", ["line 1", "line 2"]),
        ("spaced.jsonl", ["line 1", "line 3"]),
        ("list.json", ["line 2", "line 6"]),
        ("rows.csv", ["line 2", "line 3"]),
        ("rows.parquet", ["row 1", "row 2"]),
    ],
)
def test_rows_know_their_file_and_line(tmp_path: Path, name: str, positions: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert [row.where for row in read(path)[0]] == [f"{path}, {position}" for position in positions]


def test_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("Why?\r\n\n Wie so?\nÄh".encode())
    rows, tally = read(path)
    assert [row.values["text"] for row in rows] == ["Why?", " Wie so?", "Äh"]
    assert (rows[2].where, tally.read) == (f"{path}, line 4", 3)


GOOD, LATIN = b'{"prompt": "x"}\n', b'{"prompt": "\xe9t\xe9"}\n'
BAD_FILES = [
    # name, bytes, what the sentence says, and the reason under which skip counts the row (None: skip cannot go on)
    ("a.jsonl", GOOD + b'{"prompt": \n', "a.jsonl, line 2: expected one JSON object, found bad JSON", "bad JSON"),
    ("a.jsonl", GOOD + b"\n" + GOOD + b"oops\n", "a.jsonl, line 4: expected one JSON object", "bad JSON"),
    ("a.jsonl", b"[" * 100_000 + b"\n" + GOOD, "a.jsonl, line 1: expected one JSON object", "bad JSON"),
    ("a.jsonl", GOOD + b"[1, 2]\n", "line 2: expected a JSON object of columns, found list", "wrong type"),
    ("a.jsonl", GOOD + b'"text"\n', "line 2: expected a JSON object of columns, found str", "wrong type"),
    ("a.jsonl", GOOD + LATIN, "a.jsonl, line 2: expected UTF-8 text, but it is not UTF-8", "not UTF-8"),
    ("a.json", GOOD + LATIN, "a.json, line 2: expected UTF-8 text, but it is not UTF-8", "not UTF-8"),
    ("a.json", b'[{"prompt": "x"},\n 3]', "a.json, line 2: expected a JSON object of columns, found int", "wrong type"),
    ("a.json", b'[{"prompt": "x"},\n {"prompt": }]', "a.json, line 2: expected one JSON object, found bad JSON", None),
    ("a.json", b'[{"prompt": "x"}\n {"prompt": "y"}]', "a.json, line 2: expected ',' or ']'", None),
    ("a.json", b'[{"prompt": "x"}', "a.json, line 1: expected ',' or ']'", None),
    ("a.json", b'[{"prompt": "x"},', "a.json, line 1: expected one JSON object", None),
    ("a.json", b'[{"prompt": "x"}]\n[]', "a.json, line 1: expected nothing after the end of the JSON list", None),
    ("a.json", b'[{"prompt": "x"},\n{"prompt": "\xff"}]', "a.json, line 2: expected UTF-8 text", None),
    ("a.csv", b"prompt,n\nx,1\ny\n", "a.csv, line 3: expected 2 cells (prompt, n), found 1", "wrong number of cells"),
    (
        "a.csv",
        b"prompt,n\nx,1\ny,2,3\n",
        "a.csv, line 3: expected 2 cells (prompt, n), found 3",
        "wrong number of cells",
    ),
    ("a.csv", b"prompt,n\nx,1\n\xff,2\n", "a.csv, line 3: expected UTF-8 text, but it is not UTF-8", "not UTF-8"),
    ("a.csv", b"pr\xffmpt,n\nx,1\n", "a.csv, line 1: expected column names in UTF-8", None),
    ("a.csv", b'prompt,n\n"x,1\n', "a.csv, line 2: expected a row of CSV", None),
    ("a.txt", b"x\n\xff\n", "a.txt, line 2: expected UTF-8 text", "not UTF-8"),
    ("a.parquet", b"not parquet", "a.parquet is not a parquet file", None),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz is not a complete gzip file", None),
    ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], "a.jsonl.gz is not a complete gzip file", None),
    (
        "a.xlsx",
        b"PK",
        "a.xlsx has an unknown file type; known are .jsonl, .json, .csv, .parquet, .txt, each also .gz",
        None,
    ),
]


@pytest.mark.parametrize(("name", "content", "sentence", "reason"), BAD_FILES)
def test_bad_files_name_the_place_and_what_was_expected(
    tmp_path: Path, name: str, content: bytes, sentence: str, reason: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    if reason is None:
        with pytest.raises(DataError):
            read(path, "skip")
    else:
        assert "on_bad_rows=skip" in str(caught.value)
        rows, tally = read(path, "skip")
        assert tally.dropped == {reason: 1}
        assert len(rows) == tally.read - 1 > 0


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pyarrow.array([b"x", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2\b.*UTF-8"):
        read(tmp_path / "a.parquet")
    rows, tally = read(tmp_path / "a.parquet", "skip")
    assert ([row.values for row in rows], tally.dropped) == ([{"prompt": "x"}], {"not UTF-8": 1})


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([0, 2**50], pyarrow.timestamp("s")),  # after the year 9999
        pyarrow.array([0, 1], pyarrow.timestamp("s", tz="Mars/Olympus")),
        pyarrow.array([0, 2**62], pyarrow.duration("s")),
        pyarrow.array([0, 2**31 - 1], pyarrow.date32()),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_values_that_python_cannot_hold(tmp_path: Path, column: pyarrow.Array, saved: bool) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "created": column})
    path = tmp_path / ("rows" if saved else "rows.parquet")
    if saved:
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError) as caught:
        read(path)
    both = "Mars" in str(column.type)
    assert_names(caught.value, path, "row 1" if both else "row 2", *([] if saved else ["'created'"]))
    rows, tally = read(path, "skip")
    assert len(rows) == (0 if both else 1)
    assert tally.dropped["unreadable value"] == 2 - len(rows)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("twice.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "n": 1, "prompt": "c"}\n', "line 2"),
        ("deep.jsonl", b'{"prompt": [{"role": "user", "role": "system"}]}\n', "line 1"),
        ("twice.json", b'[{"prompt": "a"},\n{"prompt": "b", "prompt": "b"}]', "line 2"),
        ("twice.csv", b"prompt,n,prompt\na,1,b\n", "line 1"),
    ],
)
def test_the_same_key_or_column_twice_is_refused(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert_names(caught.value, path, place, "'role'" if name.startswith("deep") else "'prompt'")


def test_a_parquet_file_with_the_same_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert_names(caught.value, path, "'prompt'")


@pytest.mark.parametrize(
    ("depth", "suffix"), [(10**5, "jsonl"), (10**5, "json"), (900, "jsonl"), (900, "json")], ids=str
)
def test_lists_in_lists_in_lists(tmp_path: Path, depth: int, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    row = '{"prompt": ' + "[" * depth + "]" * depth + "}"
    path.write_text(f"[{row}]" if suffix == "json" else row)
    with pytest.raises(DataError) as caught:
        load_prompts(str(path), split="train")
    assert_names(caught.value, path, "line 1")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_neither_file_nor_folder(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    for where in ({}, {"data_dir": "there"}):
        with pytest.raises(DataError) as caught:
            read(path, **where)
        assert_names(caught.value, path, kind)


@pytest.mark.parametrize("name", ["a" * 300 + "/x.jsonl", "\0.jsonl", "./" + "a/" * 3000, "~nobody-here/x.csv"])
def test_names_that_no_path_can_have(name: str) -> None:
    with pytest.raises(DataError):
        read(name)


def test_a_message_holds_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "binary.csv"
    path.write_bytes(b"x" * 10**6 + b"\nshort\n")
    with pytest.raises(DataError) as caught:
        load_prompts(str(path), split="train")
    assert len(str(caught.value)) < 1000


def test_a_saved_folder_that_is_damaged(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    whole = arrow.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * len(whole), whole[:8] + b"\xff" * (len(whole) - 8)):
        arrow.unlink()
        arrow.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "saved")
        assert_names(caught.value, tmp_path / "saved")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_empty_files_have_no_rows_to_report(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    rows, tally = read(tmp_path / name)
    assert rows == []
    with pytest.raises(DataError, match=rf"{name}.*empty.*'train'"):
        tally.report(name, "train", 0)


def test_no_rows_left_says_why() -> None:
    tally = Tally("skip")
    tally.read, tally.dropped["bad JSON"] = 2, 2
    with pytest.raises(DataError, match=r"\bx\b.*'train'.*\b0 of 2 rows.*\b2 bad JSON"):
        tally.report("x", "train", 0)


def test_on_bad_rows_is_error_or_skip() -> None:
    with pytest.raises(ConfigError, match=r"on_bad_rows.*'error'.*'skip'.*'ignore'"):
        Tally("ignore")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout of hh-rlhf: two sub-folders with a train and a test file each; one is in two parts."""
    root = tmp_path / "prefs"
    names = ["one/train.jsonl", "one/test.jsonl", "two/train-00000-of-00002.jsonl", "two/train-00001-of-00002.jsonl"]
    for name in [*names, "two/test.jsonl", ".cache/train.jsonl", "two/README.md"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(as_jsonl([{"prompt": name}]))
    return root


def test_folder_reads_the_files_of_the_split(folder: Path) -> None:
    rows, _ = read(folder)
    assert [(row.subset, row.values["prompt"]) for row in rows] == [
        ("one", "one/train.jsonl"),
        ("two", "two/train-00000-of-00002.jsonl"),
        ("two", "two/train-00001-of-00002.jsonl"),
    ]
    assert [row.values["prompt"] for row in read(folder, split="test", data_dir="two")[0]] == ["two/test.jsonl"]
    assert split_names(str(folder)) == ["test", "train"]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"split": "trian"}, "has no split 'trian'; splits: train, test"),
        ({"data_dir": "tow"}, "has no sub-folder 'tow'; sub-folders: two, one"),
        ({"data_dir": ".."}, "has no sub-folder '..'"),
        ({"config": "plain"}, "has no configurations; leave 'plain' out"),
    ],
)
def test_typos_list_what_exists(folder: Path, where: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        read(folder, **where)
    assert sentence in str(caught.value)


def test_a_file_holds_one_split_and_no_folders(tmp_path: Path) -> None:
    (tmp_path / "prefs.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"split 'test'.* train"):
        read(tmp_path / "prefs.jsonl", split="test")
    with pytest.raises(DataError, match=r"file.* sub-folder 'x'"):
        read(tmp_path / "prefs.jsonl", data_dir="x")


def test_mistyped_paths_list_what_is_beside_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no file.*trian\.jsonl'.* train\.jsonl, test\.jsonl"):
        read(folder / "one/trian.jsonl")
    with pytest.raises(DataError, match=r"no file.*three/train\.jsonl'.* no .*three\b.* either"):
        read(folder / "three/train.jsonl")
    monkeypatch.chdir(folder / "one")
    for number in range(30):
        Path(f"{number:02}").touch()  # as unlike as one another
    listed = r"test\.jsonl, train\.jsonl, 00, 01, 02, .*, 17, …$"
    with pytest.raises(DataError, match=rf"no file.*'nosuch\.jsonl'.* {listed}"):
        read("nosuch.jsonl")
    with pytest.raises(DataError, match=r"name of a data set.* empty"):
        read("")


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data files \(\.jsonl, "):
        read(tmp_path)


def test_the_same_split_twice_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.jsonl.gz"):
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(DataError, match=r"'train' twice.* train\.jsonl .*train\.jsonl\.gz"):
        read(tmp_path)


def test_save_to_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "table"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert [row.values for row in read(tmp_path / "table")[0]] == ROWS
    rows, _ = read(tmp_path / "splits", split="test")
    assert [(row.where, row.values) for row in rows] == [(f"{tmp_path / 'splits' / 'test'}, row 1", ROWS[1])]
    with pytest.raises(DataError, match=r"split 'tset'.* test, train"):
        read(tmp_path / "splits", split="tset")
    (tmp_path / "table/dataset_info.json").unlink()
    with pytest.raises(DataError, match=r"table\b.* not .*complete.*save_to_disk"):
        read(tmp_path / "table")


# ---- the Hub, without one


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hub with one data set, of one folder and two configurations; listing an author's data sets fails."""
    monkeypatch.setattr(datasets, "load_dataset", failing(ValueError("loader's words\nand more")))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["english", "french"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, data_dir: ["test", "train"])
    files = lambda self, name, repo_type: ["data/en/train.jsonl", "README.md"]  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_datasets", failing(RuntimeError("no listing")))
    return monkeypatch


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"config": "frensh"}, "org/prefs has no configuration 'frensh'; configurations: french, english"),
        ({}, "org/prefs has no configuration ''; configurations: "),
        ({"config": "french", "split": "trian[:10]"}, "org/prefs has no split 'trian[:10]'; splits: train, test"),
        ({"data_dir": "data/eng"}, "org/prefs has no sub-folder 'data/eng'; sub-folders: data/en, data"),
        ({"config": "french"}, "org/prefs, split 'train', cannot be loaded from the Hugging Face Hub: loader's words"),
    ],
)
def test_hub_typos_list_what_exists(hub: pytest.MonkeyPatch, where: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        read("org/prefs", **where)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_hub_name_that_does_not_exist(hub: pytest.MonkeyPatch) -> None:
    for function in ("load_dataset", "get_dataset_split_names"):
        hub.setattr(datasets, function, failing(datasets.exceptions.DatasetNotFoundError("no such thing")))
    with pytest.raises(DataError, match=r"'Anthropic/hh-rlfh'.* local.* Hub\b.* Anthropic/hh-rlhf\?"):
        read("Anthropic/hh-rlfh")
    with pytest.raises(DataError, match=r"'someone/something'.* local.*check the name"):
        split_names("someone/something")
    found = [huggingface_hub.DatasetInfo(id="org/prefs")]
    hub.setattr(huggingface_hub.HfApi, "list_datasets", lambda self, author, limit: found)
    with pytest.raises(DataError, match=r"did you mean org/prefs\?"):
        read("org/perfs")


def test_hub_that_does_not_answer(hub: pytest.MonkeyPatch) -> None:
    hub.setattr(datasets, "load_dataset", failing(ConnectionError("Couldn't reach 'org/prefs' on the Hub")))
    with pytest.raises(DataError, match=r"'org/prefs'.* local.* not answer.*Couldn't reach.*HF_ENDPOINT"):
        read("org/prefs")


def test_hub_rows_know_their_place(hub: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.update(options, name=name, config=config)
        return datasets.Dataset.from_list(ROWS)

    hub.setattr(datasets, "load_dataset", load)
    rows, _ = read("org/prefs", split="test", config="french", data_dir="data")
    assert asked == {"name": "org/prefs", "config": "french", "split": "test", "data_dir": "data", "num_proc": None}
    assert [(row.where, row.values) for row in rows] == [
        ("org/prefs [test], row 1", ROWS[0]),
        ("org/prefs [test], row 2", ROWS[1]),
    ]


def test_closest_first() -> None:
    assert closest_first("trian", ["test", "validation", "train"]) == "train, validation, test"
    assert closest_first("x", []) == "(none)"
    assert closest_first("x", [f"n{i}" for i in range(30)]).endswith("n19, …")
