"""Rows of several runs side by side: the differences, with what the intervals of each run allow.

Runs that start from the same noise and keep what each image contributed to their numbers
(``influence.safetensors``) are compared image by image. Otherwise intervals of differences are
those of independent measurements, which runs of other noise are. Where runs share their noise that
errs on the safe side: what they share makes true differences less uncertain than such an interval
says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from iec_eval.errors import ConfigError, Incompatible, UnknownName
from iec_eval.intervals import Estimate, Interval
from iec_eval.report.experiments import Run, apart, noise_of, one_noise, same_experiment
from iec_eval.report.markup import markdown_table, markdown_text
from iec_eval.report.wording import (
    NOTHING,
    arrow,
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
    Variant,
    require_one_protocol,
)
from iec_eval.runs import INFLUENCE

PAIRED = "Intervals of differences are paired: the runs start from the same noise, image by image"
UNPAIRED = (
    "Intervals of differences are unpaired, those of independent measurements, and too wide rather "
    "than too narrow, as the runs share their noise: there is no fitting "
    f"{INFLUENCE} (evaluate again)"
)
INDEPENDENT = (
    "Intervals of differences are unpaired, those of independent measurements: right for runs of "
    "other noise, and too wide rather than too narrow for runs that share theirs"
)
SAME = "same experiment"


@dataclass(frozen=True)
class Entry:
    """One metric of one row in one run, and its difference from the first run's.

    ``same_experiment`` says whether all that decides the images is as in the first run, noise
    included; a difference is then not the noise's, and has no interval. None where the first run
    has no such row. ``paired`` says whether the interval of the difference counts what the images
    of both have in common; None where there is no interval. ``without`` says why there is no
    difference, or none with an interval.
    """

    metric: str
    row: str
    run: str
    status: str
    error: str | None
    fingerprint: str
    same_experiment: bool | None
    value: float | None
    ci95: Interval | None
    macs_per_image: float | None
    versus: str | None
    difference: float | None
    difference_ci95: Interval | None
    paired: bool | None
    judgement: Judgement | None
    without: str | None


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

    Raises Incompatible for runs of different protocols or image counts, and for runs without a row
    in common; ConfigError for a run given twice; UnknownName for a row or metric that no run has.
    """
    _check(runs, form)
    chosen_rows = _chosen("row", rows, _row_names(runs), _shared_rows(runs))
    known = metric_names(run.results for run in runs)
    chosen = _chosen("metric", metrics, known, known)
    entries = list(_entries(runs, chosen, chosen_rows))
    if form == "json":
        return json.dumps(_as_json(runs, entries), indent=2, ensure_ascii=False)
    left_out = [name for name in _row_names(runs) if name not in chosen_rows and not rows]
    return _markdown(runs, entries, left_out)


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
    labels = [run.label for run in runs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"compare: {', '.join(twice)} is given twice")
    require_one_protocol([run.results for run in runs], labels)
    counts = {run.label: run.results.images for run in runs}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {label}" for label, count in counts.items())
        raise Incompatible(
            f"compare: the runs have different numbers of images ({told}), and a metric such as "
            "FID depends on it; run again with one number, as in -s images.count=N"
        )
    if not _shared_rows(runs):
        told = "; ".join(f"{run.label}: {_listed(run.results.variants)}" for run in runs)
        raise Incompatible(f"compare: no two runs have a row of the same name ({told})")


def _listed(rows: Sequence[Variant]) -> str:
    return ", ".join(row.name for row in rows)


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
            for run in runs:
                row = run.row(name)
                if row is not None:
                    alone = _alone(metric, row, run)
                    yield alone if run is runs[0] else _against(alone, row, runs[0], run, upward)


