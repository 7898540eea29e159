"""Plots of a run as self-contained SVG text: no font file, no script, no external address.

pyplot is not used, so there is no global figure state, and no display is needed.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deep_rlhf.evaluation.comparison import wilson_interval
from deep_rlhf.evaluation.reward_quality import Calibration

# Okabe and Ito (2008): distinguishable with every common colour blindness, and dark enough on white.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
MAX_POINTS = 400  # points drawn per line: more are invisible at this size
SHARE_LIMITS = (-0.03, 1.03)  # so that a line at 0 or 1 is drawn in full width
SMOOTH_FROM = 20  # fewest points for which a running mean is drawn

STYLE = {
    "svg.fonttype": "none",  # keep text as text: small and selectable
    "font.sans-serif": ["DejaVu Sans"],  # part of matplotlib: the same layout on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: its title, its SVG text, a caption on how to read it, and a description for screen readers."""

    title: str
    svg: str
    caption: str
    description: str


@dataclass(frozen=True, slots=True)
class Panel:
    """How one metric of the history is drawn: its key, its title, and the axis label with the unit."""

    key: str
    title: str
    label: str
    share: bool = False  # the axis spans 0 to 1
    zero_line: bool = False


MAIN_PANELS = (
    Panel("score_mean", "Reward", "mean reward of an update"),
    Panel("kl", "KL from the reference model", "KL (nats per response)"),
    Panel("gold", "Judge score", "mean judge score (0 to 1)", share=True),
    Panel("response_tokens", "Response length", "mean length (tokens)"),
)
DIAGNOSTIC_PANELS = (
    Panel("entropy", "Entropy", "entropy (nats per token)"),
    Panel("missing_eos", "Truncated responses", "share without EOS"),
    Panel("policy_clip_fraction", "Policy clip fraction", "share of tokens clipped"),
    Panel("value_clip_fraction", "Value clip fraction", "share of tokens clipped"),
    Panel("explained_variance", "Explained variance of the critic", "explained variance", zero_line=True),
    Panel("score_std", "Spread of the reward", "standard deviation of reward"),
)


