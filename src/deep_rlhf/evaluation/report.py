"""The report of a run: one HTML file that needs no network, no script and no other file.

Prompts and answers are hostile input. Jinja2 escapes everything but the SVG that `plots` drew from numbers, and the
page's content security policy forbids scripts and every outside address, should anything slip through.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deep_rlhf.evaluation.comparison import Sample, spread_samples
from deep_rlhf.evaluation.plots import Plot, calibration_plot, diagnostic_curves, training_curves
from deep_rlhf.evaluation.reward_quality import Calibration

SHOWN_SAMPLES = 8


class Tile(NamedTuple):
    """A headline figure: what it is, the figure, and what it is to be read against."""

    label: str
    value: str
    detail: str = ""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any] | None = None,
    stages: Sequence[tuple[str, float, str]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    calibration: Calibration | None = None,
    samples: Sequence[Sample] = (),
    score_name: str = "judge score",
    config: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a run to `path` and return it; a section appears only where its part is given.

    Args:
        path: the HTML file; missing folders are made.
        title: the page's heading.
        summary: the figures of summary.json; those that `tiles` knows become headlines, and all are listed.
        stages: (name, seconds, figures in words) in the order in which they ran.
        history: one dict of metrics per PPO update, by the names of `PPOTrainer.history`; any may be missing.
        calibration: of the reward model, on held-out pairs.
        samples: all of them; the report shows a few, chosen by `spread_samples`.
        score_name: what the scores of the samples are.
        config: the resolved configuration.
        notes: sentences a reader should know before the figures.
    """
    shown = spread_samples(samples, SHOWN_SAMPLES)
    html = (
        _environment()
        .from_string(files("deep_rlhf.evaluation").joinpath("report.html").read_text("utf-8"))
        .render(
            title=title,
            notes=notes,
            tiles=tiles(summary or {}, history),
            curves=training_curves(history),
            diagnostics=diagnostic_curves(history),
            calibration=calibration,
            calibration_plot=calibration_plot(calibration) if calibration else None,
            samples=shown,
            sample_count=len(samples),
            score_name=score_name,
            stages=stages,
            documents=[
                (name, json.dumps(document, indent=2, default=str, ensure_ascii=False))
                for name, document in (("Configuration", config), ("All figures", summary))
                if document
            ],
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sampled token can be half of a character: "replace" keeps it from costing the whole report.
    path.write_bytes(html.encode("utf-8", errors="replace"))
    return path


def tiles(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> list[Tile]:
    """Choose the headline figures that the summary has, and otherwise the history's first and last update."""

    def number(key: str) -> float | None:
        value = summary.get(key)
        return float(value) if isinstance(value, int | float) and isfinite(value) else None

    def ends(key: str) -> tuple[float, float] | None:
        values = [row[key] for row in history if row.get(key) is not None and isfinite(row[key])]
        return (values[0], values[-1]) if values else None

    chosen = []
    before, after = number("gold_before"), number("gold_after")
    if before is not None and after is not None:
        chosen.append(Tile("Judge score", f"{before:.2f} → {after:.2f}", "mean on held-out prompts, 0 to 1"))
    if (rate := number("win_rate")) is not None:
        interval = summary.get("win_rate_ci")
        detail = f" (95% interval {interval[0]:.0%} to {interval[1]:.0%})" if interval else ""
        chosen.append(Tile("Win rate", f"{rate:.0%}", f"against the policy before{detail}"))
    if scores := ends("score_mean"):
        chosen.append(Tile("Reward", f"{scores[0]:.2f} → {scores[1]:.2f}", "mean of the first and of the last update"))
    kl = number("kl")
    if kl is None and (kls := ends("kl")):
        kl = kls[1]
    if kl is not None:
        chosen.append(Tile("KL from the reference", f"{kl:.1f}", "nats per answer"))
    if (accuracy := number("reward_accuracy")) is not None:
        baseline = number("reward_accuracy_length_baseline")
        detail = "on held-out pairs" if baseline is None else f"longer-answer-wins baseline: {baseline:.0%}"
        chosen.append(Tile("Reward-model accuracy", f"{accuracy:.0%}", detail))
    before, after = number("response_tokens_before"), number("response_tokens_after")
    lengths = (before, after) if before is not None and after is not None else ends("response_tokens")
    if lengths:
        chosen.append(Tile("Response length", f"{lengths[0]:.0f} → {lengths[1]:.0f}", "tokens, before and after"))
    if (seconds := number("seconds")) is not None:
        chosen.append(Tile("Time", f"{seconds / 60:.1f} min", "all stages together"))
    return chosen


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["picture"] = _picture
    return environment


def _picture(plot: Plot) -> Markup:
    return Markup('<div class="picture" role="img" aria-label="{}">{}</div>').format(plot.description, Markup(plot.svg))
