"""Labels as preferences, and to and from files that `load_preferences`, so reward_modeling.py, takes as they are."""

import errno
import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from postgres import Server, postgres  # noqa: F401

from deep_rlhf.cli.reward import RewardArguments, load_splits
from deep_rlhf.data.preferences import load_preferences
from deep_rlhf.errors import DataError, UserError
from deep_rlhf.feedback.exchange.export import export_labels
from deep_rlhf.feedback.exchange.import_ import import_labels, read_labels
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.reward_refit.preferences import all_preferences
from deep_rlhf.feedback.store import Store
from deep_rlhf.types import Preference

TARGETS = ("labels.jsonl", "labels.jsonl.gz", "labels.parquet", "labels")


def import_file(store: Store, source: Any, **options: str) -> int:
    """As `deep-rlhf store import` does it; returns how many labels are new."""
    return import_labels(store, read_labels(source, **options)[0])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "labels.db", seed=1, clock=lambda: datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)) as store:
        yield store


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "other.db") as store:
        yield store


def label_everything(store: Store) -> None:
    """Two people: pairs with each choice, a ranking with a tie, a gold and a repeated question, and one taken back."""
    original, *_ = store.add(
        [
            Comparison(
                prompt="\n\nHuman: Hi?\n\nAssistant:",
                responses=(" Yes, \x00 Wörter", " No ✓"),
                why_selected="information",
                policy_version=3,
                reward_version=2,
                writers=(0, 3),
                predicted=0.25,
                overlap=2,
                priority=9.0,
            ),
            Comparison(prompt="tie", responses=("x", "y"), priority=8.0),
            Comparison(prompt="can't tell", responses=("x", "y"), priority=7.0),
            Comparison(prompt="ranking", responses=("p", "q", "r", "s"), why_selected="variance", priority=6.0),
            Comparison(prompt="gold", responses=("x", "y"), why_selected="gold", expected="b", priority=5.0),
            Comparison(prompt="win rate", responses=("x", "y"), why_selected="win_rate", priority=4.0),
            Comparison(prompt="equal", responses=("x", "x "), priority=3.0),
            Comparison(prompt="taken back", responses=("x", "y"), priority=2.0),
        ]
    )
    given: dict[str, dict[str, Any]] = {
        "\n\nHuman: Hi?\n\nAssistant:": {"choice": "b", "strength": 4, "seconds": 2.5},
        "tie": {"choice": "tie"},
        "can't tell": {"choice": "cant_tell"},
        "ranking": {"ranks": [3, 1, 2, 2]},
        "gold": {"choice": "a"},
        "win rate": {"choice": "a", "strength": 1},
        "equal": {"choice": "a"},
        "taken back": {"choice": "a"},
    }
    for question in store.ask("anna", count=8):
        prompt = question.comparison.prompt
        store.add_label(question.id, "anna", token=f"anna {question.id}", **given[prompt])
    store.undo("anna", token="undo")
    store.release("anna")
    store.ask("bert")
    store.add_label(original, "bert", token="bert", choice="a")
    store.add(
        [Comparison(prompt="tie", responses=("x", "y"), why_selected="repeat", repeat_of=original, priority=99.0)]
    )
    store.add_label(store.ask("bert")[0].id, "bert", token="repeat", choice="b")


def test_labels_become_preferences(store: Store) -> None:
    label_everything(store)
    found = [(p.prompt, p.a, p.b, p.mu, p.annotator) for p in all_preferences(store.labels())]
    assert found == [
        ("\n\nHuman: Hi?\n\nAssistant:", " Yes, \x00 Wörter", " No ✓", 0.0, "anna"),
        ("tie", "x", "y", 0.5, "anna"),
        ("ranking", "p", "q", 0.0, "anna"),
        ("ranking", "p", "r", 0.0, "anna"),
        ("ranking", "p", "s", 0.0, "anna"),
        ("ranking", "q", "r", 1.0, "anna"),
        ("ranking", "q", "s", 1.0, "anna"),
        ("ranking", "r", "s", 0.5, "anna"),
        ("win rate", "x", "y", 1.0, "anna"),
        ("\n\nHuman: Hi?\n\nAssistant:", " Yes, \x00 Wörter", " No ✓", 1.0, "bert"),
    ]


def test_a_ranking_of_k_counts_as_k_minus_1_pairs_under_one_name(store: Store) -> None:
    label_everything(store)
    ranking = [p for p in all_preferences(store.labels()) if p.prompt == "ranking"]
    assert sum(p.weight for p in ranking) == pytest.approx(3)
    assert len({p.id for p in ranking}) == 6
    assert len({p.id.split("-")[0] for p in ranking}) == 1


