"""Rows against the rows that judge them: which, by what interval, and what is concluded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iec_eval.comparisons import with_comparisons
from iec_eval.intervals import Estimate, quantile
from iec_eval.report.wording import judgement
from iec_eval.results import Comparison, Measurement, Results, Variant, with_deltas

IEC = [{"name": "iec"}]
CACHE = [{"name": "deepcache"}]
COUNT = 400


def estimate(value: float, spread: float = 1.0, seed: int = 0) -> Estimate:
    values = torch.randn(COUNT, generator=torch.Generator().manual_seed(seed)).double()
    return Estimate(value, spread * (values - values.mean()) / values.std())


def row(name: str, **more: Any) -> Variant:
    return Variant(name=name, fingerprint="ab", **more)


def compared(
    rows: list[Variant], estimates: dict[str, dict[str, Estimate]]
) -> dict[str, list[Comparison]]:
    measured = [
        one.model_copy(
            update={
                "metrics": {n: Measurement(value=e.value) for n, e in estimates[one.name].items()}
            }
        )
        for one in rows
    ]
    results = with_deltas(Results(study="s", images=COUNT, protocol={}, variants=measured))
    found = with_comparisons(results, estimates)
    for one in found.variants:
        for name, kept in one.metrics.items():
            against = [c for c in one.comparisons if (c.metric, c.relation) == (name, "base")]
            if kept.delta:
                assert [(c.value, c.ci95) for c in against] == [(kept.delta.value, kept.delta.ci95)]
    return {one.name: one.comparisons for one in found.variants}


def test_a_row_is_compared_with_its_base_and_its_judges_in_every_metric() -> None:
    rows = [
        row("plain", efficiency=CACHE),
        row("IEC", efficiency=CACHE, callbacks=IEC),
        row("steps", efficiency=CACHE, control=True, judge_of={"IEC": "equal-cost"}),
        row("full", control=True, judge_of={"IEC": "full-precision", "gone": "half"}),
    ]
    numbers = {"plain": 9.0, "IEC": 8.0, "steps": 7.0, "full": 5.0}
    found = compared(
        rows,
        {
            name: {"fid": estimate(value), "is": estimate(value), "other": Estimate(value)}
            for name, value in numbers.items()
        },
    )
    judges = {"plain": "base", "steps": "equal-cost", "full": "full-precision"}
    assert [(c.versus, c.relation, c.metric, c.value) for c in found["IEC"]] == [
        (versus, relation, metric, 8.0 - numbers[versus])
        for versus, relation in judges.items()
        for metric in ("fid", "is", "other")
    ]  # fmt: skip
    said = [c.judgement for c in found["IEC"]]
    assert said == ["better", "worse", None, "worse", "better", None, "worse", "better", None]
    assert found["plain"] == found["steps"] == found["full"] == []


@pytest.mark.parametrize(("higher", "said"), [(True, "better"), (False, "worse")])
def test_a_number_is_judged_by_the_direction_that_the_results_hold(higher: bool, said: str) -> None:
    numbers = {name: {"edges": estimate(v)} for name, v in (("plain", 1.0), ("IEC", 2.0))}
    results = with_deltas(
        Results(
            study="s",
            images=COUNT,
            protocol={},
            directions={"edges": higher},
            variants=[
                row("plain", metrics={"edges": Measurement(value=1.0)}),
                row("IEC", metrics={"edges": Measurement(value=2.0)}, callbacks=IEC),
            ],
        )
    )
    (found,) = with_comparisons(results, numbers).variants[1].comparisons
    assert found.judgement == said


@pytest.mark.parametrize("status", ["partial", "failed"])
@pytest.mark.parametrize("unfinished", ["plain", "IEC"])
def test_what_is_not_done_is_in_no_comparison(status: str, unfinished: str) -> None:
    rows = [row("plain"), row("IEC", callbacks=IEC)]
    rows = [
        one.model_copy(update={"status": status, "error": "why"}) if one.name == unfinished else one
        for one in rows
    ]
    numbers = {one.name: {"fid": estimate(1.0)} for one in rows}
    assert compared(rows, numbers) == {"plain": [], "IEC": []}


def test_a_metric_that_only_one_row_has_is_left_out() -> None:
    numbers = {
        "plain": {"fid": estimate(1.0)},
        "IEC": {"fid": estimate(2.0), "psnr": estimate(3.0)},
    }
    found = compared([row("plain"), row("IEC", callbacks=IEC)], numbers)
    assert [c.metric for c in found["IEC"]] == ["fid"]


@pytest.mark.parametrize("relation", ["equal-cost", "zero-cost", "half"])
def test_intervals_against_several_rivals_of_a_kind_hold_together(relation: str) -> None:
    def half(rivals: int) -> float:
        judges = [row(f"r{n}", control=True, judge_of={"IEC": relation}) for n in range(rivals)]
        unfinished = row("gone", judge_of={"IEC": relation}, status="failed", error="why")
        base = row("base", judge_of={"IEC": "base"})  # which is of no such kind
        rows = [*judges, unfinished, base]
        numbers = {one.name: {"fid": estimate(1.0, 2.0)} for one in rows}
        numbers["IEC"] = {"fid": estimate(1.0)}
        found = compared([row("IEC", callbacks=IEC), *rows], numbers)["IEC"]
        assert [one.level for one in found] == [0.95, *[1 - 0.05 / rivals] * rivals]
        low, high = found[-1].ci95 or (0, 0)
        return (high - low) / 2

    error = 1 / math.sqrt(COUNT)  # the influence of one row is twice the other's
    assert half(1) == pytest.approx(quantile(0.95) * error)
    assert half(3) == pytest.approx(quantile(1 - 0.05 / 3) * error)


def test_the_interval_judges() -> None:
    cases = [(0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1), (0.0, 0.1), (0.0, 0.0)]
    said = [judgement(case, better_up=True) for case in cases]
    assert said == ["better", "worse", *["not distinguishable"] * 3]
    assert judgement((0.1, 0.3), better_up=False) == "worse"
    assert judgement((0.1, 0.3), None) is None
    assert judgement(None, better_up=True) is None