def _alone(metric: str, row: Variant, run: Run) -> Entry:
    found = _measurement(row, metric)
    return Entry(
        metric=metric,
        row=row.name,
        run=run.label,
        status=row.status,
        error=row.error,
        fingerprint=row.fingerprint,
        same_experiment=None,
        value=None if found is None else found.value,
        ci95=None if found is None else found.ci95,
        macs_per_image=row.cost.macs_per_image if row.status == "done" else None,
        versus=None,
        difference=None,
        difference_ci95=None,
        paired=None,
        judgement=None,
        without=None,
    )


def _measurement(row: Variant, metric: str) -> Measurement | None:
    # a row that is not finished has other images, or none
    found = row.metrics.get(metric) if row.status == "done" else None
    return None if found is None or found.value is None else found


def _against(entry: Entry, row: Variant, first: Run, run: Run, upward: bool | None) -> Entry:
    """The entry with its difference from the first run's row, and what may be said of it."""
    other = first.row(entry.row)
    if other is None:
        return replace(entry, without=f"not in {first.label}")
    base = _alone(entry.metric, other, first)
    same = same_experiment(row, other)
    entry = replace(entry, same_experiment=same)
    if entry.value is None or base.value is None:
        lacking = f"no value in {run.label if entry.value is None else first.label}"
        return replace(entry, without=lacking)
    gap = _paired_difference(entry, first, run)
    bounds = gap.interval() if gap else None
    paired = bounds is not None
    bounds = bounds or difference_interval(entry.value, entry.ci95, base.value, base.ci95)
    if bounds is None and not one_noise([first, run]):
        return replace(entry, without="no interval, and other noise")
    without = SAME if same else None if bounds else "no interval"
    entry = replace(entry, versus=first.label, difference=entry.value - base.value, without=without)
    if without:
        return entry
    judged = judgement(bounds, upward)
    return replace(entry, difference_ci95=bounds, paired=paired, judgement=judged)


def _paired_difference(entry: Entry, first: Run, run: Run) -> Estimate | None:
    """The row's number less the first run's, image by image; None where the runs do not tell."""
    known = [one.estimates[entry.row] for one in (run, first) if one.estimates is not None]
    if len(known) < 2 or not one_noise([first, run]):
        return None
    here, there = (of_row.get(entry.metric) for of_row in known)
    return here - there if here and there else None


def _as_json(runs: Sequence[Run], entries: Sequence[Entry]) -> dict[str, Any]:
    described = [
        {"run": run.label, "study": run.results.study, "count": run.results.images}
        | {"images": noise_of(run)}
        | {"apart": {e: told for e in _rows(entries) if (told := apart(e, runs[0], run))}}
        for run in runs
    ]
    return {
        "runs": described,
        "protocol": runs[0].results.protocol,
        "entries": [asdict(entry) for entry in entries],
    }


def _rows(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.row for entry in entries))


def _markdown(runs: Sequence[Run], entries: Sequence[Entry], left_out: Sequence[str]) -> str:
    metrics = dict.fromkeys(entry.metric for entry in entries)
    blocks = [_block(runs, [e for e in entries if e.metric == metric]) for metric in metrics]
    first = runs[0].label
    notes = [
        f"{runs[0].results.images:,} images per row; differences are from {first}.",
        *_interval_notes(runs, entries),
        *_experiment_notes(runs, entries),
        *_unfinished(entries),
        *_left_out(runs, left_out),
    ]
    return "\n\n".join([*blocks, *map(markdown_text, notes)])


def _interval_notes(runs: Sequence[Run], entries: Sequence[Entry]) -> list[str]:
    """What the intervals are, and why a difference has none or is not judged."""
    notes = []
    if any(entry.paired for entry in entries):
        notes.append(f"{PAIRED}{_where(runs, entries, paired=True)}.")
    if any(entry.paired is False for entry in entries):
        shared = f"{UNPAIRED}{_where(runs, entries, paired=False)}."
        notes.append(shared if one_noise(runs) else f"{INDEPENDENT} ({_noises(runs)}).")
    for metric in _metrics(entries, "no interval"):
        notes.append(f"{metric} has no interval: its differences may be noise, and are not judged.")
    for metric in _metrics(entries, "no interval, and other noise"):
        notes.append(
            f"{metric} has no interval, and the runs do not share their noise: what would be noise "
            "in its differences cannot be told, so there are none."
        )
    undirected = [e.metric for e in entries if e.difference_ci95 and e.judgement is None]
    for metric in dict.fromkeys(undirected):
        notes.append(f"{metric} is not judged: nothing says which way it improves.")
    return notes


