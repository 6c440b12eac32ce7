"""Whether a row with a callback is worth its cost: compared with rows that cost no more."""

from __future__ import annotations

from collections.abc import Mapping

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


def verdicts(results: Results, directions: Mapping[str, bool] | None = None) -> list[str]:
    """One sentence for each finished row with callbacks; none where "better" is undefined.

    The question is whether the same multiply-accumulates are better spent without the callback.
    """
    metric = quality_metric(results)
    upward = higher_is_better(metric, directions) if metric else None
    if metric is None or upward is None:
        return []
    rows = [row for row in results.variants if _value(row, metric) is not None and _macs(row) > 0]
    return [_verdict(row, rows, metric, upward) for row in rows if row.callbacks]


def _value(row: Variant, metric: str) -> float | None:
    found = row.metrics.get(metric)
    return found.value if found and row.status == "done" else None


def _macs(row: Variant) -> float:
    return row.cost.macs_per_image or 0.0


def _verdict(row: Variant, rows: list[Variant], metric: str, upward: bool) -> str:
    limit = _macs(row) * _SAME_COST
    rivals = [other for other in rows if not other.callbacks and _macs(other) <= limit]
    if not rivals:
        return f"{_shown(row, metric)}: no row without callbacks costs as little: untested."
    best = max(rivals, key=lambda rival: _score(rival, metric, upward))
    if _score(best, metric, upward) >= _score(row, metric, upward):
        return f"{_shown(row, metric)}: no better than {_shown(best, metric)} at no more cost."
    nearest = max(rivals, key=_macs)
    verdict = f"{_shown(row, metric)}: better than every row without callbacks that costs no more"
    if _macs(nearest) < _FAR_BELOW * _macs(row):
        return f"{verdict}, but the nearest of them costs only {_cost(nearest)}: no equal rival."
    return f"{verdict}; the nearest is {_shown(nearest, metric)}."


def _score(row: Variant, metric: str, upward: bool) -> float:
    value = _value(row, metric) or 0.0
    return value if upward else -value


def _shown(row: Variant, metric: str) -> str:
    value = _value(row, metric) or 0.0
    return f"{row.name} ({metric} {value:.{decimals([value])}f} at {_cost(row)})"


def _cost(row: Variant) -> str:
    share = row.cost.relative_macs
    return f"{quantity(row.cost.macs_per_image)} MACs" if share is None else f"{times(share)} MACs"
