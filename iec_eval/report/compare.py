"""Rows of several runs side by side: the differences, with what the intervals of each run allow.

Images of two runs are not compared one by one: a run's results hold what its metrics came to, not
what each image contributed. So intervals of differences are those of independent measurements.
Where runs share their noise that errs on the safe side: what they share makes true differences
less uncertain than such an interval says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from iec_eval.errors import ConfigError, Incompatible, UnknownName
from iec_eval.intervals import Interval
from iec_eval.report.tables import markdown_table, markdown_text
from iec_eval.report.wording import (
    NOTHING,
    decimals,
    higher_is_better,
    judgement,
    metric_names,
    quantity,
    times,
    with_interval,
)
from iec_eval.results import (
    Judgement,
    Measurement,
    Results,
    Variant,
    require_one_protocol,
)

UNPAIRED = (
    "Intervals of differences are unpaired: each run was scored on its own, so they are those of "
    "independent measurements, and too wide rather than too narrow where runs share their noise."
)


@dataclass(frozen=True)
class Run:
    """Results under a label; ``images`` is the study's ``images`` without the count, if known."""

    label: str
    results: Results
    images: Mapping[str, Any] | None


@dataclass(frozen=True)
class Entry:
    """One metric of one row in one run, and its difference from the first run's."""

    metric: str
    row: str
    run: str
    status: str
    value: float | None
    ci95: Interval | None
    macs_per_image: float | None
    versus: str | None
    difference: float | None
    difference_ci95: Interval | None
    judgement: Judgement | None


def compare(
    runs: Sequence[Run],
    form: str,
    *,
    rows: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> str:
    """Rows of two or more runs side by side, each against the first run's, as text.

    Args:
        runs: at least two; the first is what the others are compared with.
        form: ``md`` or ``json``.
        rows: names of rows to show; all that two runs have, if there are none.
        metrics: names of metrics to show; all, if there are none.

    Raises Incompatible for runs of different protocols, image counts or, where that leaves a
    difference without meaning, seeds; UnknownName for a row or metric that no run has.
    """
    _check(runs, form)
    chosen_rows = _chosen("row", rows, _row_names(runs), _shared_rows(runs))
    known = metric_names(run.results for run in runs)
    chosen = _chosen("metric", metrics, known, known)
    entries = list(_entries(runs, chosen, chosen_rows))
    _require_seeds(runs, entries)
    if form == "json":
        return json.dumps(_as_json(runs, entries), indent=2, ensure_ascii=False)
    alone = [name for name in _row_names(runs) if name not in chosen_rows and not rows]
    return _markdown(runs, entries, alone)


def difference_interval(
    value: float, ci95: Interval | None, other: float, other_ci95: Interval | None
) -> Interval | None:
    """The 95 % interval of ``value - other`` for independent measurements with 95 % intervals.

    The distances of the limits from their values are added in quadrature, each side on its own, so
    that lopsided intervals stay so (Zou and Donner, 2008, "Construction of confidence limits about
    effect measures", equation 3). None where one interval is missing.
    """
    if ci95 is None or other_ci95 is None:
        return None
    difference = value - other
    below = math.hypot(value - ci95[0], other_ci95[1] - other)
    above = math.hypot(ci95[1] - value, other - other_ci95[0])
    return difference - below, difference + above


def _check(runs: Sequence[Run], form: str) -> None:
    if len(runs) < 2:
        raise ConfigError("compare: wanted two or more runs, got one")
    if form not in ("md", "json"):
        raise ConfigError(f"compare format {form!r}: wanted md or json")
    require_one_protocol([run.results for run in runs])
    counts = {run.label: run.results.images for run in runs}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {label}" for label, count in counts.items())
        raise Incompatible(
            f"compare: the runs have different numbers of images ({told}), and a metric such as "
            "FID depends on it; run again with one number, as in -s images.count=N"
        )


def _require_seeds(runs: Sequence[Run], entries: Sequence[Entry]) -> None:
    """Refuse differences that are the noise's: other seeds, and no interval to tell by."""
    seeds = {json.dumps(run.images, sort_keys=True) for run in runs}
    if len(seeds) == 1 and None not in [run.images for run in runs]:
        return
    blind = [e for e in entries if e.difference is not None and e.difference_ci95 is None]
    if blind:
        told = ", ".join(f"{_seed(run)} in {run.label}" for run in runs)
        metrics = ", ".join(dict.fromkeys(entry.metric for entry in blind))
        raise Incompatible(
            f"compare: the runs have different seeds ({told}) and {metrics} has no intervals, so "
            "its differences cannot be told from those of the noise; use one seed, choose other "
            "metrics with --metric, or evaluate again with intervals"
        )


def _seed(run: Run) -> str:
    if run.images is None:
        return "unknown"
    return ", ".join(f"{value}" for value in run.images.values())


def _row_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(row.name for run in runs for row in run.results.variants))


