"""Rows against the rows that judge them: each difference with its interval, and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from iec_eval.intervals import Estimate, Estimates, simultaneous
from iec_eval.report.wording import higher_is_better, judgement
from iec_eval.results import (
    Comparison,
    Measurement,
    Results,
    Variant,
    inferred_bases,
)
from iec_eval.study import Relation


def with_comparisons(results: Results, estimates: Estimates) -> Results:
    """Fill in the intervals of differences, and each finished row's comparisons with its judges.

    ``estimates`` are those the rows were scored with. A row is compared with every row that names
    it in its ``judge_of``, and with its base (:func:`inferred_bases`), in every metric that both
    have. Intervals against several rows of one relation, rivals of equal cost say, hold for all of
    them together, so that the strongest may be picked by looking at them.
    """
    judges = judges_of(results)
    variants = [
        row.model_copy(
            update={
                "metrics": _with_intervals(row, estimates),
                "comparisons": list(_comparisons(row, judges[row.name], results, estimates)),
            }
        )
        for row in results.variants
    ]
    return results.model_copy(update={"variants": variants})


def judges_of(results: Results) -> dict[str, dict[str, Relation]]:
    """For each row the rows it is compared with, and what each is to it; the base first."""
    bases = inferred_bases(results)
    found: dict[str, dict[str, Relation]] = {}
    for row in results.variants:
        base = bases.get(row.name)
        found[row.name] = {} if base is None else {base: "base"}
        for other in results.variants:
            if row.name in other.judge_of:
                found[row.name].setdefault(other.name, other.judge_of[row.name])
    return found


def _with_intervals(row: Variant, estimates: Estimates) -> dict[str, Measurement]:
    return {name: _with_interval(row, name, estimates) for name in row.metrics}


def _with_interval(row: Variant, name: str, estimates: Estimates) -> Measurement:
    measured = row.metrics[name]
    if measured.delta is None or measured.delta.ci95 is not None:
        return measured
    gap = _difference(estimates, name, row.name, measured.delta.versus)
    found = {"ci95": gap.interval(), "spread": gap.spread()} if gap else {}
    return measured.model_copy(update={"delta": measured.delta.model_copy(update=found)})


def _comparisons(
    row: Variant,
    judges: Mapping[str, Relation],
    results: Results,
    estimates: Estimates,
) -> Iterator[Comparison]:
    rows = {other.name: other for other in results.variants}
    finished = {n: r for n, r in judges.items() if {row.status, rows[n].status} == {"done"}}
    counts = Counter(finished.values())
    for versus, relation in finished.items():
        level = simultaneous(counts[relation])
        for metric in row.metrics:
            gap = _difference(estimates, metric, row.name, versus)
            if gap is not None:
                interval = gap.interval(level)
                yield Comparison(
                    versus=versus,
                    relation=relation,
                    metric=metric,
                    value=gap.value,
                    ci95=interval,
                    level=None if interval is None else level,
                    judgement=judgement(interval, higher_is_better(metric, results)),
                )


def _difference(estimates: Estimates, metric: str, row: str, versus: str) -> Estimate | None:
    one, other = (estimates.get(name, {}).get(metric) for name in (row, versus))
    return None if one is None or other is None else one - other
