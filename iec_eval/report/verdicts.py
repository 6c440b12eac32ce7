"""Whether a row with a callback is worth its cost: compared with rows that cost no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iec_eval.report.wording import (
    decimals,
    higher_is_better,
    quality_metric,
    quantity,
    times,
)
from iec_eval.results import Results, Variant

_SAME_COST = 1.02  # costs this close are equal
_FAR_BELOW = 0.9  # a rival cheaper than this share is no equal-cost rival


@dataclass(frozen=True)
class _Entry:
    """A finished row: its quality (larger is better), its cost, and both in words."""

    shown: str
    cost: str
    corrected: bool
    quality: float
    macs: float


def verdicts(results: Results, directions: Mapping[str, bool] | None = None) -> list[str]:
    """One sentence for each finished row with callbacks; none where "better" is undefined.

    The question is whether the same multiply-accumulates are better spent without the callback.
    """
    metric = quality_metric(results)
    upward = higher_is_better(metric, directions) if metric else None
    if metric is None or upward is None:
        return []
    found = [(row, value) for row in results.variants if (value := _value(row, metric)) is not None]
    digits = decimals(value for _, value in found)
    entries = [
        _entry(row, f"{metric} {value:.{digits}f}", value if upward else -value)
        for row, value in found
        if row.cost.macs_per_image
    ]
    return [_verdict(entry, entries) for entry in entries if entry.corrected]


def _value(row: Variant, metric: str) -> float | None:
    found = row.metrics.get(metric)
    return found.value if found and row.status == "done" else None


def _entry(row: Variant, measured: str, quality: float) -> _Entry:
    share = row.cost.relative_macs
    cost = f"{quantity(row.cost.macs_per_image) if share is None else times(share)} MACs"
    shown = f"{row.name} ({measured} at {cost})"
    return _Entry(shown, cost, bool(row.callbacks), quality, row.cost.macs_per_image or 0.0)


def _verdict(entry: _Entry, entries: Sequence[_Entry]) -> str:
    limit = entry.macs * _SAME_COST
    rivals = [other for other in entries if not other.corrected and other.macs <= limit]
    if not rivals:
        return f"{entry.shown}: untested, no row without callbacks costs as little."
    best = max(rivals, key=lambda rival: rival.quality)
    if best.quality >= entry.quality:
        return f"{entry.shown}: no better than {best.shown}, which costs no more."
    nearest = max(rivals, key=lambda rival: rival.macs)
    verdict = f"{entry.shown}: better than every row without callbacks that costs no more"
    if nearest.macs < _FAR_BELOW * entry.macs:
        return f"{verdict}, but those cost {nearest.cost} at most: no rival of equal cost."
    return f"{verdict}; the nearest is {nearest.shown}."
