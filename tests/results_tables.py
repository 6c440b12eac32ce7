"""The tables of docs/results.md, from the results.json files published beside it.

    python tests/results_tables.py                       # writes all tables of the page again
    python tests/results_tables.py table3-quad ROW...    # prints those of a new section

The page chooses the rows, by naming them in the first column; every other cell is computed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from iec_eval.report.markup import markdown_table, padded
from iec_eval.report.wording import with_interval
from iec_eval.results import Comparison, Cost, Measurement, Results, Variant, read_results
from iec_eval.study import Relation

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
PUBLISHED = ROOT / "docs" / "results"

FID, INFINITE, INCEPTION = "fid-fashion", "fid-infinity-fashion", "is-fashion"
ROWS_HEAD = [
    "row",
    f"{FID} ↓",
    "against its base",
    "",
    f"{INCEPTION} ↑",
    "evaluations",
    "relative MACs",
]
VERDICTS_HEAD = ["| against | what it is | difference | |", "| --- | --- | ---: | --- |"]
KINDS: Mapping[Relation, str] = {
    "base": "its base",
    "equal-cost": "equal cost",
    "zero-cost": "no evaluation",
    "half": "a half of IEC",
    "full-precision": "full precision",
    "corrected-alike": "full precision corrected alike",
}
FREE = ("scale-matched", "self-consistent")
AGAIN = "-again"  # of some rows, run again when a part of theirs had changed
STUDIES = {
    "DeepCache": "table2",
    "W8A8": "table1",
    "W4A8": "table1-w4a8",
    "CacheQuant W8A8": "table3",
    "CacheQuant W4A8": "table3-w4a8",
    "full precision": "table5",
}
NUMBERS = ("FID", "IEC's cost")  # columns of the table of all that are set to the right
UNTUNED = ("epsilon scaling", "time shift")  # with the published size of their constants


@cache
def results_of(name: str) -> Results:
    """The published results of a study, such as ``table3-quad``."""
    return read_results(PUBLISHED / f"{name}.json")


def study_shown(command: str) -> str | None:
    """Which results a documented command makes, or None if it launches no embedded study."""
    found = re.search(r"configs/embedded/([\w-]+)\.yaml", command)
    if found is None:
        return None
    spacing = re.search(r"sampler\.spacing=(\w+)", command)
    name = f"{found[1]}-{spacing[1] if spacing else 'quad'}"
    if "controls=" in command:  # some rows again
        name += AGAIN
    return name if (PUBLISHED / f"{name}.json").exists() else found[1]


def rows_table(results: Results, names: Sequence[str]) -> list[str]:
    """The lines of the table of some rows: quality, differences to the base, cost."""
    rows = {row.name: row for row in results.variants}
    cells = [_row_cells(rows[name]) for name in names]
    return markdown_table([ROWS_HEAD, *cells], words=1).splitlines()


def _row_cells(row: Variant) -> list[str]:
    base = next(_compared(row, "base"), None)
    return [
        row.name,
        _measured(row.metrics[FID], 3),
        difference(base) if base else "",
        (base.judgement or "") if base else "",
        _measured(row.metrics[INCEPTION], 2),
        _evaluations(row.cost),
        f"{row.cost.relative_macs:.2f}x",
    ]


def _measured(found: Measurement, otherwise: int) -> str:
    assert found.value is not None
    return with_interval(found.value, found.ci95, otherwise)


def difference(found: Comparison) -> str:
    """A difference and its interval, signs included."""
    return with_interval(found.value, found.ci95, 4, "+")


def _evaluations(cost: Cost) -> str:
    cached = f" + {cost.evaluations_cached:g} cached" if cost.evaluations_cached else ""
    return f"{cost.evaluations_full:g}{cached}"


def _compared(row: Variant, relation: Relation) -> Iterator[Comparison]:
    return (one for one in row.comparisons if one.metric == FID and one.relation == relation)


def verdicts_table(row: Variant, wanted: Iterable[str] | None = None) -> list[str]:
    """The lines of the table of what a row was compared with, ``wanted`` first cells or all."""
    lines = {}
    for kind, said in KINDS.items():
        for found in _compared(row, kind):
            name = found.versus if kind == "base" else found.versus.rpartition(": ")[2]
            label = f"{name} (untuned)" if name in UNTUNED else name
            cells = [label, said, difference(found), found.judgement or ""]
            lines[label] = f"| {' | '.join(cells)} |"
    return VERDICTS_HEAD + [lines[one] for one in (lines if wanted is None else wanted)]


def in_short(method: str, spacing: str) -> list[str]:
    """The cells on a method in the table of all: what IEC does, and what else its cost buys."""
    study = short_study(method, spacing)
    studies = [one for one in (study, study + AGAIN) if (PUBLISHED / f"{one}.json").exists()]
    rows = {row.name: row for one in studies for row in results_of(one).variants}
    plain, corrected = rows[method], rows[f"{method} + IEC"]
    cost = (corrected.cost.macs_per_image or 0) / (plain.cost.macs_per_image or 1)
    quality = _quality(plain)
    cells = [method, spacing, f"{quality:.3f}", _against(corrected, method), f"{cost:.2f}x"]
    if method == "full precision":  # a control, which has no rivals
        return [*cells, "", "", ""]
    rivals = [row for row in rows.values() if row.judge_of.get(corrected.name) == "equal-cost"]
    free = [_against(rows[f"{method}: {name}"], method) for name in FREE]
    if not rivals:  # with four bits each would take a reconstruction of its own
        return [*cells, "", *free]
    best = min(rivals, key=_quality)
    return [*cells, f"{best.name.rpartition(': ')[2]}: {_against(best, method)}", *free]


def short_study(method: str, spacing: str) -> str:
    """The published study that has the rows of a method."""
    return f"{STUDIES[re.sub(r' N=[0-9]+', '', method)]}-{spacing}"


def _quality(row: Variant) -> float:
    value = row.metrics[FID].value
    assert value is not None
    return value


def _against(row: Variant, base: str) -> str:
    """A row's difference to another: bold where it can be told."""
    found = next(one for one in row.comparisons if one.versus == base and one.metric == FID)
    return "same images" if found.value == 0 and found.ci95 == (0, 0) else _bold(found)


