"""Whether a row is worth its cost: its comparisons, put into sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iec_eval.report.judgements import (
    RIVALS,
    absent,
    is_rival,
    name_and_work,
    strongest,
    why_missing,
)
from iec_eval.report.wording import (
    decimals,
    higher_is_better,
    interval_digits,
    quality_metric,
    quantity,
    times,
    with_interval,
)
from iec_eval.results import Comparison, Results, Variant
from iec_eval.study import Relation

# What a row is compared with, in the order of the sentence; of several the strongest.
_ROLES: dict[Relation, str] = {
    "base": "its base",
    "equal-cost": "its strongest equal-cost rival",
    "zero-cost": "the best callback without extra evaluations",
    "half": "the best half of the callback",
    "stacking": "its parts stacked",
    "full-precision": "the reference",
    "corrected-alike": "the reference corrected alike,",
}
_NO_RIVAL = {
    "controls off": "controls are off",
    "none to be had": "none could be had",
    "base costs as much": "the base costs as much, or less than 2 % less",
    "rivals not finished": "none has finished",
}


def verdicts(results: Results) -> list[str]:
    """One sentence for each finished row that is on trial; none where "better" is undefined.

    See :func:`row_verdicts`.
    """
    return list(row_verdicts(results).values())


def row_verdicts(results: Results) -> dict[str, str]:
    """A sentence by row: what the intervals say of it, in the metric that stands for quality.

    On trial are rows with callbacks, but for controls that judge others, and rows that stacked
    parts are compared with. Each is compared with its base and with the strongest rival of every
    kind; if it has no equal-cost rival, the sentence says why.
    """
    metric = quality_metric(results)
    upward = higher_is_better(metric, results) if metric else None
    if metric is None or upward is None:
        return {}
    rows = {row.name: row for row in results.variants if _value(row, metric) is not None}
    clerk = _Clerk(results, rows, metric, upward)
    return {name: clerk.sentence(row) for name, row in rows.items() if _on_trial(row, metric)}


def _on_trial(row: Variant, metric: str) -> bool:
    if is_rival(row):
        return False
    stacked = any(one.relation == "stacking" for one in _of(row.comparisons, metric))
    return bool(row.callbacks) or stacked


def _value(row: Variant, metric: str) -> float | None:
    found = row.metrics.get(metric)
    return found.value if found and row.status == "done" else None


def _of(comparisons: Sequence[Comparison], metric: str) -> list[Comparison]:
    return [one for one in comparisons if one.metric == metric]


class _Clerk:
    """Words the comparisons of finished rows in one metric."""

    def __init__(
        self, results: Results, rows: Mapping[str, Variant], metric: str, upward: bool
    ) -> None:
        self._results, self._rows, self._metric, self._upward = results, rows, metric, upward

    def sentence(self, row: Variant) -> str:
        """The row's whole verdict."""
        found = _of(row.comparisons, self._metric)
        clauses = [self._clause(row, one) for one in self._strongest(found)]
        if row.callbacks and not any(one.relation == "equal-cost" for one in found):
            why = why_missing(row, "equal-cost", self._results)
            reason = _NO_RIVAL.get(why, f"none could be compared in {self._metric}")
            clauses.append(f"no equal-cost rival: {reason}")
        missing = [*absent(row, self._results), *self._uncompared(row, found)]
        if missing:
            clauses.append(f"not held against {', '.join(missing)}")
        return f"{self._shown(row)}: {'; '.join(clauses)}."

    def _uncompared(self, row: Variant, found: Sequence[Comparison]) -> list[str]:
        """Finished rivals that have the metric but are no match for the row in it."""
        compared = {one.versus for one in found}
        return [
            f"{other.name} ({self._metric} is to images of other steps)"
            for other in self._rows.values()
            if found and other.judge_of.get(row.name) in RIVALS and other.name not in compared
        ]

    def _strongest(self, found: Sequence[Comparison]) -> list[Comparison]:
        """Of each kind the comparison with the best row, which is this row's least gain."""
        kinds = [[one for one in found if one.relation == relation] for relation in _ROLES]
        return [strongest(kind, self._upward) for kind in kinds if kind]

    def _clause(self, row: Variant, one: Comparison) -> str:
        other = self._rows.get(one.versus)
        against = f"{_ROLES[one.relation]} {self._shown(other) if other else one.versus}"
        if one.relation == "equal-cost" and other:
            against += name_and_work(row, other).removeprefix(other.name)
        digits = decimals(_value(each, self._metric) or 0.0 for each in (row, other) if each)
        if one.judgement in ("better", "worse"):
            return f"{one.judgement} than {against} by {self._size(one, digits)}"
        known = "not distinguishable from" if one.judgement else "without an interval, against"
        return f"{known} {against} ({with_interval(one.value, one.ci95, digits, '+')})"

    def _size(self, one: Comparison, digits: int) -> str:
        """The difference without its sign, and the interval turned the same way."""
        sign, bounds = (-1 if one.value < 0 else 1), one.ci95
        turned = None if bounds is None else (sign * bounds[0], sign * bounds[1])
        ordered = None if turned is None else (min(turned), max(turned))
        return with_interval(abs(one.value), ordered, digits)

    def _shown(self, row: Variant) -> str:
        share, found = row.cost.relative_macs, row.metrics[self._metric]
        value = found.value or 0.0
        digits = interval_digits(found.ci95, decimals([value]))
        cost = quantity(row.cost.macs_per_image) if share is None else times(share)
        return f"{row.name} ({self._metric} {value:.{digits}f} at {cost} MACs)"
