"""How numbers and metrics are worded, the same in every table, plot and page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from iec_eval.intervals import Interval, is_spread
from iec_eval.results import Judgement, Results

NOTHING = "-"
INFINITE = "fid-infinity"  # FID extrapolated to infinitely many images
ENOUGH_IMAGES = 50_000  # what the literature computes FID with
_FAMILIES = {
    "fid": False,
    "kid": False,
    "lpips": False,
    "is": True,
    "clip": True,
    "psnr": True,
    "ssim": True,
    "precision": True,
    "recall": True,
}


def higher_is_better(metric: str, *results: Results) -> bool | None:
    """Which way a metric improves: as ``results`` say, else by the name's family, else None.

    The family is the first word (``fid-fashion`` is an FID); a spread such as ``is_std`` has none.
    Results that contradict each other leave no direction.
    """
    told = {one.directions[metric] for one in results if metric in one.directions}
    if told:
        return told.pop() if len(told) == 1 else None
    if is_spread(metric):
        return None
    return _FAMILIES.get(re.split(r"[^a-z0-9]+", metric.lower())[0])


def judgement(interval: Interval | None, better_up: bool | None) -> Judgement | None:
    """What the interval of a value minus another's says of the first.

    None without an interval, or where neither way is better.
    """
    if interval is None or better_up is None:
        return None
    low, high = interval
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if (low > 0) == better_up else "worse"


def arrow(better_up: bool | None) -> str:
    """The mark of a column: the direction in which it improves."""
    return {True: " ↑", False: " ↓", None: ""}[better_up]


def is_fid(metric: str) -> bool:
    """Whether a metric is a Fréchet distance, whose value depends on the number of images."""
    return metric.lower().startswith("fid")


def metric_names(results: Iterable[Results]) -> list[str]:
    """Every metric that some row has, in the order of first appearance."""
    rows = (row for document in results for row in document.variants)
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def quality_metric(results: Results) -> str | None:
    """The metric that stands for quality: the first Fréchet distance, else the first one."""
    names = metric_names([results])
    return next((name for name in names if is_fid(name)), names[0] if names else None)


def decimals(values: Iterable[float]) -> int:
    """Digits after the point that give the largest value four significant ones."""
    largest = max((abs(value) for value in values), default=0.0)
    return 2 if largest == 0 else min(max(3 - math.floor(math.log10(largest)), 0), 8)


def interval_digits(bounds: Interval | None, otherwise: int) -> int:
    """Digits after the point that give half an interval's width two significant ones.

    A value has no more digits to show than its interval leaves standing; ``otherwise`` is for
    values without an interval, or with one of no width.
    """
    width = 0.0 if bounds is None else (bounds[1] - bounds[0]) / 2
    return otherwise if width <= 0 else min(max(1 - math.floor(math.log10(width)), 0), 8)


def with_interval(value: float, bounds: Interval | None, otherwise: int, sign: str = "") -> str:
    """A value and its interval in as many digits as the interval supports."""
    digits = interval_digits(bounds, otherwise)
    return f"{value:{sign}.{digits}f}{interval(bounds, digits, sign)}"


def interval(bounds: Interval | None, digits: int, sign: str = "") -> str:
    """`` [lo, hi]``, or nothing where there is no interval."""
    if bounds is None:
        return ""
    low, high = (f"{bound:{sign}.{digits}f}" for bound in bounds)
    return f" [{low}, {high}]"


def plus_minus(spread: float | None, digits: int) -> str:
    """`` ± s``, the standard deviation over seeds; nothing where there are no seeds."""
    return "" if spread is None else f" ± {spread:.{digits}f}"


def quantity(value: float | None, unit: str = "") -> str:
    """A number with a decimal prefix, such as ``1.23 G`` or ``4.50 MB``."""
    if value is None:
        return NOTHING
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{significant(value)} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{significant(value)} P{unit}"


def significant(value: float) -> str:
    """Three significant digits, never in exponent form from 1e-4 up."""
    return f"{value:.0f}" if abs(value) >= 99.95 or value == 0 else f"{value:#.3g}"


def times(value: float | None) -> str:
    """A share of the full-precision control, such as ``0.56x``."""
    return NOTHING if value is None else f"{value:.2f}x"


def pairings(pairs: Iterable[tuple[str, str]]) -> str:
    """Rows and what each is held against, such as ``A and B against C; D against E``."""
    held: dict[str, dict[str, None]] = {}
    for name, versus in pairs:
        held.setdefault(versus, {})[name] = None
    return "; ".join(f"{_listed(list(names))} against {versus}" for versus, names in held.items())


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def reading_note(results: Iterable[Results]) -> str:
    """How many images, what that does to FID, and what bounds the noise."""
    documents = list(results)
    counts = sorted({document.images for document in documents})
    note = f"{' or '.join(f'{count:,}' for count in counts)} images per row{_seeds(documents)}."
    if len(counts) > 1:
        note += " FID falls as images are added: compare only rows with the same number."
    names = metric_names(documents)
    if any(map(is_fid, names)) and counts and counts[0] < ENOUGH_IMAGES:
        note += f" FID is biased upward below {ENOUGH_IMAGES:,} images{_infinite(names)}."
    return note + _interval_note(documents)


def _seeds(documents: Iterable[Results]) -> str:
    seeds = dict.fromkeys(tuple(document.seeds) for document in documents if document.seeds)
    if not seeds:
        return ""
    listed = " or ".join(", ".join(map(str, some)) for some in seeds)
    return f" and seed (seeds {listed}); numbers are means over seeds, ± their standard deviation"


def _infinite(names: Iterable[str]) -> str:
    extrapolated = next((name for name in names if name.startswith(INFINITE)), None)
    return f" ({extrapolated} is it without that bias)" if extrapolated else ""


def _interval_note(documents: Iterable[Results]) -> str:
    """What stands in brackets, and which metrics have nothing there."""
    rows = [row for document in documents for row in document.variants if row.status == "done"]
    measured = [(name, one) for row in rows for name, one in row.metrics.items()]
    found = [(name, one.ci95) for name, one in measured if one.value is not None]
    lacking = {name: None for name, ci95 in found if ci95 is None and not is_spread(name)}
    if not any(ci95 for _, ci95 in found):
        return " No confidence intervals." if lacking else ""
    without = f" (none for {', '.join(lacking)})" if lacking else ""
    return f" In brackets: 95 % confidence intervals{without}, of noise and not of bias."
