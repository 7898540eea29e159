"""Prompts from any source: a column of text or messages, plain text, or the prompts of preference data."""

from collections.abc import Callable, Sequence

from deep_rlhf.data.chat import Template, get_template, render_messages
from deep_rlhf.data.layouts import PAIRS, columns_of, detect_format, holds_lists, messages_of, pair_texts, text_of
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import Row, Tally, closest_first, read_rows
from deep_rlhf.errors import UserError
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
    """Return the different prompts of one split, whole and rendered, in their order, and what became of the rows.

    Taken from `column`, or from the first of prompt, query, text, user, instruction and messages that exists, or from
    preference data. Repeated and empty prompts are dropped and counted, and malformed rows with `on_bad_rows="skip"`.
    A data set of the Hub is downloaded and prepared by `num_proc` processes; local files are read by this one.
    Raises UserError for anything malformed otherwise, for a column that does not exist, and if no row is left.
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


def _prompt_reader(rows: Sequence[Row], name: str, column: str | None, template: Template) -> Callable[[Row], str]:
    """Return the function that takes the prompt from a row, "" if there is none."""
    columns = columns_of(rows)
    if column is not None and column not in columns:
        raise UserError(f"{name} has no column '{column}'; columns: {closest_first(column, columns)}")
    found = column or next((known for known in COLUMNS if known in columns), None)
    if found is not None:
        take = _from_messages if holds_lists(rows, found) else _from_text
        return lambda row: take(row, found, template)
    if not any(set(pair) <= set(columns) for pair in PAIRS):
        known = f"a prompt is read from {', '.join(COLUMNS)}, from preference data, or from the column you name"
        raise UserError(f"{name} has no column of prompts; columns: {closest_first('prompt', columns)}; {known}")
    form = detect_format(rows, name)
    return lambda row: (pair_texts(row, form, template) or ("",))[0]


def _from_text(row: Row, column: str, template: Template) -> str:
    text = text_of(row.values, column)
    return template.prompt(text) if text.strip() else ""


def _from_messages(row: Row, column: str, template: Template) -> str:
    """Render a conversation without its last answer; turns need markers, so it becomes hh text under every template."""
    messages = messages_of(row.values, column)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return render_messages(messages) if messages else ""
