"""Plots of an analysis, as SVG in the style of the report's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from iec_eval.analysis.growth import fitted
from iec_eval.report.plots import figure_as_svg, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

Found = Mapping[str, Any]
COLORS = ("#3b82c4", "#d9730d", "#2f9e63", "#a855c7", "#c2414d")  # on white and on black
MARKERS = ("o", "s", "D")  # of the points after all colours are used up
SHOWN_LAMBDAS = 4


def _drawn(draw: Callable[[Axes], None], x: str, y: str) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color="#808080", alpha=0.25)
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _show_plain_numbers(axes)
        legend = _add_legend(axes, ncols=2)
        figure.canvas.draw()  # lays out
        if legend.get_window_extent().x1 > figure.bbox.x1:  # long names
            _add_legend(axes, ncols=1)
        return figure_as_svg(figure)


def _add_legend(axes: Axes, *, ncols: int) -> Legend:
    """Above the axes, where it covers no line; in the place of one that is there."""
    return axes.legend(
        fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols
    )


def _show_plain_numbers(axes: Axes) -> None:
    """Whole steps; on a logarithmic axis numbers without markup, which stays as it is in an SVG."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def spectral_plot(found: Found) -> str | None:
    """Norms of A I + B J per step, from the least image to the largest; of grad G the largest."""
    steps = found["steps"]
    if not steps:
        return None
    x = [step["step"] for step in steps]
    values = [[one["value"] for one in step["norms"]["step"]] for step in steps]

    def draw(axes: Axes) -> None:
        axes.fill_between(x, *_ends(values), color=COLORS[0], alpha=0.25, linewidth=0)
        means = [step["norm_step_mean"] for step in steps]
        axes.plot(x, means, "o-", color=COLORS[0], markersize=4, label="||A I + B J||")
        shown = found["lambdas"][:: max(1, len(found["lambdas"]) // SHOWN_LAMBDAS)]
        for color, value in zip(COLORS[1:], shown, strict=False):
            norms = [step["norm_grad_g_max"][f"{value:g}"] for step in steps]
            axes.plot(x, norms, "--", color=color, label=f"||grad G||, lambda {value:g}")
        axes.axhline(1, color="#808080", linewidth=1)

    return _drawn(draw, "step", "spectral norm")


def _ends(values: list[list[float]]) -> tuple[list[float], list[float]]:
    return [min(some) for some in values], [max(some) for some in values]


def growth_plot(found: Found) -> str | None:
    """Mean distances per step, the middle half of the images, and the better of the fitted curves.

    Not the standard deviation: one image that goes elsewhere makes it larger than the mean.
    """

    def draw(axes: Axes) -> None:
        for color, series in zip(COLORS, found["series"], strict=False):
            mean = np.array(series["mean"])
            x = np.arange(len(mean), dtype=np.float64)
            axes.plot(x, mean, color=color, label=f"{series['run']} to {series['versus']}")
            middle = np.quantile(series["distance"], (0.25, 0.75), axis=1)
            axes.fill_between(x, *middle, color=color, alpha=0.15, linewidth=0)
            fit = series["fit"]
            if fit["better"] in fit:  # a curve's name
                curve = fitted(fit["better"], fit[fit["better"]], x[1:])
                axes.plot(x[1:], curve, ":", color=color, linewidth=1.5)

    shown = "steps taken (shaded: the middle half of images; dotted: a fit)"
    return _drawn(draw, shown, "distance ||delta||")


def residual_plot(found: Found) -> str | None:
    """Mean residual per step before and after a correction, as a share of the sample's norm.

    A step that does not move has none, and leaves a gap.
    """
    steps = found["steps"]
    kinds = [("before", "before"), ("after_half", "lambda 0.5"), ("after_lambda", "best lambda")]
    kinds += [("after_own", "the row's correction")]

    def draw(axes: Axes) -> None:
        for color, (key, label) in zip(COLORS, kinds, strict=False):
            there = [step for step in steps if step[key] is not None]
            shares = [_mean_share(step[key], step["size"]) for step in there]
            if any(share > 0 for share in shares):
                x = [step["step"] for step in there]
                shown = [share or np.nan for share in shares]
                axes.plot(x, shown, ".-", color=color, label=label)
        axes.set_yscale("log")

    return _drawn(draw, "step", "residual / ||x||") if steps else None


def _mean_share(residual: list[float], size: list[float]) -> float:
    shares = [r / s if s else 0.0 for r, s in zip(residual, size, strict=True)]
    return sum(shares) / len(shares)


def recommendation_plot(found: Found) -> str | None:
    """Lambda of each step; filled where the budget reaches."""
    steps, chosen = found["steps"], set(found["chosen"])

    def draw(axes: Axes) -> None:
        x = [step["step"] for step in steps]
        axes.plot(x, [step["lambda_measured"] for step in steps], "o", mfc="none", color=COLORS[0])
        some = [step for step in steps if step["step"] in chosen]
        values = [step["lambda_measured"] for step in some]
        label = f"within {100 * found['budget']:g} % more MACs"
        axes.plot([step["step"] for step in some], values, "o", color=COLORS[1], label=label)

    return _drawn(draw, "step", "lambda of least residual") if steps else None


def ablation_plot(found: Found) -> str | None:
    """The difference in quality to no correction, with its interval, against overhead.

    The metric itself where no difference is known; None before the ablation was run.
    """
    scored = [row for row in found["choices"] if row["measured"] is not None]
    scored = [row for row in scored if row["measured"]["overhead"] is not None]
    if not scored:
        return None
    metric = found["quality"]
    if metric is None:
        return None
    compared = [row for row in scored if metric in row["measured"]["differences"]]

    def draw(axes: Axes) -> None:
        for number, row in enumerate(compared or scored):
            value, bars = _score(row["measured"], metric)
            if value is not None:
                style = {"color": COLORS[number % len(COLORS)], "label": row["label"]}
                marker = MARKERS[number // len(COLORS) % len(MARKERS)]
                x = 100 * row["measured"]["overhead"]
                axes.errorbar(x, value, yerr=bars, fmt=marker, capsize=3, **style)
        if compared:
            axes.axhline(0, color="#808080", linewidth=1)

    shown = f"{metric}, difference to no correction" if compared else metric
    return _drawn(draw, "more multiply-accumulates, %", shown)


def _score(measured: Found, metric: str) -> tuple[float | None, list[list[float]] | None]:
    """Difference and its error bars, as matplotlib takes them; else the metric without bars."""
    gap = measured["differences"].get(metric)
    if gap is None:
        return measured["metrics"].get(metric), None
    if gap["ci95"] is None:
        return gap["value"], None
    low, high = gap["ci95"]
    return gap["value"], [[gap["value"] - low], [high - gap["value"]]]


PLOTS: Mapping[str, Callable[[Found], str | None]] = {
    "spectral": spectral_plot,
    "growth": growth_plot,
    "residuals": residual_plot,
    "recommendation": recommendation_plot,
    "ablation": ablation_plot,
}