def _shared_rows(runs: Sequence[Run]) -> list[str]:
    names = [row.name for run in runs for row in run.results.variants]
    return [name for name in _row_names(runs) if names.count(name) > 1]


def _chosen(
    kind: str, wanted: Sequence[str], known: Sequence[str], otherwise: Sequence[str]
) -> list[str]:
    for name in wanted:
        if name not in known:
            raise UnknownName(kind, name, known)
    return list(wanted or otherwise)


def _entries(runs: Sequence[Run], metrics: Sequence[str], rows: Sequence[str]) -> Iterator[Entry]:
    for metric in metrics:
        upward = higher_is_better(metric, *(run.results for run in runs))
        for name in rows:
            found = [
                next((r for r in run.results.variants if r.name == name), None) for run in runs
            ]
            first = _measurement(found[0], metric)
            for place, (run, row) in enumerate(zip(runs, found, strict=True)):
                if row is not None:
                    yield _entry(
                        metric, upward, row, run.label, runs[0].label, first if place else None
                    )


def _measurement(row: Variant | None, metric: str) -> Measurement | None:
    # a row that is not finished has other images, or none
    found = row.metrics.get(metric) if row is not None and row.status == "done" else None
    return None if found is None or found.value is None else found


def _entry(
    metric: str,
    upward: bool | None,
    row: Variant,
    run: str,
    versus: str,
    first: Measurement | None,
) -> Entry:
    found = _measurement(row, metric)
    value, ci95 = (None, None) if found is None else (found.value, found.ci95)
    change, bounds = None, None
    if value is not None and first is not None and first.value is not None:
        change = value - first.value
        bounds = difference_interval(value, ci95, first.value, first.ci95)
    return Entry(
        metric=metric,
        row=row.name,
        run=run,
        status=row.status,
        value=value,
        ci95=ci95,
        macs_per_image=row.cost.macs_per_image if row.status == "done" else None,
        versus=None if change is None else versus,
        difference=change,
        difference_ci95=bounds,
        judgement=judgement(bounds, upward),
    )


def _as_json(runs: Sequence[Run], entries: Sequence[Entry]) -> dict[str, Any]:
    described = [
        {"run": run.label, "study": run.results.study, "count": run.results.images}
        | {"images": None if run.images is None else dict(run.images)}
        for run in runs
    ]
    return {
        "runs": described,
        "protocol": runs[0].results.protocol,
        "paired": False,
        "entries": [asdict(entry) for entry in entries],
    }


def _markdown(runs: Sequence[Run], entries: Sequence[Entry], alone: Sequence[str]) -> str:
    blocks = []
    for metric in dict.fromkeys(entry.metric for entry in entries):
        blocks.append(_block(runs, [entry for entry in entries if entry.metric == metric]))
    notes = [f"{runs[0].results.images:,} images per row; differences are from {runs[0].label}."]
    if any(entry.difference_ci95 for entry in entries):
        notes.append(UNPAIRED)
    if any(entry.difference is not None and not entry.difference_ci95 for entry in entries):
        notes.append("Differences without an interval may be noise.")
    if alone:
        notes.append(f"In one run only: {', '.join(alone)}.")
    return "\n\n".join([*blocks, *map(markdown_text, notes)])


def _block(runs: Sequence[Run], entries: Sequence[Entry]) -> str:
    """One metric: a row of the table per row and run, the first run's above the others'."""
    metric = entries[0].metric
    digits = decimals(entry.value for entry in entries if entry.value is not None)
    base = {entry.row: entry.macs_per_image for entry in entries if entry.run == runs[0].label}
    lines = [["row", "run", metric, "difference", "verdict", "MACs/image", "relative MACs"]]
    for entry in entries:
        macs, first = entry.macs_per_image, base.get(entry.row)
        lines.append(
            [
                entry.row,
                entry.run + ("" if entry.status == "done" else f" [{entry.status}]"),
                _shown(entry.value, entry.ci95, digits),
                _shown(entry.difference, entry.difference_ci95, digits, "+"),
                entry.judgement or NOTHING,
                quantity(macs),
                times(macs / first if macs is not None and first else None),
            ]
        )
    return markdown_table(lines, words=2)


def _shown(value: float | None, bounds: Interval | None, digits: int, sign: str = "") -> str:
    return NOTHING if value is None else with_interval(value, bounds, digits, sign)
