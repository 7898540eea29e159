"""Line charts as SVG, drawn by the server without scripts; the style sheet colours them, and each has a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

MAX_POINTS = 300  # per line; more would be less than a pixel apart
LARGEST = 1e100  # of a drawn number
MAX_ROWS = 20  # of the table
WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42
MARKS = ("circle", "square", "triangle")  # lines differ by mark and dash, not by colour alone

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """The points of one line in order, joined by a line or not."""

    name: str
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its description and its table of numbers."""

    id: str
    title: str
    svg: Markup
    description: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def chart(
    id: str, title: str, x_name: str, y_name: str, lines: Sequence[Line], marks: Sequence[float] = ()
) -> Chart | None:
    """Draws a line chart; None if there are no points. `marks` are x positions that get a vertical line."""
    kept = [Line(line.name, thinned(_finite(line.points)), line.joined) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return None
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    frame = _Frame(nice_range(min(xs), max(xs)), nice_range(min(ys), max(ys)))
    parts = [*_axes(frame, x_name, y_name)]
    parts += [
        Markup('<line class="mark" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(frame.x(at), TOP, HEIGHT - BOTTOM)
        for at in marks
        if frame.x_range[0] <= at <= frame.x_range[1]
    ]
    parts += [part for i, line in enumerate(kept) for part in _drawn(frame, line, i)]
    description = " ".join(
        f"{line.name}: from {_short(line.points[0][1])} to {_short(line.points[-1][1])}"
        f" over {x_name} {_short(line.points[0][0])} to {_short(line.points[-1][0])}."
        for line in kept
    )
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title" aria-describedby="{}-about">'
        '<title id="{}-title">{}</title><desc id="{}-about">{}</desc>{}</svg>'
    ).format(WIDTH, HEIGHT, id, id, id, title, id, description, Markup("").join(parts))
    return Chart(id, title, svg, description, (x_name, *(line.name for line in kept)), _table(kept))


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Returns at most `most` evenly spread points, including the first and the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]


def nice_range(low: float, high: float) -> tuple[float, float]:
    """Returns a range around [low, high] that begins and ends at ticks."""
    step = tick_step(low, high)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return (low, high) if high > low else (low - step, high + step)


def tick_step(low: float, high: float, about: int = 5) -> float:
    """Returns 1, 2 or 5 times a power of ten that gives about `about` ticks."""
    raw = max(high - low, abs(high) * 1e-6, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


@dataclass(frozen=True, slots=True)
class _Frame:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)


def _axes(frame: _Frame, x_name: str, y_name: str) -> list[Markup]:
    parts = []
    for value in _ticks(frame.y_range):
        at = frame.y(value)
        parts.append(Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, at, WIDTH - RIGHT, at))
        parts.append(Markup('<text class="y" x="{}" y="{}">{}</text>').format(LEFT - 8, at + 4, _short(value)))
    for value in _ticks(frame.x_range):
        at = frame.x(value)
        parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format(at, HEIGHT - BOTTOM + 18, _short(value)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text class="x name" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 6, x_name))
    height = (TOP + HEIGHT - BOTTOM) / 2
    turned = Markup('<text class="x name" x="12" y="{0}" transform="rotate(-90 12 {0})">{1}</text>')
    parts.append(turned.format(height, y_name))
    return parts


def _drawn(frame: _Frame, line: Line, number: int) -> list[Markup]:
    """Draws a line with a mark at its end that identifies it, or a mark at each point."""
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    if not line.joined:
        return [mark(number, x, y, size=2.5) for x, y in places]
    path = " ".join(f"{x},{y}" for x, y in places)
    drawn = [Markup('<polyline class="line line-{}" points="{}"/>').format(number % len(MARKS), path)]
    ends = places if len(places) <= 2 else [places[-1]]
    return drawn + [mark(number, x, y) for x, y in ends]


def mark(kind: int, x: float, y: float, size: float = 4) -> Markup:
    """Draws a small circle, square or triangle, by the number of the line."""
    kind %= len(MARKS)
    if MARKS[kind] == "circle":
        return Markup('<circle class="dot line-{}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, size)
    if MARKS[kind] == "square":
        corner = (round(x - size, 1), round(y - size, 1))
        shape = Markup('<rect class="dot line-{0}" x="{1}" y="{2}" width="{3}" height="{3}"/>')
        return shape.format(kind, *corner, 2 * size)
    shape = Markup('<path class="dot line-{0}" d="M{1} {2}l{3} {4}h-{4}z"/>')
    return shape.format(kind, x, round(y - size, 1), size, 2 * size)


def _ticks(bounds: tuple[float, float]) -> list[float]:
    low, high = bounds
    step = tick_step(low, high)
    return [low + i * step for i in range(round((high - low) / step) + 1)]


def _table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    values: dict[float, dict[str, float]] = {}
    for line in lines:
        for x, y in line.points:
            values.setdefault(x, {})[line.name] = y
    xs = [x for x, _ in thinned([(x, 0.0) for x in sorted(values)], MAX_ROWS)]
    return [
        (_short(x), *(_short(values[x][line.name]) if line.name in values[x] else "–" for line in lines)) for x in xs
    ]


def _finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn: without infinite ones, and those whose distances would be."""
    return [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]


def _short(value: float) -> str:
    value = 0.0 if abs(value) < 1e-9 else value
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.3g}"


def interval(value: float, low: float, high: float) -> Markup:
    """Draws a share between 0 and 1 with its interval, on a scale with a mark at 50%."""

    def at(share: float) -> float:
        return round(8 + 284 * min(max(share, 0.0), 1.0), 1)

    return Markup(
        '<svg class="interval" viewBox="0 0 300 30" aria-hidden="true">'
        '<line class="grid" x1="8" y1="12" x2="292" y2="12"/>'
        '<line class="mark" x1="150" y1="3" x2="150" y2="21"/><line class="range" x1="{}" y1="12" x2="{}" y2="12"/>'
        '<circle class="dot line-0" cx="{}" cy="12" r="5"/><text class="x" x="150" y="29">50%</text></svg>'
    ).format(at(low), at(high), at(value))
