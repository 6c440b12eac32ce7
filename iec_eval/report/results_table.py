"""The table of results as a page shows it: each cell's text, what it sorts by, and its notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from iec_eval.report.judgements import (
    AGAINST,
    RELATIONS,
    Against,
    comparisons,
    difference,
    has_verdicts,
    judged,
    name_and_work,
    sentence,
)
from iec_eval.report.wording import (
    NOTHING,
    arrow,
    decimals,
    higher_is_better,
    interval,
    interval_digits,
    is_fid,
    metric_names,
    plus_minus,
    quality_metric,
    quantity,
    significant,
    times,
    with_interval,
)
from iec_eval.results import Cost, Results, Variant


@dataclass(frozen=True)
class Cell:
    """``text`` over ``sub``; ``key`` is what the column sorts by, None sorts last.

    ``tone`` is the judgement that colours the text, ``tip`` what hovering shows.
    """

    text: str = NOTHING
    sub: str = ""
    key: float | str | None = None
    tone: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Column:
    """A heading, its unit or remark, and the cell of a row; ``wide`` ones hold words."""

    header: str
    cell: Callable[[Variant], Cell]
    sub: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """A row: its number in the study, its marks, its cells; or why it has none."""

    number: int
    variant: Variant
    marks: list[str]
    cells: list[Cell] = field(default_factory=list)

    @property
    def excuse(self) -> str:
        """Why the row is not done, or lacks a metric."""
        if self.variant.error or self.variant.status == "done":
            return self.variant.error or ""
        return "not every image is there"


@dataclass(frozen=True)
class Compared:
    """One comparison in words."""

    name: str
    versus: str
    relation: str
    metric: str
    difference: str
    judgement: str


def columns(results: Results) -> list[Column]:
    """Quality first, then its verdicts, the paper's, what it costs, and the other metrics."""
    rows = [row for row in results.variants if row.status != "failed"]
    quality = quality_metric(results)
    others = [name for name in metric_names([results]) if name != quality]
    return [
        *([] if quality is None else [_metric(quality, results)]),
        *(_verdicts(results) if has_verdicts(results.variants) else []),
        *([Column("paper", _paper, wide=True)] if any(r.paper or r.doubt for r in rows) else []),
        *_costs(rows),
        *(_metric(name, results) for name in others),
    ]


def lines(results: Results, shown: Sequence[Column]) -> list[Line]:
    """Every row; a failed one, or one without any number, has no cells."""
    found = []
    for number, row in enumerate(results.variants, 1):
        empty = row.status == "failed" or (row.status == "partial" and not row.metrics)
        cells = [] if empty else [column.cell(row) for column in shown]
        found.append(Line(number, row, _marks(row), cells))
    return found


def compared(results: Results) -> list[Compared]:
    """Every comparison between finished rows, those outside the verdicts included."""
    return [
        Compared(
            row.name,
            one.versus,
            RELATIONS[one.relation],
            one.metric,
            difference(one, decimals([one.value])),
            one.judgement or "not judged",
        )
        for row in results.variants
        for one in comparisons(row, results)
    ]


def _marks(row: Variant) -> list[str]:
    status = [] if row.status == "done" else [row.status]
    control = ["control"] if row.control else []
    return [*status, *control, *(["simulated"] if row.simulated else [])]


def _metric(name: str, results: Results) -> Column:
    values = [
        found.value
        for row in results.variants
        if row.status != "failed" and (found := row.metrics.get(name)) and found.value is not None
    ]
    count = f"N={results.images}" if is_fid(name) else ""
    header = name + arrow(higher_is_better(name, results))
    return Column(header, partial(_measured, name, results.images, decimals(values)), count)


def _measured(name: str, images: int, digits: int, row: Variant) -> Cell:
    found = row.metrics.get(name)
    if found is None or found.value is None:
        return Cell()
    own, tip = interval_digits(found.ci95, digits), ""
    if found.delta is not None:
        change = with_interval(found.delta.value, found.delta.ci95, digits, "+")
        tip = f"{change} against {found.delta.versus}"
        spread = found.delta.spread
        tip += f", each seed's difference{plus_minus(spread, own)}" if spread is not None else ""
    fewer = f"N<{images}" if row.status == "partial" and is_fid(name) else ""
    sub = f"{fewer}\n{interval(found.ci95, own).strip()}".strip()
    text = f"{found.value:.{own}f}{plus_minus(found.spread, own)}"
    return Cell(text, sub, found.value, tip=tip)


def _paper(row: Variant) -> Cell:
    reported = row.paper or {}
    text = ", ".join(f"{name} {value:g}" for name, value in reported.items())
    key = next(iter(reported.values()), None)
    if not row.doubt:
        return Cell(text, key=key)
    return Cell(text, "doubtful", key, tip=row.doubt)


def _verdicts(results: Results) -> list[Column]:
    on = f"on {quality_metric(results)}"
    return [
        Column(header, partial(_verdict, against, results), on, wide=True)
        for against, header in AGAINST.items()
    ]


def _verdict(against: Against, results: Results, row: Variant) -> Cell:
    found = judged(row, against, results)
    one = found.comparison
    if one is None:
        return Cell(found.word, tone="missing")
    digits = decimals([one.value])
    rivals = {other.name: other for other in results.variants}
    rival = f"\n{name_and_work(row, rivals[one.versus])}" if against == "equal-cost" else ""
    tip = sentence(row.name, one, digits)
    return Cell(found.word, difference(one, digits) + rival, one.value, found.word, tip)


def _costs(rows: Sequence[Variant]) -> list[Column]:
    shares = {(row.cost.relative_macs, row.cost.relative_bit_operations) for row in rows}
    differ = any(bits is not None and bits != macs for macs, bits in shares)
    bits = Column(
        "bit operations",
        lambda row: _share(row.cost.relative_bit_operations, row.cost.bit_operations_per_image),
        "relative",
    )
    return [
        Column(
            "MACs",
            lambda row: _share(row.cost.relative_macs, row.cost.macs_per_image),
            "relative",
        ),
        *([bits] if differ else []),
        Column("evaluations", lambda row: _evaluations(row.cost), "per image"),
        Column(
            "seconds",
            lambda row: _measured_share(row.cost.seconds_per_image, row.cost.relative_seconds),
            "per image",
        ),
        Column(
            "weights",
            lambda row: Cell(quantity(row.cost.weight_bytes, "B"), key=row.cost.weight_bytes),
        ),
    ]


def _share(share: float | None, whole: float | None) -> Cell:
    if share is None:
        return Cell(quantity(whole), key=whole)
    return Cell(times(share), quantity(whole), share)


def _measured_share(value: float | None, share: float | None) -> Cell:
    if value is None:
        return Cell()
    return Cell(significant(value), "" if share is None else times(share), value)


def _evaluations(cost: Cost) -> Cell:
    if cost.evaluations_full is None:
        return Cell()
    cached = f"+ {cost.evaluations_cached:g} cached" if cost.evaluations_cached else ""
    return Cell(f"{cost.evaluations_full:g}", cached, cost.evaluations_full)
