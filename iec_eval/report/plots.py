"""Quality against cost, as an SVG that can stand alone or inside a page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from iec_eval.report.wording import higher_is_better, is_fid, quality_metric
from iec_eval.results import Results, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# drawn in this colour and replaced by currentColor, so that the plot follows the page's theme
_INK = "#010203"
_PLAIN = "#3b82c4"  # these two are readable on white and on black
_CORRECTED = "#d9730d"
_RC: Mapping[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "iec-eval",  # element ids are the same every time
    "text.parse_math": False,  # a dollar in a name is a dollar
}
_SIZE = (5.2, 3.8)  # inches: text is still readable at the width of a phone
_CLEARANCE = 5.0  # pixels that a label keeps from points and arrows
_NEAR = 14.0  # points: a label further from its point is tied to it by a line
_ARROW_PARTS = 24  # places along an arrow that labels avoid


@dataclass(frozen=True)
class Point:
    """A row in the plot; ``base`` names the row that its difference is against."""

    name: str
    cost: float
    quality: float
    corrected: bool
    base: str | None


def quality_plot(results: Results, directions: Mapping[str, bool] | None = None) -> str | None:
    """The quality metric of every finished row against its multiply-accumulates.

    Returns one ``<svg>`` element, the same bytes for the same results, or None where no row has
    both numbers. Costs are relative to the full-precision control if there is one.
    """
    metric = quality_metric(results)
    rows = [row for row in results.variants if row.status == "done"]
    relative = any(row.cost.relative_macs is not None for row in rows)
    points = [point for row in rows if metric and (point := _point(row, metric, relative))]
    if metric is None or not points:
        return None
    with _style():
        figure = _figure(points)
        figure.axes[0].set_xlabel(_cost_label(relative))
        label = _quality_label(metric, results.images, higher_is_better(metric, directions))
        figure.axes[0].set_ylabel(label)
        return _svg(figure, points)


def _point(row: Variant, metric: str, relative: bool) -> Point | None:
    found = row.metrics.get(metric)
    cost = row.cost.relative_macs if relative else row.cost.macs_per_image
    if found is None or found.value is None or cost is None:
        return None
    base = found.delta.versus if found.delta else None
    return Point(row.name, cost, found.value, bool(row.callbacks), base)


def _cost_label(relative: bool) -> str:
    return f"MACs per image{', relative to full precision' if relative else ''}"


def _quality_label(metric: str, images: int, upward: bool | None) -> str:
    count = f" (N={images})" if is_fid(metric) else ""
    reading = {True: ", higher is better", False: ", lower is better", None: ""}[upward]
    return metric + count + reading


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own style is, the file is the same
        mpl.rcParams.update(_RC)  # type: ignore[arg-type]  # older stubs want str keys
        yield


def _figure(points: Sequence[Point]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.margins(0.14)
    axes.grid(color="#808080", alpha=0.25)
    _draw_arrows(axes, points)
    for corrected, marker, color in ((False, "o", _PLAIN), (True, "D", _CORRECTED)):
        chosen = [point for point in points if point.corrected == corrected]
        costs = [point.cost for point in chosen]
        axes.plot(costs, [point.quality for point in chosen], marker, color=color, markersize=7)
    return figure


def _draw_arrows(axes: Axes, points: Sequence[Point]) -> None:
    places = {point.name: (point.cost, point.quality) for point in points}
    for point in points:
        if point.base in places:
            axes.annotate(
                "",
                places[point.name],
                places[point.base],
                arrowprops={"arrowstyle": "->", "color": _INK, "alpha": 0.6, "shrinkB": 6},
            )


def _svg(figure: Figure, points: Sequence[Point]) -> str:
    figure.draw_without_rendering()
    _place_labels(figure, points)
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    # from the element on: an XML prologue and a document type have no place inside a page
    return re.sub(_INK, "currentColor", svg[svg.index("<svg") :])


def _place_labels(figure: Figure, points: Sequence[Point]) -> None:
    """Put each label where it covers least of the points and of the labels before it."""
    axes = figure.axes[0]
    frame = axes.get_window_extent()
    taken = [_surroundings(axes, *place) for place in _occupied(points)]
    for point in sorted(points, key=lambda point: (point.cost, point.quality)):
        where = (point.cost, point.quality)
        label = axes.annotate(point.name, where, (0, 0), textcoords="offset points", fontsize=10)
        label.set_in_layout(False)  # or the axes would move once it is placed
        best = min(_PLACES, key=lambda place: _overlap(_move(label, place), taken, frame))
        taken.append(_move(label, best))
        if math.hypot(*best[:2]) > _NEAR:
            _draw_leader(axes, where, best)


def _draw_leader(axes: Axes, point: tuple[float, float], place: _Place) -> None:
    """A thin line from a point to its label, which stands away from it."""
    line = {"arrowstyle": "-", "color": _INK, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 0}
    leader = axes.annotate("", point, place[:2], textcoords="offset points", arrowprops=line)
    leader.set_in_layout(False)


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
    """Area in square pixels that is covered twice or lies outside the frame."""
    inside = _common(box, frame)
    return box.width * box.height - inside + sum(_common(box, other) for other in taken)


def _common(one: Bbox, other: Bbox) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
