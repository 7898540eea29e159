"""Loads preferences from any source and layout, and counts what became of every row."""

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.layouts import detect_layout, to_preference
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
    """Returns the preferences of one split in their order, and the report on its rows.

    `dataset_name`, `config` and `data_dir` are those of `sources.read_rows`; the layouts are listed in `layouts`.
    `template` renders prompts that have a column of their own. Rows with equal or empty responses, or without a shared
    prompt, are dropped and counted. Malformed rows are dropped and counted with `on_bad_rows="skip"`; with "error"
    they raise DataError, as does a split without usable rows. Raises ConfigError for an unknown template.
    """
    chosen_template = get_template(template)
    tally = Tally(on_bad_rows)
    rows = list(read_rows(dataset_name, split=split, tally=tally, config=config, data_dir=data_dir))
    preferences: list[Preference] = []
    if rows:
        layout = detect_layout(rows, dataset_name)
        for row in rows:
            try:
                result = to_preference(row, layout, chosen_template, dataset_name)
            except BadRow as problem:
                tally.bad(row.where, problem)
                continue
            if isinstance(result, str):
                tally.dropped[result] += 1
            else:
                preferences.append(result)
    return preferences, tally.report(dataset_name, split, len(preferences))
