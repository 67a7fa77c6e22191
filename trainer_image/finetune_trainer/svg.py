"""Line charts as SVG that stands in a page: colours are the page's (classes a, b, c, d). Pure functions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

Point = tuple[float, float]
WIDE, SMALL = (1000, 280), (340, 190)
"""Width and height in the pixels that the page gives them, so that letters are of the page's size."""
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 10, 26
POINTS = 240
"""Of one line: more would be less than two pixels apart."""
MARKED = 40
"""Points up to which each is marked."""
COLOURS = "abcd"


class Line(NamedTuple):
    name: str
    points: Sequence[Point]
    """Ascending."""
    marked: bool = False
    """Each point was measured by itself, far from the next."""
    exact: bool = False
    """It has no noise to look through."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` or below to `high` or above, about `count` steps apart."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # As many digits as the steps have: 3 * 0.1 is not 0.3.
    digits = 2 - math.floor(math.log10(step))
    return [round(place * step, digits) for place in range(first, last + 1)]


def label(value: float) -> str:
    if not value or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.10g}"
    power = math.floor(math.log10(abs(value)))
    return f"{round(value / 10**power, 2):g}e{power}"


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smoothed(points: Sequence[Point], width: int) -> list[Point]:
    """Means of `width` points each, about every point: fewer at the ends."""
    half = width // 2
    found = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        found.append((x, sum(y for _, y in near) / len(near)))
    return found


def chart(key: str, title: str, lines: Sequence[Line], size: tuple[int, int] = SMALL) -> Markup:
    """An `svg` element. `key`: unique in the page. Values that are no numbers leave gaps; empty without any."""
    lines = [line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    xs, ys = ([p[axis] for line in lines for p in line.points] for axis in (0, 1))
    across, up = ticks(min(xs), max(xs), 6 if size[0] > 500 else 4), ticks(min(ys), max(ys), 4)
    if min(xs) == max(xs):
        across = [min(xs)]
    frame = _Frame(min(xs), max(xs), up[0], up[-1], *size)
    parts = [_grid(frame, across, up), *(_drawn(frame, line, COLOURS[i % 4]) for i, line in enumerate(lines))]
    told = "; ".join(
        f"{line.name} from {label(line.points[0][1])} at step {label(line.points[0][0])} "
        f"to {label(line.points[-1][1])} at step {label(line.points[-1][0])}"
        for line in lines
    )
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{title}</title><desc id="{k}-d">{told}</desc>{body}</svg>'
    ).format(w=size[0], h=size[1], k=key, title=title, told=told, body=Markup("").join(parts))


class _Frame(NamedTuple):
    left: float
    right: float
    bottom: float
    top: float
    width: int
    height: int

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1.0)
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / ((self.top - self.bottom) or 1.0)
        return round(self.height - BOTTOM - share * (self.height - BOTTOM - TOP), 1)


def _grid(frame: _Frame, across: Sequence[float], up: Sequence[float]) -> Markup:
    lines = [
        Markup(
            '<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/><text x="{t}" y="{u}" class="tick end">{v}</text>'
        ).format(a=LEFT, b=frame.width - RIGHT, y=frame.y(v), t=LEFT - 8, u=frame.y(v) + 4, v=label(v))
        for v in up
    ]
    bottom = frame.height - BOTTOM
    lines += [
        Markup('<text x="{x}" y="{y}" class="tick mid">{v}</text>').format(x=frame.x(v), y=bottom + 18, v=label(v))
        for v in across
        if frame.left <= v <= frame.right
    ]
    return Markup("").join(lines)


def _drawn(frame: _Frame, line: Line, colour: str) -> Markup:
    points = thinned(line.points)
    noisy = not (line.marked or line.exact) and len(points) > MARKED
    drawn = Markup("")
    if noisy:
        drawn += _path(frame, points, f"line {colour} faint")
        points = smoothed(points, max(3, len(points) // 16))
    drawn += _path(frame, points, f"line {colour}")
    return drawn + Markup("").join(
        Markup('<circle class="{c}" cx="{x}" cy="{y}" r="{r}"><title>{t}</title></circle>').format(
            c=f"dot {colour}" if line.marked or len(points) <= MARKED else "dot hidden",
            x=frame.x(x),
            y=frame.y(y),
            r=3 if line.marked or len(points) <= MARKED else 6,
            t=f"{line.name} {label(float(f'{y:.5g}'))} at step {label(x)}",
        )
        for x, y in points
    )


def _path(frame: _Frame, points: Sequence[Point], classes: str) -> Markup:
    where = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(classes, where)


def legend(lines: Sequence[Line]) -> Markup:
    """The names of several lines, in their colours; nothing for one."""
    if len(lines) < 2:
        return Markup("")
    items = (Markup('<span class="key {}">{}</span>').format(COLOURS[i % 4], line.name) for i, line in enumerate(lines))
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))
