"""Loads prompts from any source: a column of text or messages, plain text, or preference data."""

from collections.abc import Callable, Sequence

from deep_rlhf.data.chat import Template, get_template, render_messages
from deep_rlhf.data.layouts import (
    PAIR_COLUMNS,
    columns_of,
    detect_layout,
    holds_lists,
    messages_of,
    pair_texts,
    text_of,
)
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import SourceRow, Tally, closest_first, read_rows
from deep_rlhf.errors import DataError
from deep_rlhf.types import RowReport

COLUMNS = ("prompt", "query", "text", "user", "instruction", "messages")


def load_prompts(
    dataset_name: str,
    *,
    split: str,
    config: str | None = None,
    column: str | None = None,
    template: str = "plain",
    on_bad_rows: str = "error",
    num_proc: int | None = None,
) -> tuple[list[str], RowReport]:
    """Returns the distinct prompts of one split, rendered by `template`, in their order, and the report on its rows.

    They come from `column`; by default from the first of prompt, query, text, user, instruction and messages that
    exists, or else from preference data. Repeated and empty prompts are dropped and counted. Malformed rows are dropped
    and counted with `on_bad_rows="skip"`; with "error" they raise DataError, as do a missing column and a split without
    usable rows. `num_proc` processes prepare a data set of the Hub. Raises ConfigError for an unknown template.
    """
    tally = Tally(on_bad_rows)
    rendering = get_template(template)
    rows = list(read_rows(dataset_name, split=split, tally=tally, config=config, num_proc=num_proc))
    prompts: dict[str, None] = {}
    if rows:
        prompt_of = _prompt_reader(rows, dataset_name, column, rendering)
        for row in rows:
            try:
                prompt = prompt_of(row)
            except BadRow as problem:
                tally.bad(row.where, problem)
                continue
            if not prompt:
                tally.dropped["empty prompt"] += 1
            elif prompt in prompts:
                tally.dropped["duplicate"] += 1
            else:
                prompts[prompt] = None
    return list(prompts), tally.report(dataset_name, split, len(prompts))


def _prompt_reader(
    rows: Sequence[SourceRow], name: str, column: str | None, template: Template
) -> Callable[[SourceRow], str]:
    """Returns the function that reads the prompt of a row; it returns "" for a row without one."""
    columns = columns_of(rows)
    if column is not None and column not in columns:
        raise DataError(f"{name} has no column '{column}'; columns: {closest_first(column, columns)}")
    found = column or next((known for known in COLUMNS if known in columns), None)
    if found is not None:
        read = _from_messages if holds_lists(rows, found) else _from_text
        return lambda row: read(row, found, template)
    if not any(set(pair) <= set(columns) for pair in PAIR_COLUMNS):
        known = f"a prompt is read from {', '.join(COLUMNS)}, from preference data, or from the column you name"
        raise DataError(f"{name} has no column of prompts; columns: {closest_first('prompt', columns)}; {known}")
    layout = detect_layout(rows, name)
    return lambda row: (pair_texts(row, layout, template) or ("",))[0]


def _from_text(row: SourceRow, column: str, template: Template) -> str:
    text = text_of(row.values, column)
    return template.prompt(text) if text.strip() else ""


def _from_messages(row: SourceRow, column: str, template: Template) -> str:
    """Renders a conversation up to its last user message, as hh-rlhf text: turns need markers under every template."""
    messages = messages_of(row.values, column)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return render_messages(messages) if messages else ""
