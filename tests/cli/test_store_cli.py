"""`deep-rlhf store`: out of a store, into another, and what is in it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result
from facts import assert_line_names, assert_names

from deep_rlhf.cli.store import main
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.reward import RewardModel


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """Three labels by two people, one of them can't tell, and a question that waits."""
    path = tmp_path / "labels.db"
    with Store(path) as store:
        store.add(
            [
                Comparison(prompt=f"p{i}", responses=("x", "y"), why_selected="variance", policy_version=i)
                for i in (1, 2, 10)
            ]
        )
        store.add(
            [Comparison(prompt="ranking", responses=("x", "y", "z")), Comparison(prompt="waits", responses=("x", "y"))]
        )
        for i, choice in enumerate(("a", "cant_tell", "b")):
            person = "[bold]bert" if i == 2 else "anna"
            number = store.ask(person)[0].id
            store.add_label(number, person, token=str(i), choice=choice)  # type: ignore[arg-type]
        store.add_label(store.ask("anna")[0].id, "anna", token="ranking", ranks=[1, 2, 3])
    return str(path)


def test_an_export_can_be_imported_again(labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, other = str(tmp_path / "labels.jsonl"), str(tmp_path / "other.db")
    main(["export", labelled, target])
    assert capsys.readouterr().out.splitlines() == [f"3 labels in 5 rows: {target}", "left out: 1 can't tell"]
    main(["import", other, target])
    rows, labels = capsys.readouterr().out.splitlines()
    assert_names(rows, "5 of 5 rows")
    assert_names(labels, "3 labels", "3 are new")
    main(["import", other, target])
    assert_names(capsys.readouterr().out, "0 are new")
    main(["export", labelled, target, "--all"])
    main(["import", other, target])
    assert_names(capsys.readouterr().out, "4 labels", "1 are new")


@pytest.mark.parametrize(
    ("flags", "rows"), [(["--all"], 6), (["--all=True"], 6), (["--all", "true"], 6), (["--all=False"], 5)]
)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_flag_without_a_value_does_not_take_the_next_argument(
    flags: list[str], rows: int, place: int, labelled: str, tmp_path: Path
) -> None:
    target = str(tmp_path / "labels.jsonl")
    words = ["export", labelled, target]
    main([*words[:place], *flags, *words[place:]])
    assert len(Path(target).read_text().splitlines()) == rows


def test_a_reward_model_learns_from_a_folder_that_was_exported(
    labelled: str, cli: Callable[..., Result], tmp_path: Path
) -> None:
    labels, model = tmp_path / "labels", tmp_path / "model"
    assert cli("store", "export", labelled, str(labels)).code == 0
    quick = ("--model_name_or_path=gpt2", "--max_steps=2", "--per_device_train_batch_size=2", "--disable_tqdm=True")
    result = cli(
        "reward", *quick, f"--dataset_name={labels}", "--template=plain", "--report_to=none", f"--output_dir={model}"
    )
    assert result.code == 0, result.err
    rows = json.loads((model / "summary.json").read_text())["rows"]
    assert rows["train"]["read"] == 5
    assert rows["train"]["kept"] + rows["test"]["kept"] == 5
    assert RewardModel.load(model).score(["p1"], ["x"]).shape == (1, 1)


def test_options_of_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": 3, "rejected": "y"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["import", str(tmp_path / "labels.db"), str(tmp_path / "pairs.jsonl")]
    with pytest.raises(UserError, match=r"line 2\b.*'chosen'.*\btext"):
        main(arguments)
    with pytest.raises(UserError, match="nothing"):
        main(["import", str(tmp_path / "labels.db"), str(tmp_path / "nothing.jsonl")])
    assert not (tmp_path / "labels.db").exists()
    main([*arguments, "--template=plain", "--on_bad_rows=skip"])
    assert_names(capsys.readouterr().out, "1 of 2 rows", "1 wrong type")
    with Store(tmp_path / "labels.db") as store:
        assert store.labels()[0].comparison.prompt == "p"


def test_what_a_store_holds(labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", labelled])
    said = capsys.readouterr().out
    assert_line_names(said, "waiting questions: 1")
    assert_line_names(said, "labels: 4", "for training: 3")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    for row in (["anna", "3"], ["[bold]bert", "1"], ["variance", "3"], ["can't tell", "1"], ["a ranking", "1"]):
        assert row in cells
    versions = said[said.index("policy version") : said.index("reward model version")]
    assert versions.index(" 1 ") < versions.index(" 2 ") < versions.index(" 10 ")
    Store(tmp_path / "empty.db").close()
    main(["show", str(tmp_path / "empty.db")])
    assert "labels: 0, for training: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{tmp}/nothing.db"], "does not exist"),
        (["export", "{tmp}/nothing.db", "{tmp}/x.jsonl"], "does not exist"),
        (["export", "{labelled}", "{tmp}/x.csv"], r"ends in \.jsonl"),
        (["export", "{labelled}", "{tmp}/x.jsonl", "--all=perhaps"], "expected True or False"),
        (["import", "{labelled}", "{tmp}/nothing.jsonl"], "no file or folder"),
        (["import", "{labelled}", "{tmp}", "--on_bad_rows=ignore"], "invalid choice: 'ignore'"),
        (["import", "{labelled}", "{labelled}"], "unknown file type; known are .jsonl"),
        (["show", "mysql://me:secret@host/x"], "SQLite or PostgreSQL"),
        (["show"], "required: STORE"),
        (["show", "{labelled}", "more"], "more"),
        (["list", "{labelled}"], "invalid choice: 'list'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, labelled: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        main([argument.format(tmp=tmp_path, labelled=labelled) for argument in arguments])
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert not (tmp_path / "nothing.db").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["export", "-h"]])
def test_help_shows_all_three(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    said = capsys.readouterr().out
    assert all(f"store {what} STORE" in said for what in ("export", "import", "show"))
