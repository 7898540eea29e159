"""The copy of a store's labels that a session keeps: always what the store itself would answer."""

from pathlib import Path

from deep_rlhf.feedback.loop.label_log import LabelLog
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store


def test_the_copy_is_what_the_store_holds_after_labels_and_undone_ones(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.db", seed=1) as store:
        log = LabelLog(store)
        reads = []
        plain = store.labels
        store.labels = lambda **where: reads.append(where) or plain(**where)  # type: ignore[method-assign, func-returns-value]

        def refreshed() -> bool:
            found = log.refresh()
            assert log.labels == plain()
            assert log.count == store.label_count()
            return found

        assert not refreshed()
        store.add([Comparison(prompt=f"prompt {i}", responses=("yes", "no")) for i in range(5)])
        first, second, third, fourth = (question.id for question in store.ask("anna", count=4))
        store.add_label(first, "anna", token="1", choice="a")
        store.add_label(second, "anna", token="2", choice="cant_tell")
        assert refreshed()
        assert [label.choice for label in log.labels] == ["a", "cant_tell"]
        assert log.count == 1
        assert not refreshed()
        store.add_label(third, "anna", token="3", choice="tie")
        store.undo("anna", token="4")  # of a label that was not read yet
        store.add_label(fourth, "anna", token="5", choice="b")
        assert refreshed()
        assert [label.choice for label in log.labels] == ["a", "cant_tell", "b"]
        store.undo("anna", token="6")  # of one that was
        assert refreshed()
        assert [label.choice for label in log.labels] == ["a", "cant_tell"]
        assert log.count == 1
        afters = [where["after"] for where in reads]
        assert afters == sorted(set(afters))  # nothing is read twice