def _bold(found: Comparison) -> str:
    text = difference(found)
    return text if found.judgement == "not distinguishable" else f"**{text}**"


def disagreements() -> list[list[str]]:
    """Rows that FID can tell from their base and FID without bias cannot, or the reverse."""
    lines = []
    for path in sorted(PUBLISHED.glob("*.json")):
        for row in results_of(path.stem).variants:
            base = {one.metric: one for one in row.comparisons if one.relation == "base"}
            told, infinite = base.get(FID), base.get(INFINITE)
            if told and infinite and told.judgement != infinite.judgement:
                lines.append([path.stem, row.name, _bold(told), _bold(infinite)])
    return lines


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    columns = [padded(column, left=column[0] not in NUMBERS) for column in zip(*lines, strict=True)]
    return [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]


def rewritten(page: str) -> str:
    """The page with every table of rows and of verdicts as the published results have it."""
    lines, out = page.split("\n"), []
    shown, subject = None, ""
    while lines:
        if lines[0].startswith("    iec-eval"):
            shown = study_shown(" ".join(takewhile(lambda line: line.startswith("    "), lines)))
        table = list(takewhile(lambda line: line.startswith("|"), lines))
        if not table:
            subject = _subject(lines[0]) or subject
            out.append(lines.pop(0))
            continue
        out += _table_again(table, shown, subject)
        del lines[: len(table)]
    return "\n".join(out)


def _table_again(table: Sequence[str], shown: str | None, subject: str) -> Sequence[str]:
    """The lines of a table that stands under the command of a study and the name of a row."""
    head, body = _cells_of(table[0]), [_cells_of(line) for line in table[2:]]
    names = [cells[0] for cells in body]
    if head[0] == "method":
        return _aligned([head, *(in_short(cells[0], cells[1]) for cells in body)])
    if head[0] == "results":
        return _aligned([head, *disagreements()])
    if head[0] == "row" and shown:
        return rows_table(results_of(shown), names)
    if table[0] == VERDICTS_HEAD[0] and shown:
        (row,) = (one for one in results_of(shown).variants if one.name == subject)
        return verdicts_table(row, names)
    return table


def _cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _subject(line: str) -> str | None:
    found = re.match(r"(?:Verdicts of )?`([^`]+)`.*:$", line)
    return found[1] if found else None


def main(arguments: Sequence[str]) -> None:
    """Write the page again, or print the tables of new rows."""
    if not arguments:
        PAGE.write_text(rewritten(PAGE.read_text()))
        return
    results = results_of(arguments[0])
    for prefix in arguments[1:]:
        found = [row for row in results.variants if row.name.startswith(prefix)]
        print("\n".join(rows_table(results, [row.name for row in found])), end="\n\n")
        for row in found:
            if row.callbacks and not row.judge_of:
                print(f"Verdicts of `{row.name}`:\n")
                print("\n".join(verdicts_table(row)), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
