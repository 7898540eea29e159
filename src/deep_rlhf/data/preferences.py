"""Preferences from any source in any accepted format, with an account of every row."""

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.layouts import detect_format, to_preference
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import Tally, read_rows
from deep_rlhf.types import Preference, RowReport


def load_preferences(
    dataset_name: str,
    *,
    split: str,
    config: str | None = None,
    data_dir: str | None = None,
    template: str = "hh",
    on_bad_rows: str = "error",
) -> tuple[list[Preference], RowReport]:
    """Return the comparisons of one split in their order, and what became of its rows.

    Sources are those of `sources.read_rows`, formats those of `formats`; `template` renders explicit prompts.
    Dropped and counted are rows whose answers are equal or empty, or whose dialogues share no prompt, and with
    `on_bad_rows="skip"` malformed rows. Raises UserError for anything malformed otherwise, and if no row is left.
    """
    chosen_template = get_template(template)
    tally = Tally(on_bad_rows)
    rows = list(read_rows(dataset_name, split=split, tally=tally, config=config, data_dir=data_dir))
    preferences: list[Preference] = []
    if rows:
        form = detect_format(rows, dataset_name)
        for row in rows:
            try:
                found = to_preference(row, form, chosen_template, dataset_name)
            except BadRow as problem:
                tally.bad(row.where, problem)
                continue
            if isinstance(found, str):
                tally.dropped[found] += 1
            else:
                preferences.append(found)
    return preferences, tally.report(dataset_name, split, len(preferences))
