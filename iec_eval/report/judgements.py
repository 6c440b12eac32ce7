"""What stands in the verdict columns: a corrected row against its base and its strongest rival.

Only finished rows are in a verdict, on either side; where one is missing the column says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from iec_eval.equal_work import is_near
from iec_eval.intervals import LEVEL
from iec_eval.report.wording import higher_is_better, pairings, quality_metric, with_interval
from iec_eval.results import Comparison, Results, Variant
from iec_eval.study import Lack, Relation

Against = Literal["base", "equal-cost"]
AGAINST: Mapping[Against, str] = {"base": "vs base", "equal-cost": "vs equal cost"}
RELATIONS: Mapping[Relation, str] = {
    "base": "the row it starts from",
    "equal-cost": "the same compute spent otherwise",
    "zero-cost": "a correction that takes no evaluation",
    "half": "a part of what the callback does",
    "stacking": "the parts put one on the other",
    "full-precision": "full precision",
    "corrected-alike": "full precision with the same correction",
}
RIVALS: tuple[Relation, ...] = ("equal-cost", "zero-cost", "half")
_JUDGES: Mapping[Against, str] = {"base": "base", "equal-cost": "rivals"}
_WORDS = {"better": "better than", "worse": "worse than"}


@dataclass(frozen=True)
class Judged:
    """A row's verdict against another; ``missing`` says why there is no comparison."""

    comparison: Comparison | None = None
    missing: str = ""

    @property
    def word(self) -> str:
        """The judgement, or why there is none; nothing for a row that is not to be judged."""
        if self.comparison is None:
            return self.missing
        return self.comparison.judgement or "not judged"


def has_verdicts(rows: Sequence[Variant]) -> bool:
    """Whether the table needs verdict columns: something is corrected, or was compared."""
    return any(row.callbacks or row.comparisons for row in rows)


def comparisons(row: Variant, results: Results) -> list[Comparison]:
    """A row's comparisons with finished rows; none if it is not finished itself."""
    finished = {other.name for other in results.variants if other.status == "done"}
    if row.name not in finished:
        return []
    return [found for found in row.comparisons if found.versus in finished]


def judged(
    row: Variant,
    against: Against,
    results: Results,
) -> Judged:
    """The verdict on a row's quality metric, against its base or its strongest equal-cost rival.

    The strongest rival is the one of best quality, whatever the interval of the difference.
    """
    metric = quality_metric(results)
    found = [
        one for one in comparisons(row, results) if one.relation == against and one.metric == metric
    ]
    if not found:
        return Judged(missing=why_missing(row, against, results))
    return Judged(strongest(found, bool(higher_is_better(metric or "", results))))


def strongest(found: Sequence[Comparison], upward: bool) -> Comparison:
    """Of a row's comparisons in one metric that with the best other row, its own least gain."""
    return min(found, key=lambda one: one.value if upward else -one.value)


def name_and_work(row: Variant, other: Variant) -> str:
    """The name of a rival of equal cost; with how much work it took after all, if that was not so.

    Corrections may stop early, and the costs that rivals are chosen by are expected ones.
    """
    own, its = row.cost.macs_per_image, other.cost.macs_per_image
    if not own or not its or is_near(its, own):
        return other.name
    return f"{other.name}, which took {its / own:.2g} times the work"


def is_rival(row: Variant) -> bool:
    """Whether a row was added to stand against others on trial, and so is not on trial itself."""
    return row.control and any(relation in RIVALS for relation in row.judge_of.values())


def why_missing(row: Variant, against: Against, results: Results) -> str:
    """Why a row has no comparison of a kind; nothing for a row that is not to be judged."""
    if row.status != "done":
        return row.status
    if not row.callbacks or is_rival(row):
        return ""
    judges = [other for other in results.variants if other.judge_of.get(row.name) == against]
    if judges:
        unfinished = all(other.status != "done" for other in judges)
        return f"{_JUDGES[against]} not finished" if unfinished else "not judged"  # no intervals
    if results.controls is None:
        return "not judged"  # a file from before rows said whom they judge
    if not {"equal-cost", "heun"} & set(results.controls):
        return "controls off"
    if against == "base" or any(one.relation == against for one in row.lacks):
        return "none to be had"
    return "base costs as much"


def absent(row: Variant, results: Results) -> list[str]:
    """The rivals that a row's verdict does without: unfinished ones, and such as are not to be had.

    Nothing for a row that is not to be judged.
    """
    if not row.callbacks or is_rival(row) or row.status != "done":
        return []
    unfinished = [
        f"{other.name} ({other.status})"
        for other in results.variants
        if other.judge_of.get(row.name) in RIVALS and other.status != "done"
    ]
    return [*unfinished, *(f"{one.what} (not to be had)" for one in not_to_be_had(row))]


def not_to_be_had(row: Variant) -> list[Lack]:
    """The rivals that a row should have and cannot."""
    return [one for one in row.lacks if one.relation in RIVALS]


def difference(found: Comparison, digits: int) -> str:
    """A difference and its interval, such as ``-1.15 [-1.41, -0.89]``."""
    return with_interval(found.value, found.ci95, digits, "+")


def sentence(name: str, found: Comparison, digits: int) -> str:
    """A comparison spelled out."""
    said = _WORDS.get(found.judgement or "")
    verdict = f"{said} {found.versus}" if said else f"{found.judgement} from {found.versus}"
    if found.judgement is None:
        verdict = f"not judged against {found.versus}"
    several = found.level is not None and found.level > LEVEL
    together = " that holds for all such rows together" if several else ""
    certainty = "" if found.ci95 is None else f" (95 % interval{together})"
    return (
        f"{name} is {verdict} ({RELATIONS[found.relation]}): "
        f"{found.metric} {difference(found, digits)}{certainty}."
    )


def tally(results: Results, against: Against) -> Mapping[str, int]:
    """How many of the study's own rows (controls are none) got which judgement."""
    counted: dict[str, int] = {}
    for row in results.variants:
        found = judged(row, against, results).comparison
        if found is not None and found.judgement is not None and not row.control:
            counted[found.judgement] = counted.get(found.judgement, 0) + 1
    return counted


def held_against(results: Sequence[Results], against: Against) -> str:
    """Which row each judged row was held against; see :func:`wording.pairings`."""
    return pairings(
        (row.name, _held(row, found.versus, document) if against == "equal-cost" else found.versus)
        for document in results
        for row in document.variants
        if (found := judged(row, against, document).comparison) is not None
    )


def _held(row: Variant, versus: str, results: Results) -> str:
    return name_and_work(row, next(other for other in results.variants if other.name == versus))
