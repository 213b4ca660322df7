"""Line charts as inline SVG: no script, no image; colours are the page's, so light and dark work.

The page styles the classes `chart`, `grid`, `band`, `level`, `mark` and, for the lines in order,
`s1` to `s12`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

WIDTH, HEIGHT = 360, 240  # about what a chart measures on the page, so that text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 26, 40  # margins
_WIDE, _TALL = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM  # of the frame
_MOST = 400  # points of a line; more would not be seen

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named curve; points that are not finite are left out."""

    name: str
    points: Sequence[Point]
    thin: Callable[[Sequence[float]], float] = fmean  # many neighbours become one: their mean


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one pair of axes."""

    title: str
    y_label: str
    lines: Sequence[Line]
    x_label: str = "step"
    log: bool = False  # the y axis, for positive values alone
    settle: float = 0.0  # the first fraction of x, whose y may leave the frame
    levels: Sequence[tuple[str, float]] = ()  # named horizontal lines
    mark: tuple[str, Point] | None = None  # one named point
    bands: Sequence[tuple[str, float, float]] = ()  # name, x from, x to

    def svg(self) -> Markup:
        """The chart, with each line's last value as text alternative; "" without points."""
        lines = [_finite(line, self.log) for line in self.lines]
        lines_with_points = [line for line in lines if line.points]
        if not lines_with_points:
            return Markup("")
        axes = _Axes(self, lines_with_points)
        inside = [*_background(self, axes), *_curves(axes, lines)]  # the frame cuts these off
        frame = Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(
            _LEFT, _TOP, _WIDE, _TALL, Markup("").join(inside)
        )
        ends = (f"{line.name} ends at {_number(line.points[-1][1])}" for line in lines_with_points)
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>'
        ).format(
            WIDTH,
            HEIGHT,
            f"{self.title}: {'; '.join(ends)}.",
            frame,
            Markup("").join(_labels(self, axes)),
        )


class _Axes:
    """Ticks, and where values lie within the frame, from its top left corner."""

    def __init__(self, chart: Chart, lines: Sequence[Line]) -> None:
        points = [point for line in lines for point in line.points]
        self.low, self.high = min(x for x, _ in points), max(x for x, _ in points)
        if chart.bands:
            self.low, self.high = chart.bands[0][1], chart.bands[-1][2]
        start = self.low + chart.settle * (self.high - self.low)
        values = [y for x, y in points if x >= start] + [y for _, y in chart.levels]
        self.y_ticks = (_decades if chart.log else _round_numbers)(min(values), max(values))
        self.x_ticks = [
            value
            for value in _round_numbers(self.low, self.high, 5)
            if self.low <= value <= self.high and float(value).is_integer()  # steps, layers
        ]
        self._scale: Callable[[float], float] = math.log10 if chart.log else float
        self._bottom, self._top = map(self._scale, (self.y_ticks[0], self.y_ticks[-1]))

    def x(self, value: float) -> float:
        return round((value - self.low) / ((self.high - self.low) or 1) * _WIDE, 1)

    def y(self, value: float) -> float:
        return round((self._top - self._scale(value)) / (self._top - self._bottom) * _TALL, 1)


def _background(chart: Chart, axes: _Axes) -> Iterator[Markup]:
    for number, (name, low, high) in enumerate(chart.bands):
        left, wide = axes.x(low), round(axes.x(high) - axes.x(low), 1)
        yield _tag("rect", "band odd" if number % 2 else "band", x=left, width=wide, height=_TALL)
        if wide > 6 * len(name):  # else it would run into the next one
            yield _text("", left + wide / 2, 12, name)
    for value in axes.y_ticks:
        yield _tag("line", "grid", x2=_WIDE, y1=axes.y(value), y2=axes.y(value))
    for number, (name, value) in enumerate(chart.levels):
        y = axes.y(value)
        yield _tag("line", "level", x2=_WIDE, y1=y, y2=y)
        # Right and left in turn, so that names of levels near each other do not meet.
        side, x = ("start", 4) if number % 2 else ("end", _WIDE - 4)
        yield _text(f"level-name {side}", x, y - 4 if y > 14 else y + 13, name)


def _curves(axes: _Axes, lines: Sequence[Line]) -> Iterator[Markup]:
    for number, line in enumerate(lines, 1):
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in _thinned(line))
        yield _tag("polyline", f"s{number}", points=path)


def _labels(chart: Chart, axes: _Axes) -> Iterator[Markup]:
    for value in axes.y_ticks:
        yield _text("end", _LEFT - 6, _TOP + axes.y(value) + 4, _number(value, chart.log))
    for value in axes.x_ticks:
        yield _text("", _LEFT + axes.x(value), HEIGHT - _BOTTOM + 16, _number(value))
    yield _text("", _LEFT + _WIDE / 2, HEIGHT - 4, chart.x_label)
    yield _text("start", 2, 11, chart.y_label)
    if chart.mark is not None:
        name, (x, y) = chart.mark
        x, y = _LEFT + axes.x(x), _TOP + axes.y(y)
        yield _tag("circle", "mark", cx=x, cy=y, r=4)
        yield _text("mark-name end" if x > WIDTH / 2 else "mark-name start", x, y - 10, name)


def _finite(line: Line, positive: bool) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(x + y) and (y > 0 or not positive)]
    return Line(name=line.name, points=points, thin=line.thin)


def _thinned(line: Line) -> list[Point]:
    size = math.ceil(len(line.points) / _MOST) or 1
    parts = [line.points[start : start + size] for start in range(0, len(line.points), size)]
    return [(part[-1][0], line.thin([y for _, y in part])) for part in parts]


def _round_numbers(low: float, high: float, wanted: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low and high; 0 where it is near."""
    low = 0.0 if 0 < low < high / 2 else low
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = min((power * k for k in (1, 2, 5, 10)), key=lambda step: abs(span / step - wanted))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose low and high, at most about six of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 6))
    return [10.0**k for k in range(first, max(last, first + 1) + step, step)]


def _number(value: float, power: bool = False) -> str:
    if power and not 1e-3 <= value < 1e5:
        return f"1e{round(math.log10(value))}"
    if 10_000 <= abs(value) < 1e9:
        return f"{value / 1000:.4g}k" if abs(value) < 1e6 else f"{value / 1e6:.4g}M"
    return f"{value:.4g}"


def _tag(name: str, kind: str, **attributes: object) -> Markup:
    pairs = Markup(" ").join(Markup('{}="{}"').format(key, attributes[key]) for key in attributes)
    return Markup('<{} class="{}" {}/>').format(name, kind, pairs)


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    place = (round(x, 1), round(y, 1))
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, *place, text)
