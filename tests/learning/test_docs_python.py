"""The blocks of docs/python.md, run one after another on a tiny model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_page_runs(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model("gpt2").save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        exec(block, names)
    assert [metrics["step"] for metrics in names["trainer"].history] == [1, 2, 3, 4]
    assert all("longest" in metrics for metrics in names["trainer"].history)
    assert (tmp_path / "polite" / "tokenizer.json").exists()
    assert names["best"].candidate_scores.shape == (2, 4)
