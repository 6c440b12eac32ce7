"""Results as flat records, one per row: JSON and CSV to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from iec_eval.report.judgements import AGAINST, Against, Judged, judged
from iec_eval.report.wording import metric_names
from iec_eval.results import Cost, Measurement, Results, Variant

Record = dict[str, str | float | bool | None]


@dataclass(frozen=True)
class Row:
    """A variant with the results it belongs to."""

    results: Results
    variant: Variant

    def measurement(self, name: str) -> Measurement | None:
        """Its number of that name; whatever a failed row left behind is no result."""
        return None if self.variant.status == "failed" else self.variant.metrics.get(name)


def rows_of(results: Sequence[Results]) -> list[Row]:
    """The rows of one or more results, in order."""
    return [Row(document, variant) for document in results for variant in document.variants]


def records(results: Sequence[Results]) -> list[Record]:
    """One flat record per row with every number unrounded; all have the same keys."""
    names = metric_names(results)
    rows = rows_of(results)
    papers = list(dict.fromkeys(name for row in rows for name in row.variant.paper or {}))
    found = [_record(row, names, papers) for row in rows]
    if not any(row.variant.doubt for row in rows):
        return found
    return [{**one, "doubt": row.variant.doubt} for one, row in zip(found, rows, strict=True)]


def _record(row: Row, names: Sequence[str], papers: Sequence[str]) -> Record:
    variant = row.variant
    cost = Cost() if variant.status == "failed" else variant.cost
    record: Record = {
        "study": row.results.study,
        "variant": variant.name,
        "fingerprint": variant.fingerprint,
        "control": variant.control,
        "simulated": variant.simulated,
        "status": variant.status,
        "error": variant.error,
        "images": row.results.images,
        "seeds": " ".join(map(str, row.results.seeds)) if row.results.seeds else None,
    }
    for name in names:
        record |= _metric_record(name, row.measurement(name) or Measurement(value=None))
    for against in AGAINST:
        record |= _verdict_record(against, judged(variant, against, row.results))
    reported = variant.paper or {}
    return record | cost.model_dump() | {f"paper_{name}": reported.get(name) for name in papers}


def _metric_record(name: str, found: Measurement) -> Record:
    low, high = found.ci95 or (None, None)
    delta = found.delta
    delta_low, delta_high = (delta.ci95 if delta else None) or (None, None)
    return {
        name: found.value,
        f"{name}_spread": found.spread,
        f"{name}_ci95_low": low,
        f"{name}_ci95_high": high,
        f"{name}_delta": delta.value if delta else None,
        f"{name}_delta_versus": delta.versus if delta else None,
        f"{name}_delta_spread": delta.spread if delta else None,
        f"{name}_delta_ci95_low": delta_low,
        f"{name}_delta_ci95_high": delta_high,
    }


def _verdict_record(against: Against, found: Judged) -> Record:
    one = found.comparison
    low, high = (one.ci95 if one else None) or (None, None)
    key = f"versus_{against.replace('-', '_')}"
    return {
        key: one.versus if one else None,
        f"{key}_metric": one.metric if one else None,
        f"{key}_difference": one.value if one else None,
        f"{key}_ci95_low": low,
        f"{key}_ci95_high": high,
        f"{key}_level": one.level if one else None,
        f"{key}_verdict": found.word or None,
    }


def as_csv(rows: Sequence[Record]) -> str:
    """Records as comma-separated values under a line of their keys."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
