"""Charts by matplotlib: SVG in the page's colours, light and dark, with text that is text; PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 240  # about what a chart measures on the page, so that text keeps its size
# The page's colours; in SVG its variables of these names stand before the light ones.
LIGHT = {
    "card": "#ffffff", "ink": "#1c1b19", "soft": "#5c5952", "line": "#dfdbd2", "band": "#f1efe9",
    "warn": "#8a2b06", "s1": "#1f5fa8", "s2": "#b4470a", "s3": "#2b7a4b", "s4": "#7c3d97",
    "s5": "#7d6608", "s6": "#a3286a",
}  # fmt: skip
DARK = {
    "card": "#1a1d21", "ink": "#e9e6df", "soft": "#a7a39a", "line": "#34383e", "band": "#22262b",
    "warn": "#ffb48c", "s1": "#7db6f7", "s2": "#f2a36c", "s3": "#7ccb9d", "s4": "#cba3e6",
    "s5": "#d9c25c", "s6": "#f29ac2",
}  # fmt: skip
_MOST = 400  # points of a line; more would not be seen
_DASHES = ((), (5, 2), (1.5, 2))  # of lines, beside their colours
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vdvae",  # the same chart is the same text
    "text.parse_math": False,
    "font.size": 9,
    "text.color": LIGHT["soft"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
}
_NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named curve; points that are not finite are left out."""

    name: str
    points: Sequence[Point]
    thin: Callable[[Sequence[float]], float] = fmean  # many neighbours become one: their mean
    errors: Sequence[float] = ()  # half a bar at each point; such a line is not thinned

    def finite(self, positive: bool) -> list[Point]:
        """At most 400 finite points, above zero where `positive`."""
        points = [
            (x, y) for x, y in self.points if math.isfinite(x + y) and (y > 0 or not positive)
        ]
        if self.errors:
            return points
        size = math.ceil(len(points) / _MOST) or 1
        parts = [points[start : start + size] for start in range(0, len(points), size)]
        return [(part[-1][0], self.thin([y for _, y in part])) for part in parts]

    def errors_of(self, points: Sequence[Point]) -> list[float]:
        """Those of some of the points."""
        by_point = dict(zip(self.points, self.errors, strict=True))
        return [by_point[point] for point in points]


def line_style(number: int) -> tuple[str, tuple[float, ...]]:
    """Colour, as a name of LIGHT, and dashes and gaps of the line of this number, from 0."""
    return f"s{number % 6 + 1}", _DASHES[number % 2 if number < 6 else 2]


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
    x_ticks: Sequence[str] = ()  # names of x = 0, 1, and so on, where x is no number
    legend: bool = False  # in SVG, too

    def svg(self) -> Markup:
        """The chart, with each line's last value as text alternative; "" without points."""
        ends = [
            f"{line.name} ends at {points[-1][1]:.4g}"
            for line in self.lines
            if (points := line.finite(self.log))
        ]
        if not ends:
            return Markup("")
        text = self._saved("svg").decode()
        text = re.sub(r' id="[a-z0-9]+_\d+"', "", text[text.index("<svg") :])  # each chart has them
        for name, colour in LIGHT.items():
            text = text.replace(colour, f"var(--{name}, {colour})")
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            'class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"{}'
        ).format(
            WIDTH, HEIGHT, f"{self.title}: {'; '.join(ends)}.", Markup(text[text.index(">") :])
        )

    def standalone(self) -> str:
        """The SVG as a file of its own, dark where its reader's screen is."""
        dark = "".join(f"--{name}:{colour};" for name, colour in DARK.items())
        style = f"<style>@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
        head, end, rest = self.svg().partition(">")
        return f"{head}{end}{style}{rest}" if head else ""

    def png(self) -> bytes:
        """The same in light colours, with its title and a legend."""
        return self._saved("png")

    def _saved(self, kind: str) -> bytes:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            file = io.BytesIO()
            figure = self.figure(legend=self.legend or kind == "png")
            if kind == "svg":
                figure.savefig(file, format=kind, metadata=_NOTHING, transparent=True)
            else:
                figure.savefig(file, format=kind, dpi=180)
        return file.getvalue()

    def figure(self, legend: bool = False) -> Figure:
        """The chart as matplotlib's."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
        axes.set_title(self.y_label)
        axes.set_xlabel(self.x_label)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=LIGHT["line"])
        axes.set_axisbelow(True)
        settled: list[float] = [y for _, y in self.levels]
        for number, line in enumerate(self.lines):
            points = line.finite(self.log)
            if not points:
                continue
            colour, dashes = line_style(number)
            x, y = zip(*points, strict=True)
            style: dict[str, Any] = {"color": LIGHT[colour], "linewidth": 1.6}
            style |= {"linestyle": (0, dashes)} if dashes else {}
            if line.errors:
                axes.errorbar(
                    x, y, line.errors_of(points), label=line.name, capsize=3, marker="o", **style
                )
            else:
                axes.plot(x, y, label=line.name, **style)
            start = x[0] + self.settle * (x[-1] - x[0])
            settled += [value for at, value in points if at >= start]
        if self.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if self.settle and max(settled) > min(settled):
            room = 0.06 * (max(settled) - min(settled))
            axes.set_ylim(min(settled) - room, max(settled) + room)
        if self.x_ticks:
            axes.set_xticks(range(len(self.x_ticks)), self.x_ticks)
            axes.margins(x=0.1)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))  # steps, layers
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.margins(x=0.0)
        for number, (name, value) in enumerate(self.levels):
            axes.axhline(value, color=LIGHT["warn"], linestyle=":")
            # Right and left in turn, so that names of levels near each other do not meet.
            axes.annotate(
                name, (1 - number % 2, value), (0, 3), color=LIGHT["warn"],
                xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                ha="left" if number % 2 else "right",
            )  # fmt: skip
        whole = (self.bands[-1][2] - self.bands[0][1]) if self.bands else 1
        for number, (name, low, high) in enumerate(self.bands):
            axes.axvspan(low, high, color=LIGHT["band"] if number % 2 else "none", zorder=-1)
            if (high - low) / whole > len(name) / 50:  # else it would run into the next one
                axes.annotate(
                    name, ((low + high) / 2, 1), (0, -10), ha="center",
                    xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                )  # fmt: skip
        if self.mark is not None:
            name, point = self.mark
            axes.plot(*point, "o", color=LIGHT["s2"], markeredgecolor=LIGHT["card"], clip_on=False)
            right = point[0] > sum(axes.get_xlim()) / 2
            axes.annotate(
                name, point, (0, 8), textcoords="offset points", color=LIGHT["ink"],
                ha="right" if right else "left", weight="bold",
            )  # fmt: skip
        if legend and len(self.lines) > 1:
            axes.legend(frameon=False)
        return figure