def training_curves(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Plots reward, KL, judge score and response length over updates, and both scores against √KL, where present."""
    plots = [curve(history, panel) for panel in MAIN_PANELS]
    plots += [sqrt_kl_curve(history, panel) for panel in MAIN_PANELS if panel.key in ("score_mean", "gold")]
    return [plot for plot in plots if plot]


def diagnostic_curves(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Plots the metrics that diagnose the optimisation itself; absent metrics are left out."""
    return [plot for panel in DIAGNOSTIC_PANELS if (plot := curve(history, panel))]


def curve(history: Sequence[Mapping[str, Any]], panel: Panel) -> Plot | None:
    """Plots one metric over the updates; None if fewer than two updates have it."""
    points = _points(history, panel.key)
    if len(points) < 2:
        return None
    steps, values = points[:, 0], points[:, 1]
    figure, axes = _figure()
    if len(values) < SMOOTH_FROM:
        axes.plot(steps, values, color=BLUE, linewidth=1.6, marker="o", markersize=3.5)
        caption = ""
    else:
        window = max(5, len(values) // 20)
        shown = _thin(len(values))
        axes.plot(steps[shown], values[shown], color=BLUE, alpha=0.35, linewidth=0.7)
        axes.plot(steps[shown], running_mean(values, window)[shown], color=BLUE, linewidth=1.8)
        caption = f"Thin: each update. Thick: mean of the last {window}."
    if panel.zero_line:
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="PPO update", ylabel=panel.label)
    if panel.share:
        axes.set_ylim(*SHARE_LIMITS)
    axes.xaxis.get_major_locator().set_params(integer=True)
    description = (
        f"Line chart of {panel.label} over PPO updates: {values[0]:.3g} at update {steps[0]:.0f}, {values[-1]:.3g} at "
        f"update {steps[-1]:.0f}, lowest {values.min():.3g}, highest {values.max():.3g}."
    )
    return Plot(panel.title, _svg(figure, panel.title), caption, description)


def sqrt_kl_curve(history: Sequence[Mapping[str, Any]], panel: Panel) -> Plot | None:
    """Plots a score against √KL, in which reward grows about linearly (Bai et al. 2022, section 4.3).

    A reward that rises while the judge's score falls is over-optimisation (Gao et al. 2022).
    """
    both = [row for row in history if _finite(row.get(panel.key)) and _finite(row.get("kl"))]
    if len(both) < 2:
        return None
    # An estimate of the KL divergence may be negative while the two policies are nearly equal.
    distance = np.array([sqrt(max(row["kl"], 0.0)) for row in both])
    values = np.array([float(row[panel.key]) for row in both])
    shown = _thin(len(values))
    figure, axes = _figure()
    axes.plot(distance[shown], values[shown], color=GREY, linewidth=0.5, alpha=0.5)
    axes.scatter(
        distance[shown], values[shown], c=shown, cmap="Blues", vmin=-len(values) / 2, s=14, linewidths=0, zorder=3
    )
    for i, name, mark in ((0, "first", "o"), (-1, "last", "D")):
        axes.scatter(
            distance[i], values[i], s=34, marker=mark, facecolors="white", edgecolors=ORANGE, zorder=4, label=name
        )
    axes.legend(frameon=False, handletextpad=0.2, borderpad=0)
    axes.set(xlabel="√KL (√nats per response)", ylabel=panel.label)
    if panel.share:
        axes.set_ylim(*SHARE_LIMITS)
    title = f"{panel.title} against √KL"
    description = (
        f"Scatter chart of {panel.label} against the square root of KL: {values[0]:.3g} at {distance[0]:.3g} in the "
        f"first update, {values[-1]:.3g} at {distance[-1]:.3g} in the last."
    )
    return Plot(title, _svg(figure, title), "One point per update; darker is later.", description)


def calibration_plot(calibration: Calibration) -> Plot:
    """Plots the observed share of preferences against the predicted probability, and the count in each bin."""
    predicted, observed, count = (
        np.array(column) for column in (calibration.predicted, calibration.observed, calibration.count)
    )
    bounds = np.array([wilson_interval(share, n) for share, n in zip(observed, count, strict=True)])
    figure, (axes, bars) = _figure(height=3.1, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--", label="perfectly calibrated")
    axes.vlines(predicted, bounds[:, 0], bounds[:, 1], color=ORANGE, linewidth=1)
    axes.plot(predicted, observed, color=ORANGE, linewidth=1.2, marker="o", markersize=4, label="this reward model")
    axes.legend(frameon=False, loc="upper left", borderpad=0)
    axes.set(ylabel="observed share preferred", xlim=SHARE_LIMITS, ylim=SHARE_LIMITS)
    axes.tick_params(labelbottom=False)
    bars.bar(predicted, count, width=0.03, color=GREY)
    bars.set(xlabel="predicted probability of being preferred", ylabel="responses", xlim=SHARE_LIMITS)
    description = (
        f"Calibration of the reward model over {int(count.sum()) // 2} pairs: expected calibration error "
        f"{calibration.expected_error:.3f}; "
        + ", ".join(f"{p:.2f} predicted, {o:.2f} observed" for p, o in zip(predicted, observed, strict=True))
        + "."
    )
    title = "Reward-model calibration"
    return Plot(
        title, _svg(figure, title), "Vertical lines: 95% intervals. Each pair counts in both orders.", description
    )


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Returns the mean of the last `window` values, [N]; near the beginning, of all values so far."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """Returns (step, value), [N, 2], of the updates with a finite value."""
    rows = [(row.get("step", i), row[key]) for i, row in enumerate(history) if _finite(row.get(key))]
    return np.array(rows, dtype=float).reshape(-1, 2)


def _finite(value: Any) -> bool:
    return value is not None and isfinite(value)


def _thin(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)


def _figure(height: float = 2.4, height_ratios: Sequence[float] = (1,)) -> Any:
    """Returns a figure `height` inches high and its axes: one, or an array stacked in the given ratios."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, height), layout="constrained")
        return figure, figure.subplots(len(height_ratios), height_ratios=height_ratios)


def _svg(figure: Any, name: str) -> str:
    """Returns the figure as an <svg> element whose ids are unique to `name`, with the same text every time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not allow
    # Ids such as "axes_1" recur in every figure but must be unique in a page; nothing refers to them.
    return re.sub(r' id="(?:figure|axes|patch|text|line2d|legend|matplotlib\.axis|xtick|ytick|[A-Z]\w+)_\d+"', "", svg)
