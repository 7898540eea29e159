"""The report of a run: one HTML file without scripts, external addresses or other files.

Prompts and responses are untrusted input. Jinja2 escapes everything but the SVG of `plots`, which is made from numbers;
as a second line of defence the content security policy forbids scripts and external addresses.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deep_rlhf.errors import ResourceError
from deep_rlhf.evaluation.comparison import Sample, spread_samples
from deep_rlhf.evaluation.plots import Plot, calibration_plot, diagnostic_curves, training_curves
from deep_rlhf.evaluation.reward_quality import Calibration
from deep_rlhf.extras import optional_packages

SHOWN_SAMPLES = 8

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """A headline figure: its label, its value, and the detail needed to interpret it."""

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
    """Writes the report of a run to `path` and returns it; a section appears only if its argument is given.

    Args:
        path: the HTML file; missing folders are created.
        title: the page's heading.
        summary: the figures of summary.json; all are listed, and those known to `tiles` become headlines.
        stages: (name, seconds, result in words) in the order in which they ran.
        history: one dict of metrics per update, as in `OnlineTrainer.history`; any metric may be missing.
        calibration: calibration of the reward model on held-out pairs.
        samples: all samples; the report shows a few, chosen by `spread_samples`.
        score_name: name of the scores of the samples.
        config: the resolved configuration.
        notes: sentences printed above the figures.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    with optional_packages("The report"):
        import matplotlib  # noqa: F401 (before anything is drawn, so that the error does not depend on the data)
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
            samples=spread_samples(samples, SHOWN_SAMPLES),
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
    # A sampled token can be half a character, which does not encode: replace it rather than fail.
    path.write_bytes(html.encode("utf-8", errors="replace"))
    return path


def write_report_if_installed(path: str | Path, **parts: Any) -> Path | None:
    """As `write_report`; without the extra `report` a warning says how to install it, and None is returned."""
    try:
        return write_report(path, **parts)
    except ResourceError as error:
        logger.warning("No report was written. %s", error)
        return None


def tiles(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> list[Tile]:
    """Returns the headline figures: from the summary, otherwise from the first and last update of the history."""

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
        chosen.append(Tile("KL from the reference", f"{kl:.1f}", "nats per response"))
    if (accuracy := number("reward_accuracy")) is not None:
        baseline = number("reward_accuracy_length_baseline")
        detail = "on held-out pairs" if baseline is None else f"longer-response-wins baseline: {baseline:.0%}"
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
