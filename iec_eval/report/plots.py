"""Quality against cost, as an SVG that can stand alone or inside a page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import combinations
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from iec_eval.intervals import Interval
from iec_eval.report.wording import (
    decimals,
    higher_is_better,
    is_fid,
    quality_metric,
    quantity,
    times,
    with_interval,
)
from iec_eval.results import Results, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# drawn in this colour and replaced by currentColor, so that the plot follows the page's theme
INK = "#010203"
_PLAIN = "#3b82c4"  # these two are readable on white and on black
_CORRECTED = "#d9730d"
_RC: Mapping[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "font.size": 10.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "iec-eval",  # element ids are the same every time
    "text.parse_math": False,  # a dollar in a name is a dollar
}
_SIZE = (5.6, 4.2)  # inches: text is still readable at the width of a phone
_CLEARANCE = 5.0  # pixels that a label keeps from points and arrows
_OUTSIDE = 20.0  # how much worse it is for a label to be cut off than to cover something
_NEAR = 14.0  # points: a label further from its point is tied to it by a line
_ARROW_PARTS = 24  # places along an arrow that labels avoid
_NAMED = 14  # points: more have numbers for names, as have fewer where names find no room
_COORDINATES = re.compile(r'(?<= )(?:d|x|y)="[^"]*"')
_DECIMAL = re.compile(r"-?\d+\.\d+")
_DECADES = 10.0  # a larger ratio of best and worst needs a logarithmic axis


@dataclass(frozen=True)
class Point:
    """A row in the plot; ``base`` names the row that a corrected one's difference is against.

    ``number`` is the row's place in the study, from 1.
    """

    number: int
    name: str
    cost: float
    quality: float
    ci95: Interval | None
    corrected: bool
    control: bool
    base: str | None


def quality_plot(results: Results) -> str | None:
    """The quality metric of every finished row, with its interval, against multiply-accumulates.

    A line joins the rows that none beats at their cost or less (the Pareto front). Hovering over a
    point names its row. Returns one ``<svg>`` element, the same bytes for the same results, or None
    where no row has both numbers. Costs are relative to the full-precision control if there is one.
    """
    metric, upward = _quality(results)
    points, relative = _points(results, metric)
    if metric is None or not points:
        return None
    front = [] if upward is None else pareto_front(points, upward=upward)
    with plot_style():
        figure = _figure(points, front)
        figure.axes[0].set_xlabel(_cost_label(relative))
        figure.axes[0].set_ylabel(_quality_label(metric, results.images, upward))
        drawn = _svg(figure, points)
    return _with_titles(drawn, points, metric, relative)


def front_of(results: Results) -> list[Point]:
    """The Pareto front of :func:`quality_plot`; empty where it has none."""
    metric, upward = _quality(results)
    points, _ = _points(results, metric)
    return [] if upward is None else pareto_front(points, upward=upward)


def _quality(results: Results) -> tuple[str | None, bool | None]:
    metric = quality_metric(results)
    return metric, higher_is_better(metric, results) if metric else None


def _points(results: Results, metric: str | None) -> tuple[list[Point], bool]:
    """A point for every finished row that has both numbers, and whether costs are relative."""
    rows = [(n, row) for n, row in enumerate(results.variants, 1) if row.status == "done"]
    relative = any(row.cost.relative_macs is not None for _, row in rows)
    found = [_point(n, row, metric, relative) for n, row in rows if metric]
    return [point for point in found if point is not None], relative


def pareto_front(points: Sequence[Point], *, upward: bool) -> list[Point]:
    """The points that none of at most their cost is as good as, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality if upward else p.quality)):
        best = front[-1].quality if front else None
        if best is None or (point.quality > best if upward else point.quality < best):
            front.append(point)
    return front


def _point(number: int, row: Variant, metric: str, relative: bool) -> Point | None:
    found = row.metrics.get(metric)
    cost = row.cost.relative_macs if relative else row.cost.macs_per_image
    if found is None or found.value is None or cost is None:
        return None
    bases = [one.versus for one in row.comparisons if one.relation == "base"]
    base = found.delta.versus if found.delta else next(iter(bases), None)
    corrected = bool(row.callbacks)
    return Point(
        number,
        row.name,
        cost,
        found.value,
        found.ci95,
        corrected,
        row.control,
        base if corrected else None,
    )