def test_the_same_texts_have_the_same_id_whoever_judges_them(store: Store) -> None:
    label_everything(store)
    hi = [p for p in all_preferences(store.labels()) if "Hi?" in p.prompt]
    assert {p.annotator for p in hi} == {"anna", "bert"}
    assert len({p.id for p in hi}) == 1


def plain(preference: Preference) -> tuple[Any, ...]:
    p = preference
    return p.prompt, p.a, p.b, p.mu, p.weight, p.margin, p.id, p.annotator


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_exported_is_loaded_as_it_was_labelled(store: Store, tmp_path: Path, target: str) -> None:
    label_everything(store)
    written = export_labels(store, tmp_path / target)
    assert written.left_out == {"can't tell": 1, "gold": 1, "repeat": 1}
    assert (written.labels, written.rows) == (6, 11)
    loaded, report = load_preferences(str(tmp_path / target), split="train", template="plain")
    assert [plain(p) for p in loaded] == [plain(p) for p in all_preferences(store.labels())]
    assert report.dropped == {"chosen equals rejected": 1}
    in_hh, _ = load_preferences(str(tmp_path / target), split="train")
    assert (in_hh[0].prompt, in_hh[0].a) == (loaded[0].prompt, loaded[0].a)  # as the policy read and wrote them


@pytest.mark.parametrize("target", TARGETS)
def test_the_reward_command_splits_an_export(store: Store, tmp_path: Path, target: str) -> None:
    label_everything(store)
    export_labels(store, tmp_path / target)
    train, _, held_out, _ = load_splits(RewardArguments(dataset_name=str(tmp_path / target)), "hh")
    assert len(train) + len(held_out) == 10
    assert held_out


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_export_import_export_is_the_same(
    store: Store, other: Store, tmp_path: Path, target: str, everything: bool
) -> None:
    label_everything(store)
    first = tmp_path / "first" / target
    second = tmp_path / "second" / target
    export_labels(store, first, everything=everything)
    labels, _ = read_labels(first)
    assert (len(labels), import_labels(other, labels)) == ((9, 9) if everything else (6, 6))
    assert other.waiting() == 0
    export_labels(other, second, everything=everything)
    if first.is_dir():
        assert datasets.load_from_disk(str(first)).to_list() == datasets.load_from_disk(str(second)).to_list()
    else:
        assert first.read_bytes() == second.read_bytes()
    if everything:
        assert [unnumbered(label) for label in other.labels()] == [unnumbered(label) for label in store.labels()]


def unnumbered(label: Any) -> tuple[Any, ...]:
    c = label.comparison
    question = (c.prompt, c.responses, c.why_selected, c.policy_version, c.reward_version, c.writers, c.predicted)
    judgement = (label.annotator, label.choice, label.ranks, label.strength, label.shown_order, label.seconds)
    return (*question, c.expected, *judgement, label.created)


def test_a_store_moves_to_postgresql_and_back(
    store: Store,
    other: Store,
    tmp_path: Path,
    postgres: Server,  # noqa: F811
) -> None:
    label_everything(store)
    export_labels(store, tmp_path / "a.jsonl", everything=True)
    with Store(postgres.store()) as there:
        assert import_file(there, tmp_path / "a.jsonl") == 9
        assert import_file(there, tmp_path / "a.jsonl") == 0
        export_labels(there, tmp_path / "b.jsonl", everything=True)
    import_file(other, tmp_path / "b.jsonl")
    export_labels(other, tmp_path / "c.jsonl", everything=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_a_repeated_import_adds_nothing(store: Store, other: Store, tmp_path: Path) -> None:
    label_everything(store)
    export_labels(store, tmp_path / "a.jsonl", everything=True)
    assert import_file(store, tmp_path / "a.jsonl") == 0  # not even into the store it comes from
    assert import_file(other, tmp_path / "a.jsonl") == 9
    assert import_file(other, tmp_path / "a.jsonl") == 0
    assert [label.imported for label in store.labels() + other.labels()] == [False] * 9 + [True] * 9
    before = other.last_event()
    assert other.undo("anna", token="u") is None  # what came from a file is not the newest thing that anna did
    assert other.last_event() == before


def test_imported_labels_join_those_of_the_store(store: Store, other: Store, tmp_path: Path) -> None:
    """A question of which one label is in the file keeps its places for others, and its repeat finds the original."""
    label_everything(store)
    export_labels(store, tmp_path / "a.jsonl", everything=True)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(line for line in lines if '"bert"' in line))
    assert import_file(other, tmp_path / "some.jsonl") == 2
    repeat = other.labels()[1].comparison
    assert (repeat.why_selected, repeat.repeat_of) == ("repeat", other.labels()[0].comparison_id)
    assert import_file(other, tmp_path / "a.jsonl") == 7
    both = [label for label in other.labels() if "Hi?" in label.comparison.prompt]
    assert [label.annotator for label in both] == ["bert", "anna"]
    assert len({label.comparison_id for label in both}) == 1
    assert both[1].comparison.overlap == 2


