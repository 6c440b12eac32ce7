"""results.json, schema 1: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.results import (
    Cost,
    Delta,
    Measurement,
    Results,
    Variant,
    differing,
    inferred_bases,
    read_results,
    require_one_protocol,
    with_deltas,
    with_relative_costs,
    write_results,
)

CACHE = [{"name": "deepcache", "interval": 3}]
IEC = [{"name": "iec", "preset": "paper"}]

NOTHING = {"value": None, "ci95": None, "delta": None, "by_seed": [], "spread": None}
LITERAL: dict[str, Any] = {
    "schema": 1,
    "study": "toy",
    "images": 1000,
    "seeds": [3, 4],
    "protocol": {"resize": "tf1", "weights": {"sha256": "ab"}},
    "directions": {"fid": False, "is": True},
    "controls": ["full-precision", "equal-cost"],
    "variants": [
        {
            "name": "cached + IEC",
            "fingerprint": "0123",
            "control": False,
            "simulated": False,
            "efficiency": CACHE,
            "callbacks": IEC,
            "metrics": {
                "fid": {
                    "value": 10.5,
                    "ci95": [10.0, 11.0],
                    "delta": {
                        "versus": "cached",
                        "value": -1.5,
                        "ci95": [-2.0, -1.0],
                        "spread": 0.1,
                    },
                    "by_seed": [10.0, 11.0],
                    "spread": 0.7,
                },
                "is": {**NOTHING, "value": 7.0},
            },
            "cost": {
                "evaluations_full": 14.0,
                "evaluations_cached": 13.0,
                "macs_per_image": 2.5e9,
                "relative_macs": 0.9,
                "bit_operations_per_image": 2.56e12,
                "relative_bit_operations": 0.9,
                "seconds_per_image": 0.03,
                "relative_seconds": 0.8,
                "weight_bytes": 1000,
            },
            "paper": {"fid": 4.32},
            "doubt": "the paper has two values",
            "status": "done",
            "error": None,
            "judge_of": {},
            "lacks": [
                {
                    "relation": "equal-cost",
                    "what": "equal-cost rival Heun",
                    "reason": "the sampler cannot be corrected",
                }
            ],
            "comparisons": [
                {
                    "versus": "cached",
                    "relation": "base",
                    "metric": "fid",
                    "value": -1.5,
                    "ci95": [-2.0, -1.0],
                    "level": 0.95,
                    "judgement": "better",
                }
            ],
        },
        {
            "name": "broken",
            "fingerprint": "4567",
            "control": True,
            "simulated": True,
            "efficiency": [],
            "callbacks": [],
            "metrics": {"fid": NOTHING},
            "cost": {
                "evaluations_full": None,
                "evaluations_cached": None,
                "macs_per_image": None,
                "relative_macs": None,
                "bit_operations_per_image": None,
                "relative_bit_operations": None,
                "seconds_per_image": None,
                "relative_seconds": None,
                "weight_bytes": None,
            },
            "paper": None,
            "doubt": None,
            "status": "failed",
            "error": "out of memory",
            "judge_of": {"cached + IEC": "equal-cost"},
            "lacks": [],
            "comparisons": [],
        },
    ],
}


def row(name: str, fid: float | None = None, **parts: Any) -> Variant:
    metrics = {} if fid is None else {"fid": Measurement(value=fid)}
    return Variant(name=name, fingerprint="ab", metrics=metrics, **parts)


def toy(*rows: Variant, study: str = "toy", protocol: dict[str, Any] | None = None) -> Results:
    return Results(study=study, images=10, protocol=protocol or {}, variants=list(rows))


def test_a_file_survives_reading_and_writing_with_every_key(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(LITERAL), encoding="utf-8")
    write_results(second, read_results(first))
    assert json.loads(second.read_text(encoding="utf-8")) == LITERAL
    assert read_results(second) == read_results(first)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["first.json", "second.json"]


def test_a_file_from_before_there_was_all_this_is_read(tmp_path: Path) -> None:
    later = {"doubt", "judge_of", "lacks", "comparisons"}
    rows = [{k: v for k, v in row.items() if k not in later} for row in LITERAL["variants"]]
    rows[0] = {**rows[0], "metrics": {"fid": {"value": 1.0, "ci95": None, "delta": None}}}
    later = {"controls", "seeds", "directions"}
    old = {k: v for k, v in LITERAL.items() if k not in later} | {"variants": rows}
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    found = read_results(tmp_path / "old.json")
    assert [row.doubt for row in found.variants] == [None, None]
    assert (found.directions, found.seeds) == ({}, None)
    assert found.variants[0].metrics["fid"].spread is None


def test_what_a_row_lacks_is_read_from_sentences_too(tmp_path: Path) -> None:
    """As files had it before it was a record."""
    sentences = {
        "equal-cost rival Heun: the sampler: no": ("equal-cost", "equal-cost rival Heun"),
        "half refresh only: no": ("half", "half refresh only"),
        "naive stacking: no": ("stacking", "naive stacking"),
        "the control full precision + IEC: no": (
            "full-precision",
            "the control full precision + IEC",
        ),
    }
    rows = [{**LITERAL["variants"][0], "lacks": [*sentences]}]
    (tmp_path / "old.json").write_text(json.dumps({**LITERAL, "variants": rows}), encoding="utf-8")
    (found,) = read_results(tmp_path / "old.json").variants
    assert [(one.relation, one.what) for one in found.lacks] == [*sentences.values()]
    assert [*map(str, found.lacks)] == [*sentences]


def test_defaults_are_written_too(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", toy(row("a", 1.0)))
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    wanted = LITERAL["variants"][1]
    assert list(written) == list(LITERAL)
    assert list(written["variants"][0]) == list(wanted)
    assert written["variants"][0]["cost"] == wanted["cost"]
    assert written["variants"][0]["metrics"] == {"fid": {**NOTHING, "value": 1.0}}


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, ConfigError, "no such file"),
        ("{", CorruptFile, "wanted JSON"),
        ("[" * 100_000, CorruptFile, "wanted JSON"),
        (b"\xff\xfe", CorruptFile, "UTF-8"),
        (json.dumps({**LITERAL, "schema": 2}), ConfigError, "wanted schema 1, got 2"),
        ("[1]", ConfigError, "wanted schema 1, got None"),
        (json.dumps({**LITERAL, "images": "10"}), CorruptFile, "images: "),
        (json.dumps({**LITERAL, "extra": 1}), CorruptFile, "extra: "),
        (json.dumps({**LITERAL, "variants": [{}]}), CorruptFile, "variants.0.name: "),
    ],
)
def test_a_file_that_is_not_schema_1_is_refused(
    tmp_path: Path, content: str | bytes | None, kind: type[Exception], message: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert type(caught.value) is kind


def test_a_directory_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path)


def test_what_must_never_be_in_a_result() -> None:
    with pytest.raises(ValidationError, match="say why"):
        row("a", status="failed")
    with pytest.raises(ValidationError, match="rows named twice: a"):
        toy(row("a"), row("a"))
    with pytest.raises(ValidationError, match="finite"):
        Measurement(value=float("nan"))


def delta(results: Results, name: str) -> Delta | None:
    return next(v for v in results.variants if v.name == name).metrics["fid"].delta


def test_a_row_with_callbacks_is_compared_with_the_same_row_without() -> None:
    results = with_deltas(
        toy(
            row("full", 9.0, control=True),
            row("full + IEC", 8.5, control=True, callbacks=IEC),
            row("cached", 12.0, efficiency=CACHE),
            row("cached, more steps", 11.0, efficiency=CACHE, control=True),
            row("cached + IEC", 10.5, efficiency=CACHE, callbacks=IEC),
        )
    )
    assert delta(results, "cached + IEC") == Delta(versus="cached", value=-1.5)
    assert delta(results, "full + IEC") == Delta(versus="full", value=-0.5)
    assert delta(results, "full") is delta(results, "cached") is None
    assert with_deltas(results) == results


def test_a_base_is_not_guessed_among_several_and_can_be_given() -> None:
    results = toy(
        row("20 steps", 12.0, efficiency=CACHE),
        row("40 steps", 11.0, efficiency=CACHE),
        row("IEC", 10.5, efficiency=CACHE, callbacks=IEC),
    )
    assert inferred_bases(results) == {}
    given = with_deltas(results, {"IEC": "40 steps", "40 steps": "20 steps"})
    assert delta(given, "IEC") == Delta(versus="40 steps", value=-0.5)
    assert delta(given, "40 steps") == Delta(versus="20 steps", value=-1.0)
    with pytest.raises(ConfigError, match="no row named '60 steps'"):
        with_deltas(results, {"IEC": "60 steps"})


def test_a_row_may_say_whose_base_it_is_and_rivals_are_none() -> None:
    results = toy(
        row("20 steps", 12.0, control=True),
        row("40 steps", 11.0, control=True, judge_of={"IEC": "equal-cost"}),
        row("IEC", 10.5, callbacks=IEC),
    )
    assert inferred_bases(results) == {"IEC": "20 steps"}
    named = toy(
        row("20 steps", 12.0),
        row("40 steps", 11.0, judge_of={"IEC": "base", "gone": "base"}),
        row("IEC", 10.5, callbacks=IEC),
    )
    assert inferred_bases(named) == {"IEC": "40 steps"}


def test_a_base_can_be_refused() -> None:
    results = toy(row("plain", 2.0), row("IEC", 1.0, callbacks=IEC))
    assert delta(with_deltas(results), "IEC") == Delta(versus="plain", value=-1.0)
    assert delta(with_deltas(results, {"IEC": None}), "IEC") is None


@pytest.mark.parametrize("ends", ["partial", "failed"])
def test_only_finished_rows_are_compared(ends: str) -> None:
    unfinished = row("plain", 2.0, status=ends, error="stopped")
    results = with_deltas(toy(unfinished, row("IEC", 1.0, callbacks=IEC)))
    assert delta(results, "IEC") is None


def test_a_difference_that_is_there_keeps_its_interval() -> None:
    known = Delta(versus="plain", value=-1.0, ci95=(-1.5, -0.5))
    measured = {"fid": Measurement(value=1.0, delta=known)}
    corrected = row("IEC", callbacks=IEC).model_copy(update={"metrics": measured})
    assert delta(with_deltas(toy(row("plain", 2.0), corrected)), "IEC") == known


def test_costs_are_relative_to_the_full_precision_control() -> None:
    def cost(macs: float, seconds: float | None = None) -> Cost:
        return Cost(macs_per_image=macs, seconds_per_image=seconds)

    results = toy(
        row("fewer steps", cost=cost(50.0)),
        row("full", cost=cost(100.0, 2.0), control=True),
        row("cached", cost=cost(60.0, 1.0), efficiency=CACHE),
        row("broken", status="failed", error="why"),
    )
    shares = [
        (one.cost.relative_macs, one.cost.relative_seconds)
        for one in with_relative_costs(results).variants
    ]
    assert shares == [(0.5, None), (1.0, 1.0), (0.6, 0.5), (None, None)]
    given = with_relative_costs(results, "fewer steps").variants
    assert given[1].cost.relative_macs == 2.0
    with pytest.raises(ConfigError, match="no row named 'no'"):
        with_relative_costs(results, "no")


def test_without_a_full_precision_row_no_cost_is_relative() -> None:
    stale = Cost(macs_per_image=60.0, relative_macs=0.1)
    results = with_relative_costs(toy(row("cached", cost=stale, efficiency=CACHE)))
    assert results.variants[0].cost.relative_macs is None


def test_different_protocols_are_refused_by_the_keys_that_differ() -> None:
    here = toy(study="a", protocol={"resize": "tf1", "weights": {"sha": "x", "id": 1}})
    there = toy(
        study="b", protocol={"resize": "tf1", "weights": {"sha": "y", "id": 1}, "splits": 0}
    )
    require_one_protocol([here, here])
    with pytest.raises(Incompatible) as caught:
        require_one_protocol([here, here, there])
    assert str(caught.value) == (
        "results of 'a' and 'b' were measured with different protocols, which differ in "
        "splits (not there and 0), weights.sha ('x' and 'y'); their numbers cannot be compared, "
        "evaluate both with one protocol"
    )
    bare = there.model_copy(update={"protocol": {}})
    with pytest.raises(
        Incompatible, match=r"of 'x/1' and 'x/2' .* weights \(not there and there\)"
    ):
        require_one_protocol([bare, here], ["x/1", "x/2"])


def test_what_differs_is_named_at_the_highest_key_that_one_side_lacks() -> None:
    here: dict[str, Any] = {"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": 2}
    there: dict[str, Any] = {"a": {"b": True}, "e": {}, "f": {"g": 2}}
    assert differing(here, here) == {}
    assert differing(here, there) == {
        "a.b": ("1", "True"),
        "a.c": ("there", "not there"),
        "f": ("2", "there"),
    }


def test_one_reference_read_from_two_places_is_one_reference() -> None:
    source = {"statistics": "/a/reference.npz"}
    here: dict[str, Any] = {"reference": {"digest": "d", "count": 9, "source": source}}
    moved = {"reference": {**here["reference"], "source": {"statistics": "/b/reference.npz"}}}
    other = {"reference": {**moved["reference"], "digest": "e"}}
    assert differing(here, moved) == {}
    assert differing(here, other).keys() == {
        "reference.digest",
        "reference.source.statistics",
    }


def test_bases_are_inferred_only_in_files_from_before_rows_said_so() -> None:
    rows = [row("short", 1.0), row("long + IEC", 2.0, callbacks=IEC)]
    assert inferred_bases(toy(*rows)) == {"long + IEC": "short"}
    assert inferred_bases(toy(*rows).model_copy(update={"controls": []})) == {}
