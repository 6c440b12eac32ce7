"""Results as a table: Markdown and LaTeX to read, CSV and JSON to compute with.

A number never stands without its cost: the columns after the metrics are what an image took.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from iec_eval.errors import ConfigError
from iec_eval.report.judgements import (
    AGAINST,
    Against,
    absent,
    difference,
    has_verdicts,
    held_against,
    judged,
    not_to_be_had,
)
from iec_eval.report.markup import latex_text, markdown_table, markdown_text
from iec_eval.report.records import Row, as_csv, records, rows_of
from iec_eval.report.wording import (
    NOTHING,
    arrow,
    decimals,
    higher_is_better,
    interval_digits,
    is_fid,
    metric_names,
    pairings,
    plus_minus,
    quality_metric,
    quantity,
    reading_note,
    significant,
    times,
    with_interval,
)
from iec_eval.results import Cost, Measurement, Results, Variant, require_one_protocol

_NAMES = ("study", "variant")  # headers of the columns that hold words


@dataclass(frozen=True)
class Grid:
    """A table as text: one row of ``cells`` per entry of ``rows``, under ``headers``.

    ``reading`` says what the numbers rest on, ``notes`` explain what is in the cells.
    """

    headers: list[str]
    cells: list[list[str]]
    rows: list[Row]
    reading: str
    notes: list[str]

    def footnotes(self) -> list[str]:
        """Everything that belongs under the table, also why a row is not done."""
        several = len({id(row.results) for row in self.rows}) > 1
        endings = [
            (f"{row.results.study}, " if several else "") + why
            for row in self.rows
            if (why := ending(row.variant))
        ]
        return [self.reading, *self.notes, *endings]


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[Row], str]


def table(results: Sequence[Results], form: str) -> str:
    """The rows of one or more results as text ending in a newline.

    Args:
        results: what to show, in this order.
        form: ``md``, ``csv``, ``json`` or ``latex``.

    Raises ConfigError for another form, Incompatible for results of different protocols.
    """
    require_one_protocol(results)
    if form == "md":
        return _markdown(grid(results))
    if form == "latex":
        return _latex(grid(results))
    if form == "csv":
        return as_csv(records(results))
    if form == "json":
        return json.dumps(records(results), indent=2, ensure_ascii=False) + "\n"
    raise ConfigError(f"table format {form!r}: wanted one of md, csv, json, latex")


def grid(results: Sequence[Results]) -> Grid:
    """The table as text cells, for any form that people read."""
    rows = rows_of(results)
    columns = [
        *([_Column("study", lambda row: row.results.study)] if len(results) > 1 else []),
        _Column("variant", lambda row: variant_label(row.variant)),
        *(_metric_column(name, rows) for name in metric_names(results)),
        *_verdict_columns(rows),
        *_cost_columns(rows),
        *([_Column("paper", _paper)] if any(map(_has_remarks, rows)) else []),
    ]
    cells = [[column.cell(row) for column in columns] for row in rows]
    headers = [column.header for column in columns]
    notes = [*_change_note(rows), *remarks(results), *_held_notes(results)]
    return Grid(headers, cells, rows, reading_note(results), notes)


def variant_label(variant: Variant) -> str:
    """A row's name with the marks that qualify its numbers."""
    simulated = " (simulated)" if variant.simulated else ""
    status = "" if variant.status == "done" else f" [{variant.status}]"
    return variant.name + simulated + status


def _metric_column(name: str, rows: Sequence[Row]) -> _Column:
    documents = [row.results for row in rows]
    counts = {document.images for document in documents}
    digits = decimals(_values(name, rows))
    header = name + (f" (N={min(counts)})" if is_fid(name) and len(counts) == 1 else "")

    def cell(row: Row) -> str:
        text = _measured(row.measurement(name), digits)
        return text if text == NOTHING or not is_fid(name) else text + _count(row, len(counts))

    return _Column(header + arrow(higher_is_better(name, *documents)), cell)


def _count(row: Row, counts: int) -> str:
    """The number of images of one row, where the header does not tell it."""
    if row.variant.status == "partial":
        return f" (N<{row.results.images})"
    return f" (N={row.results.images})" if counts > 1 else ""


def _values(name: str, rows: Sequence[Row]) -> list[float]:
    found = [row.measurement(name) for row in rows]
    return [one.value for one in found if one is not None and one.value is not None]


def _measured(found: Measurement | None, digits: int) -> str:
    if found is None or found.value is None:
        return NOTHING
    text = with_interval(found.value, found.ci95, digits)
    text += plus_minus(found.spread, interval_digits(found.ci95, digits))
    delta = found.delta
    if delta is None:
        return text
    change = with_interval(delta.value, delta.ci95, digits, "+")
    return f"{text} ({change}{plus_minus(delta.spread, interval_digits(delta.ci95, digits))})"


def _verdict_columns(rows: Sequence[Row]) -> list[_Column]:
    if not has_verdicts([row.variant for row in rows]):
        return []
    return [
        _Column(header, partial(_verdict, against=against)) for against, header in AGAINST.items()
    ]