# ---- files of other programs


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_any_preferences_are_imported(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "mu": 1, "annotator": "anna"},
        {"prompt": "p", "a": "x", "b": "y", "mu": 0, "annotator": "bert"},
        {"prompt": "p", "a": "x", "b": "y", "mu": 0.5, "annotator": "anna"},  # once more: another question
        {"prompt": "q", "a": "x", "b": "y", "mu": 1},
        {"prompt": "q", "a": "x", "b": "x", "mu": 1},
    ]
    path = write(tmp_path / "foreign.jsonl", rows)
    labels, rows = read_labels(path, template="plain")
    assert (len(labels), import_labels(store, labels)) == (4, 4)
    assert rows.dropped == {"chosen equals rejected": 1}
    assert import_file(store, path, template="plain") == 0
    found = [(label.annotator, label.choice, label.comparison_id) for label in store.labels()]
    assert found == [("anna", "a", 1), ("bert", "b", 1), ("anna", "tie", 2), ("import", "a", 3)]


def test_each_vote_is_imported_as_one_label(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "a1": "x", "a2": "y", "votes": [[7, "a1", 0.5], [9, "equal", 0.1]]},
        {"prompt": "q", "a1": "x", "a2": "y", "votes": [["7", "a2", 0.5]]},
    ]
    import_file(store, write(tmp_path / "votes.jsonl", rows), template="plain")
    assert [(label.annotator, label.choice) for label in store.labels()] == [("7", "a"), ("9", "tie"), ("7", "b")]
    unnamed = [{"prompt": "r", "a": "x", "b": "y", "votes": ["a", "b"], "annotator": "crowd"}]
    import_file(store, write(tmp_path / "unnamed.jsonl", unnamed), template="plain")
    assert [label.annotator for label in store.labels()][3:] == ["crowd 1", "crowd 2"]


def test_dialogues_are_imported_with_all_their_splits(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "hh"
    folder.mkdir()
    for split, word in (("train", "yes"), ("test", "maybe")):
        start = f"\n\nHuman: {split}?\n\nAssistant:"
        rows = [{"chosen": f"{start} {word}", "rejected": f"{start} no"}]
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write(json.dumps(rows[0]))
    import_file(store, folder)
    texts = Counter(label.comparison.responses for label in store.labels())
    assert texts == {(" yes", " no"): 1, (" maybe", " no"): 1}


GOOD = {"prompt": "p", "a": "x", "b": "y", "mu": 1, "question": "q", "token": "t", "created": "2026-01-01T00:00:00"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": 0.7}, "line 2: column 'mu' must be 1, 0, 0.5 or null"),
        ({"strength": 9}, "line 2: .*strength.* must be one of 1, 2, 3, 4, not 9"),
        ({"strength": "much"}, "line 2: column 'strength' must be a whole number"),
        ({"seconds": "long"}, "line 2: column 'seconds' must be a number"),
        ({"created": "yesterday"}, "line 2: column 'created' must be a time"),
        ({"created": None}, "line 2: column 'created' is empty"),
        ({"why_selected": "fun"}, "line 2: column 'why_selected' must be one of"),
        ({"why_selected": "gold"}, "line 2: A gold question must have an expected choice.*why_selected=gold"),
        ({"answers": "x"}, "line 2: column 'answers' must be a list"),
        ({"answers": ["x", "y", "z"], "ranks": [1, 2]}, "line 2: .* a rank for each of its 3 responses"),
        ({"answers": ["x"]}, "line 2: .* 2 to 9 responses, not 1"),
        ({"ranks": ["1"]}, "line 2: column 'ranks' must be a list of whole numbers"),
        ({"shown_order": [0, 0]}, "line 2: shown_order must name each"),
        ({"annotator": "a\x00"}, "line 2: The name of an annotator"),
        ({"token": ""}, "line 2: The token of an event"),
        ({"repeats": "a\x00"}, "line 2: The key of a repeated question"),
        ({"why_selected": []}, "line 2: column 'why_selected' must be one of"),
        ({"policy_version": 2**63}, "line 2: column 'policy_version' must be a whole number from 0 to 2147483647"),
        ({"policy_version": 2**31}, "line 2: column 'policy_version' must be a whole number"),
        ({"policy_version": "LONG"}, "line 2: .* bad JSON"),
        ({"reward_version": -1}, "line 2: column 'reward_version' must be a whole number"),
        ({"writers": [0, 2**63]}, "line 2: column 'writers' must be a list of whole numbers"),
        ({"shown_order": [True, False]}, "line 2: column 'shown_order' must be a list of whole numbers"),
        ({"seconds": float("nan")}, "line 2: column 'seconds' must be a number"),
        ({"seconds": 10**400}, "line 2: column 'seconds' must be a number, but is 1000"),
        ({"created": "0001-01-01T00:00:00+14:00"}, "line 2: column 'created' must be a time"),
        ({"token": "t", "prompt": "other"}, "line 2: column 'token' is that of another label, in .*line 1"),
        ({"question": "q", "prompt": "other"}, "line 2: column 'question' is that of other texts, in .*line 1"),
    ],
)
def test_a_malformed_row_of_an_export_is_named(
    store: Store, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "labels.jsonl", [GOOD, {**GOOD, "token": "u", "question": "r", **changed}])
    path.write_text(path.read_text().replace('"LONG"', "1" * 5000))  # which json.dumps refuses to write
    with pytest.raises(UserError, match=message):
        import_file(store, path)
    assert store.labels() == []
    assert import_file(store, path, on_bad_rows="skip") == 1


