"""The report: what is given appears, what is not given does not, and model text stays text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from facts import assert_names

from deep_rlhf.evaluation.comparison import build_samples
from deep_rlhf.evaluation.plots import MAX_POINTS, calibration_plot, diagnostic_curves, running_mean, training_curves
from deep_rlhf.evaluation.report import SHOWN_SAMPLES, tiles, write_report
from deep_rlhf.evaluation.reward_quality import calibration

HOSTILE = """</p><script>alert(1)</script> " onmouseover="alert(2) ' {{ 7 * 7 }} <img src=x onerror=alert(3)>"""
HISTORY = [
    {"step": i, "score_mean": 0.1 * i, "score_std": 1.0, "kl": 0.2 * i - 0.1, "entropy": 2.0, "response_tokens": 20 + i}
    | ({"gold": 0.4 + 0.01 * i} if i % 10 == 0 else {})
    for i in range(30)
]
HEADLINES, TRAINING, HEALTH, REWARD_MODEL = (
    "Headline figures",
    ">Training</h2>",
    "Diagnostics of the optimisation",
    ">Reward model</h2>",
)
BEFORE_AND_AFTER, SAMPLES, STAGES = ">Samples before and after</h2>", ">Samples</h2>", ">Stages</h2>"
CONFIG, FIGURES, NOTE = "<summary>Configuration", "<summary>All figures", "read this first"
SECTIONS = {HEADLINES, TRAINING, HEALTH, REWARD_MODEL, BEFORE_AND_AFTER, SAMPLES, STAGES, CONFIG, FIGURES, NOTE}
PARTS: list[tuple[dict[str, Any], set[str]]] = [
    ({"summary": {"gold_before": 0.4, "gold_after": 0.8}}, {HEADLINES, FIGURES}),
    ({"summary": {"unknown": 1}}, {FIGURES}),
    ({"history": [{"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.2}]}, {HEADLINES, TRAINING}),
    ({"history": [{"entropy": 2.0, "kl": 0.1}, {"entropy": 1.9, "kl": 0.2}]}, {HEADLINES, TRAINING, HEALTH}),
    ({"calibration": calibration([1, 2, 0], [0, 0, 1], [1, 1, 0])}, {REWARD_MODEL}),
    ({"samples": build_samples(["p"], ["a"])}, {SAMPLES}),
    ({"samples": build_samples(["p"], ["a"], before=["b"])}, {BEFORE_AND_AFTER}),
    ({"stages": [("PPO", 12.34, "60 updates")]}, {STAGES}),
    ({"config": {"seed": 1}}, {CONFIG}),
    ({"notes": [NOTE]}, {NOTE}),
    ({}, set()),
]
EVERYTHING: dict[str, Any] = {key: value for part, _ in PARTS for key, value in part.items()} | {"history": HISTORY}


def report(folder: Path, **parts: Any) -> str:
    return write_report(folder / "deep" / "report.html", title="A run", **parts).read_text("utf-8")


class Tags(HTMLParser):
    """Collects what a browser would see: every start tag with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("full"), **EVERYTHING)


@pytest.mark.parametrize(("part", "sections"), PARTS)
def test_a_section_appears_only_where_its_part_is_given(
    tmp_path: Path, part: dict[str, Any], sections: set[str]
) -> None:
    html = report(tmp_path, **part)
    assert {section for section in SECTIONS if section in html} == sections


def test_all_sections_appear_together(full: str) -> None:
    assert {section for section in SECTIONS if section not in full} == {SAMPLES}


def test_an_empty_report_is_a_page_with_a_heading(tmp_path: Path) -> None:
    html = report(tmp_path)
    assert html.startswith("<!DOCTYPE html>")
    assert "<h1>A run</h1>" in html
    assert not re.search("<(section|figure|details|dl)", html)


def test_model_text_stays_text(tmp_path: Path) -> None:
    parts = {
        "samples": build_samples([HOSTILE], [HOSTILE], before=[HOSTILE], scores_after=[1], scores_before=[0]),
        "stages": [(HOSTILE, 1.0, HOSTILE)],
        "config": {HOSTILE: HOSTILE},
        "summary": {"seconds": 1, "note": HOSTILE},
        "notes": [HOSTILE],
        "score_name": HOSTILE,
    }
    page = Tags(write_report(tmp_path / "report.html", title=HOSTILE, **parts).read_text("utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "link", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in page.words
    assert "49" not in page.words.split("All figures")[1]


def test_nothing_outside_the_file_is_referred_to(full: str) -> None:
    addresses = set(re.findall(r'\S*https?://[^"\s<]*', full))
    assert addresses == {'xmlns="http://www.w3.org/2000/svg', 'xmlns:xlink="http://www.w3.org/1999/xlink'}
    assert "default-src 'none'" in full
    assert not re.search(r"@import|@font-face|url\((?!#)", full)
    for _, attributes in Tags(full).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_ids_are_unique_and_references_resolve(full: str) -> None:
    page = Tags(full)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {attributes["xlink:href"] for _, attributes in page.tags if attributes.get("xlink:href")}
    used |= {f"#{attributes['aria-labelledby']}" for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert used <= {f"#{name}" for name in ids}


def test_every_picture_is_described_in_words(full: str) -> None:
    page = Tags(full)
    pictures = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in page.tags) == 6 + 2 + 1  # curves, diagnostics, calibration
    assert all(len(picture["aria-label"] or "") > 40 for picture in pictures)


def test_the_same_run_gives_the_same_file(tmp_path: Path, full: str) -> None:
    assert report(tmp_path, **EVERYTHING) == full


def test_text_that_is_not_unicode_does_not_cost_the_report(tmp_path: Path) -> None:
    html = report(tmp_path, samples=build_samples(["half a character \ud83d"], ["   "]))
    assert "half a character ?" in html
    assert "(empty response)" in html


def test_samples_show_scores_gain_and_how_they_were_chosen(tmp_path: Path) -> None:
    count = 40
    samples = build_samples(
        [f"prompt {i}" for i in range(count)],
        ["new"] * count,
        before=["old"] * count,
        scores_after=np.arange(count) - 5,
        scores_before=np.zeros(count),
    )
    html = report(tmp_path, samples=samples, score_name="reward")
    assert html.count("<article>") == SHOWN_SAMPLES
    assert f"{SHOWN_SAMPLES} of {count} prompts" in html
    assert html.index(">prompt 39<") < html.index(">prompt 0<")
    assert "▲ +34.00" in html
    assert "▼ -5.00" in html
    assert "reward 34.00" in html


def test_stages_add_up(tmp_path: Path) -> None:
    html = report(tmp_path, stages=[("SFT", 1.25, ""), ("PPO", 2.5, "")])
    assert '<td class="number">3.8</td>' in html


def test_tiles_by_hand() -> None:
    summary = {
        "gold_before": 0.412,
        "gold_after": 0.838,
        "win_rate": 0.914,
        "win_rate_ci": [0.85, 0.951],
        "kl": 9.96,
        "reward_accuracy": 0.781,
        "reward_accuracy_length_baseline": 0.604,
        "response_tokens_before": 14.2,
        "response_tokens_after": 22.9,
        "seconds": 186,
    }
    shown = {tile.label: (tile.value, tile.detail) for tile in tiles(summary)}
    assert shown["Judge score"][0] == "0.41 → 0.84"
    assert shown["Win rate"][0] == "91%"
    assert_names(shown["Win rate"][1], "95% interval", "85% to 95%")
    assert shown["KL from the reference"] == ("10.0", "nats per response")
    assert shown["Reward-model accuracy"] == ("78%", "longer-response-wins baseline: 60%")
    assert shown["Response length"][0] == "14 → 23"
    assert shown["Time"][0] == "3.1 min"
    assert "Reward" not in shown


def test_tiles_fall_back_to_the_history_and_skip_what_is_not_finite() -> None:
    history = [
        {"score_mean": 0.5, "kl": 0.0, "response_tokens": 10},
        {"score_mean": 1.5, "kl": 2.0, "response_tokens": None},
    ]
    shown = {tile.label: tile.value for tile in tiles({"win_rate": float("nan"), "gold_before": 0.5}, history)}
    assert shown == {"Reward": "0.50 → 1.50", "KL from the reference": "2.0", "Response length": "10 → 10"}
    assert tiles({}) == []


def test_curves_appear_only_for_metrics_that_two_updates_have() -> None:
    assert [plot.title for plot in training_curves(HISTORY)] == [
        "Reward",
        "KL from the reference model",
        "Judge score",
        "Response length",
        "Reward against √KL",
        "Judge score against √KL",
    ]
    history = [
        {"step": 1, "score_mean": 1.0, "kl": None},
        {"step": 2, "score_mean": float("nan"), "kl": 1.0},
        {"score_mean": 3},
    ]
    assert [plot.title for plot in training_curves(history)] == ["Reward"]
    assert training_curves(history[:1]) == training_curves([]) == diagnostic_curves([]) == []


def test_a_curve_is_described_by_its_numbers() -> None:
    history = [{"step": 10 * i, "kl": value} for i, value in enumerate([0.5, 7.25, -1, 4])]
    (plot,) = training_curves(history)
    assert_names(plot.description, "0.5 at update 0", "4 at update 30", "lowest -1", "highest 7.25")
    assert "KL (nats per response)" in plot.svg


def test_a_long_run_is_thinned_but_described_in_full() -> None:
    history = [{"step": i, "kl": float(i)} for i in range(50 * MAX_POINTS)]
    (plot,) = training_curves(history)
    assert len(plot.svg) < 60_000
    assert f"highest {50 * MAX_POINTS - 1:.3g}" in plot.description


def test_every_svg_is_well_formed() -> None:
    for plot in [*training_curves(HISTORY), *diagnostic_curves(HISTORY), calibration_plot(calibration([3], [0], [1]))]:
        assert ElementTree.fromstring(plot.svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_running_mean_by_hand() -> None:
    assert running_mean(np.array([2.0, 4.0, 9.0, 1.0]), 3).tolist() == pytest.approx([2, 3, 5, 14 / 3])