def _verdict(row: Row, against: Against) -> str:
    found = judged(row.variant, against, row.results)
    if found.comparison is None:
        return found.word or NOTHING
    digits = decimals(_values(found.comparison.metric, [row]))
    return f"{found.word} ({difference(found.comparison, digits)})"


def _held_notes(results: Sequence[Results]) -> list[str]:
    """Which rival each verdict is against: the cells have no room for it."""
    found = held_against(results, "equal-cost")
    return [f"{AGAINST['equal-cost']}: {found}."] if found else []


def _cost_column(header: str, show: Callable[[Cost], str]) -> _Column:
    def cell(row: Row) -> str:
        return NOTHING if row.variant.status == "failed" else show(row.variant.cost)

    return _Column(header, cell)


def _evaluations(cost: Cost) -> str:
    if cost.evaluations_full is None:
        return NOTHING
    cached = f" + {cost.evaluations_cached:g} cached" if cost.evaluations_cached else ""
    return f"{cost.evaluations_full:g}{cached}"


def _seconds(cost: Cost) -> str:
    if cost.seconds_per_image is None:
        return NOTHING
    share = "" if cost.relative_seconds is None else f" ({times(cost.relative_seconds)})"
    return significant(cost.seconds_per_image) + share


def _cost_columns(rows: Sequence[Row]) -> list[_Column]:
    """Bit operations say more than MACs only where they are not in step with them."""
    shares = {
        (row.variant.cost.relative_macs, row.variant.cost.relative_bit_operations) for row in rows
    }
    differ = any(bits is not None and bits != macs for macs, bits in shares)
    bits = _cost_column("relative bit operations", lambda c: times(c.relative_bit_operations))
    return [
        _cost_column("evaluations/image", _evaluations),
        _cost_column("MACs/image", lambda cost: quantity(cost.macs_per_image)),
        _cost_column("relative MACs", lambda cost: times(cost.relative_macs)),
        *([bits] if differ else []),
        _cost_column("seconds/image", _seconds),
        _cost_column("weights", lambda cost: quantity(cost.weight_bytes, "B")),
    ]


def _has_remarks(row: Row) -> bool:
    return bool(row.variant.paper or row.variant.doubt)


def _paper(row: Row) -> str:
    reported = row.variant.paper or {}
    text = ", ".join(f"{name} {value:g}" for name, value in reported.items())
    if not row.variant.doubt:
        return text or NOTHING
    return f"{text or NOTHING} (doubtful)"


def _change_note(rows: Sequence[Row]) -> list[str]:
    bases = _bases(rows)
    if not bases:
        return []
    return [f"In parentheses after a metric: its change against another row ({bases})."]


def remarks(results: Sequence[Results]) -> list[str]:
    """What must be known to read the rows: costs, simulated arithmetic, doubts, verdicts."""
    rows = rows_of(results)
    notes = []
    if any(row.variant.callbacks for row in rows):
        notes.append("Callbacks cost extra evaluations: compare rows at equal relative MACs.")
    if any(row.variant.simulated for row in rows):
        notes.append(
            "(simulated): the saved arithmetic is still done, so seconds do not show the saving."
        )
    notes += _doubts(rows)
    if any(row.variant.comparisons for row in rows):
        metrics = dict.fromkeys(filter(None, map(quality_metric, results)))
        notes.append(
            f"Verdicts are on {' and '.join(metrics)}: a row is not distinguishable from another "
            "where the 95 % interval of their difference holds 0."
        )
    return notes + [note for row in rows for note in _fewer_rivals(row)]


def _fewer_rivals(row: Row) -> Iterator[str]:
    """A note on a row that is held against fewer rivals than it should be, and why."""
    missing = absent(row.variant, row.results)
    if missing:
        reasons = "".join(f" {one}." for one in not_to_be_had(row.variant))
        yield f"{row.variant.name} is not held against {', '.join(missing)}.{reasons}"


def _doubts(rows: Sequence[Row]) -> list[str]:
    """A note per reason, with the rows it concerns."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.variant.doubt:
            reasons.setdefault(row.variant.doubt, []).append(row.variant.name)
    return [f"(doubtful), {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _bases(rows: Sequence[Row]) -> str:
    return pairings(
        (row.variant.name, found.delta.versus)
        for row in rows
        if row.variant.status != "failed"
        for found in row.variant.metrics.values()
        if found.delta is not None
    )


def ending(variant: Variant) -> str:
    """Why a row is not done, or lacks a metric; or nothing."""
    if variant.status == "done":
        return f"{variant.name}: {variant.error}" if variant.error else ""
    return f"{variant.name} [{variant.status}]: {variant.error or 'not every image is there'}"


def _markdown(grid: Grid) -> str:
    words = sum(header in _NAMES for header in grid.headers)
    body = markdown_table([grid.headers, *grid.cells], words=words)
    return "\n\n".join([body, *map(markdown_text, grid.footnotes())]) + "\n"


def _latex(grid: Grid) -> str:
    lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (grid.headers, *grid.cells)]
    alignment = "".join("l" if header in _NAMES else "r" for header in grid.headers)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {{\footnotesize {latex_text(note)}}}" for note in grid.footnotes()),
            "",
        ]
    )