def test_one_row_that_stands_for_several_people_is_refused(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "shares.jsonl", [{"prompt": "p", "a": "x", "b": "y", "mu": 0.7}])
    with pytest.raises(UserError, match=r"line 1\b.*'mu'.*one person.*votes"):
        import_file(store, path)


def test_a_question_with_other_responses_is_refused(store: Store, tmp_path: Path) -> None:
    import_file(store, write(tmp_path / "a.jsonl", [GOOD]))
    ranking = {**GOOD, "token": "u", "answers": ["x", "y", "z"], "ranks": [1, 2, 3]}
    new = [{**GOOD, "token": f"new {i}", "question": f"new {i}"} for i in range(60)]  # more than one transaction
    for other in (ranking, {**ranking, "answers": None, "ranks": None, "a": "z"}):
        with pytest.raises(UserError, match=r"line 61\b.*\bq\b.*other texts"):
            import_file(store, write(tmp_path / "b.jsonl", [*new, other]))
        assert len(store.labels()) == 1


@pytest.mark.parametrize("name", TARGETS)
def test_an_export_that_cannot_be_finished_leaves_the_earlier_one(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_everything(store)
    target = tmp_path / "out" / name
    export_labels(store, target)
    before = {file: file.read_bytes() for file in target.parent.rglob("*") if file.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match=r"out/labels.*No space left on device"):
        export_labels(store, target)
    assert {file: file.read_bytes() for file in target.parent.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.rglob("*.part"))


def test_impossible_exports_and_imports_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no labels to export"):
        export_labels(store, tmp_path / "labels.jsonl")
    label_everything(store)
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        export_labels(store, tmp_path / "labels.xlsx")
    with pytest.raises(UserError, match="holds something else"):
        export_labels(store, tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl.*would replace"):
        export_labels(store, tmp_path / "pipe.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_labels(store, tmp_path / "file" / "labels.jsonl")
    with pytest.raises(UserError, match="URL"):
        export_labels(store, "http://host/labels")
    for name in ("x\0.jsonl", "x" * 300 + ".jsonl"):
        with pytest.raises(UserError, match="cannot be written"):
            export_labels(store, tmp_path / name)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "labels.db")
    with pytest.raises(UserError, match="the store itself"):
        export_labels(store, tmp_path / "link.jsonl")
    with pytest.raises(UserError, match="no file or folder"):
        import_file(store, tmp_path / "nothing.jsonl")
    assert (tmp_path / "labels.db").exists()


def test_an_export_replaces_the_one_before(store: Store, tmp_path: Path) -> None:
    label_everything(store)
    for target in ("labels.jsonl", "labels"):
        assert export_labels(store, tmp_path / target, everything=True).rows == 14
        assert export_labels(store, tmp_path / target).rows == 11
        assert len(load_preferences(str(tmp_path / target), split="train")[0]) == 10
    assert not list(tmp_path.glob(".*part*"))