def _cost_label(relative: bool) -> str:
    return f"MACs per image{', relative to full precision' if relative else ''}"


def _quality_label(metric: str, images: int, upward: bool | None) -> str:
    count = f" (N={images})" if is_fid(metric) else ""
    reading = {True: ", higher is better", False: ", lower is better", None: ""}[upward]
    return metric + count + reading


@contextmanager
def plot_style() -> Iterator[None]:
    """Within the block figures have the project's style; ink is what follows the page's theme."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own style is, the file is the same
        mpl.rcParams.update(_RC)  # type: ignore[arg-type]  # older stubs want str keys
        yield


def _figure(points: Sequence[Point], front: Sequence[Point]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.margins(0.14)
    axes.grid(color="#808080", alpha=0.25)
    if _spans_decades(points):
        _use_decades(axes)
    _draw_front(axes, front, max(point.cost for point in points))
    _draw_arrows(axes, points)
    for point in points:
        _draw_point(axes, point)
    return figure


def _spans_decades(points: Sequence[Point]) -> bool:
    lowest = min(min(point.quality, *(point.ci95 or (point.quality,))) for point in points)
    return lowest > 0 and max(point.quality for point in points) > _DECADES * lowest


def _use_decades(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_front(axes: Axes, front: Sequence[Point], dearest: float) -> None:
    """What quality can be had for at most a cost: level up to the next point of the front."""
    if len(front) > 1:
        costs = [*(point.cost for point in front), dearest]
        qualities = [*(point.quality for point in front), front[-1].quality]
        line = axes.step(costs, qualities, where="post", color=INK, alpha=0.5, linewidth=1.3)
        line[0].set(linestyle=(0, (5, 3)), gid="pareto-front")


def _draw_point(axes: Axes, point: Point) -> None:
    """A circle or, corrected, a diamond; hollow for a row that the tool added."""
    color = _CORRECTED if point.corrected else _PLAIN
    if point.ci95 is not None:
        axes.plot([point.cost] * 2, point.ci95, color=color, alpha=0.6, linewidth=1.6)
    axes.plot(
        point.cost,
        point.quality,
        "D" if point.corrected else "o",
        color=color,
        markerfacecolor="none" if point.control else color,
        markeredgewidth=1.6,
        markersize=6 if point.corrected else 7,
        gid=f"row-{point.number}",
    )


def _draw_arrows(axes: Axes, points: Sequence[Point]) -> None:
    places = {point.name: (point.cost, point.quality) for point in points}
    for point in points:
        if point.base in places:
            axes.annotate(
                "",
                places[point.name],
                places[point.base],
                arrowprops={"arrowstyle": "->", "color": INK, "alpha": 0.6, "shrinkB": 6},
            )


def _with_titles(svg: str, points: Sequence[Point], metric: str, relative: bool) -> str:
    """Each point's group with a title, which browsers show on hovering."""
    for point in points:
        cost = times(point.cost) if relative else quantity(point.cost)
        value = with_interval(point.quality, point.ci95, decimals([point.quality]))
        title = escape(f"{point.number}. {point.name}: {metric} {value} at {cost} MACs")
        group = f'<g id="row-{point.number}">'
        svg = svg.replace(group, f"{group}<title>{title}</title>", 1)
    return svg


def _svg(figure: Figure, points: Sequence[Point]) -> str:
    figure.draw_without_rendering()
    _place_labels(figure, points)
    return figure_as_svg(figure)


def figure_as_svg(figure: Figure) -> str:
    """One ``<svg>`` element, the same bytes for the same figure; ink follows the page's theme.

    Coordinates, in points, have one decimal and lines no indentation, which saves a third.
    """
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    # from the element on: an XML prologue and a document type have no place inside a page
    svg = re.sub(INK, "currentColor", svg[svg.index("<svg") :])
    return re.sub(r"\n +", "\n", _COORDINATES.sub(_rounded, svg))