def _where(runs: Sequence[Run], entries: Sequence[Entry], *, paired: bool) -> str:
    """Which runs' differences are ``paired`` or are not; "" where that holds for all."""
    told = {entry.run for entry in entries if entry.paired is paired}
    if all(entry.paired in (paired, None) for entry in entries):
        return ""
    return f" ({', '.join(run.label for run in runs if run.label in told)})"


def _metrics(entries: Sequence[Entry], without: str) -> list[str]:
    return list(dict.fromkeys(e.metric for e in entries if e.without == without))


def _noises(runs: Sequence[Run]) -> str:
    told = [(run.label, noise_of(run)) for run in runs]
    return "; ".join(f"{label}: {_noise(images)}" for label, images in told)


def _noise(images: Mapping[str, Any] | None) -> str:
    if images is None:
        return "unknown, no manifest.json"
    return ", ".join(f"{key} {value}" for key, value in images.items() if value is not None)


def _experiment_notes(runs: Sequence[Run], entries: Sequence[Entry]) -> list[str]:
    """Which rows are the same under their name, and how the others differ."""
    notes = []
    for run in runs[1:]:
        reasons: dict[str, list[str]] = {}
        for name in _rows(entries):
            reasons.setdefault(apart(name, runs[0], run), []).append(name)
        reasons.pop("", None)
        notes += [
            f"Other experiments in {runs[0].label} and {run.label} under one name: "
            f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'} in {told}."
            for told, names in reasons.items()
        ]
    if any(entry.same_experiment for entry in entries):
        notes.append(
            f"{SAME}: model, sampler, parts and noise agree, so a difference is not noise, but the "
            "machine's or that of the programs' versions."
        )
    return notes


def _unfinished(entries: Sequence[Entry]) -> list[str]:
    """Why rows are not done; they are in no difference."""
    told = {
        (e.row, e.run): f"{e.row} in {e.run} [{e.status}]: {e.error or 'not every image is there'}"
        for e in entries
        if e.status != "done"
    }
    return list(told.values())


def _left_out(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    found = [(run.label, [name for name in names if run.row(name)]) for run in runs]
    return [f"Only in {label}: {', '.join(some)}." for label, some in found if some]


def _block(runs: Sequence[Run], entries: Sequence[Entry]) -> str:
    """One metric: a row of the table per row and run, the first run's above the others'."""
    metric, first = entries[0].metric, runs[0]
    digits = decimals(entry.value for entry in entries if entry.value is not None)
    base = {entry.row: entry.macs_per_image for entry in entries if entry.run == first.label}
    arrowed = metric + arrow(higher_is_better(metric, *(run.results for run in runs)))
    lines = [
        ["row", "run", arrowed, "difference", "verdict", "MACs/image", f"MACs vs {first.label}"]
    ]
    for entry in entries:
        macs, least = entry.macs_per_image, base.get(entry.row)
        lines.append(
            [
                entry.row,
                entry.run + ("" if entry.status == "done" else f" [{entry.status}]"),
                _shown(entry.value, entry.ci95, digits),
                _shown(entry.difference, entry.difference_ci95, digits, "+"),
                entry.judgement or (SAME if entry.without == SAME else NOTHING),
                quantity(macs),
                times(macs / least if macs is not None and least else None),
            ]
        )
    return markdown_table(lines, words=2)


def _shown(value: float | None, bounds: Interval | None, digits: int, sign: str = "") -> str:
    return NOTHING if value is None else with_interval(value, bounds, digits, sign)