def _rounded(attribute: re.Match[str]) -> str:
    return _DECIMAL.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), attribute[0])


def _place_labels(figure: Figure, points: Sequence[Point]) -> None:
    """Name every point, or number all of them where the names cannot be read."""
    axes = figure.axes[0]
    if len(points) <= _NAMED:
        labels = _labelled(axes, points, attrgetter("name"))
        if _readable(axes, labels):
            return
        for label in labels:
            label.remove()
    _labelled(axes, points, lambda point: str(point.number))


def _labelled(
    axes: Axes, points: Sequence[Point], text: Callable[[Point], str]
) -> list[Annotation]:
    """Labels and their leaders, each where it covers least of the points and of those before it."""
    frame = axes.get_window_extent()
    taken = [_surroundings(axes, *place) for place in _occupied(points)]
    drawn: list[Annotation] = []
    for point in sorted(points, key=lambda point: (point.cost, point.quality)):
        where = (point.cost, point.quality)
        label = axes.annotate(text(point), where, (0, 0), textcoords="offset points", fontsize=9.5)
        label.set_in_layout(False)  # or the axes would move once it is placed
        best = min(_PLACES, key=lambda place: _overlap(_move(label, place), taken, frame))
        taken.append(_move(label, best))
        drawn.append(label)
        if math.hypot(*best[:2]) > _NEAR:
            drawn.append(_leader(axes, where, best))
    return drawn


def _readable(axes: Axes, labels: Sequence[Annotation]) -> bool:
    """Whether no label is cut off, and none covers another."""
    frame = axes.get_window_extent()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    inside = all(_common(box, frame) > 0.999 * box.width * box.height for box in boxes)
    return inside and not any(_common(one, other) for one, other in combinations(boxes, 2))


def _leader(axes: Axes, point: tuple[float, float], place: _Place) -> Annotation:
    """A thin line from a point to its label, which stands away from it."""
    line = {"arrowstyle": "-", "color": INK, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 0}
    leader = axes.annotate("", point, place[:2], textcoords="offset points", arrowprops=line)
    leader.set_in_layout(False)
    return leader


_Place = tuple[float, float, str, str]

# offsets in points and the alignment that goes with each, the best first
_PLACES: tuple[_Place, ...] = tuple(
    (x, y, side, height)
    for reach in (1.0, 2.2, 3.4, 4.6, 5.8)
    for x, y, side, height in (
        (9 * reach, 0.0, "left", "center"),
        (-9 * reach, 0.0, "right", "center"),
        (0.0, 8 * reach, "center", "bottom"),
        (0.0, -8 * reach, "center", "top"),
        (6 * reach, 6 * reach, "left", "bottom"),
        (6 * reach, -6 * reach, "left", "top"),
        (-6 * reach, 6 * reach, "right", "bottom"),
        (-6 * reach, -6 * reach, "right", "top"),
    )
)


def _move(label: Annotation, place: _Place) -> Bbox:
    x, y, side, height = place
    label.xyann = (x, y)
    label.set(horizontalalignment=side, verticalalignment=height)
    return label.get_window_extent()


def _occupied(points: Sequence[Point]) -> Iterator[tuple[float, float]]:
    """Every point and places along every arrow, in data units."""
    places = {point.name: (point.cost, point.quality) for point in points}
    for point in points:
        yield places[point.name]
        x, y = places.get(point.base or "", places[point.name])
        for part in range(1, _ARROW_PARTS):
            share = part / _ARROW_PARTS
            yield x + share * (point.cost - x), y + share * (point.quality - y)


def _surroundings(axes: Axes, cost: float, quality: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((cost, quality))
    reach = _CLEARANCE
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _overlap(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Area in square pixels that is covered twice or, counted more, lies outside the frame."""
    outside = box.width * box.height - _common(box, frame)
    return _OUTSIDE * outside + sum(_common(box, other) for other in taken)


def _common(one: Bbox, other: Bbox) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
