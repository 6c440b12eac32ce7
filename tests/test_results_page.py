"""What README and docs say was found is what the published results.json files hold."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_tables import AGAIN, PAGE, ROOT, results_of, rewritten, short_study

from iec_eval.analysis.growth import fit_growth
from iec_eval.results import Results, read_results
from iec_eval.study import load

PAGES = [ROOT / "README.md", PAGE, ROOT / "docs" / "correctors.md"]
PUBLISHED = [read_results(path) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]

SPACINGS = ("quad", "uniform")
Triple = tuple[float, float, float]

NUMBER = r"[+-]?\d+(?:\.\d+)?"
WRITTEN = re.compile(rf"({NUMBER}) \[({NUMBER}),\s*({NUMBER})\]")


def estimates(results: Sequence[Results], row: str | None = None) -> Iterator[Triple]:
    """Every value with its interval; of ``row``, those that are its own or against it."""
    for variant in (one for of in results for one in of.variants):
        deltas = [one.delta for one in variant.metrics.values() if one.delta is not None]
        differences = [*variant.comparisons, *deltas]
        if row in (None, variant.name):
            numbers = [*variant.metrics.values(), *differences]
        else:
            numbers = [one for one in differences if one.versus == row]
        for number in numbers:
            if number.value is not None and number.ci95 is not None:
                yield (number.value, *number.ci95)


def rounds_to(value: float, written: str) -> bool:
    half = 0.5 * 10 ** -len(written.partition(".")[2])
    return abs(value - float(written)) <= half * (1 + 1e-9)


def is_of(written: Sequence[str], triple: Triple) -> bool:
    """Whether the three are this estimate, or its opposite: "loses 0.2" is -0.2."""
    value, low, high = triple
    both = (triple, (-value, -high, -low))
    return any(all(map(rounds_to, one, written)) for one in both)


def known_rows() -> set[str]:
    return {variant.name for results in PUBLISHED for variant in results.variants}


def said(page: Path) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """Each estimate of a page, with the row if it stands in the table line of one."""
    rows = known_rows()
    # an interval may be broken over two lines of prose, never over two of a table
    for block in re.split(r"\n(?=\||\n)", page.read_text()):
        first = block.split("|")[1].strip() if block.lstrip().startswith("|") else ""
        name = first.removesuffix(" (simulated)")
        for written in WRITTEN.findall(block):
            yield (name if name in rows else None), written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_estimate_is_a_published_one(page: Path) -> None:
    everything = list(said(page))
    assert len(everything) > 10
    wrong = [
        (row, written)
        for row, written in everything
        if not any(is_of(written, triple) for triple in estimates(PUBLISHED, row))
    ]
    assert not wrong


def test_a_wrong_digit_and_a_wrong_row_are_noticed() -> None:
    (row, other) = PUBLISHED[0].variants[:2]
    value, low, high = next(estimates(PUBLISHED, row.name))
    written = [f"{number:.6f}" for number in (value, low, high)]
    assert any(is_of(written, triple) for triple in estimates(PUBLISHED, row.name))
    assert not any(is_of(written, triple) for triple in estimates(PUBLISHED, other.name))
    written[1] = f"{low + 2e-6:.6f}"
    assert not any(is_of(written, triple) for triple in estimates(PUBLISHED))


# --- tables -------------------------------------------------------------------------------------


def table_under(head: str) -> list[list[str]]:
    """The cells of the table of docs/results.md whose first line begins so."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    return list(itertools.takewhile(lambda row: len(row) > 1, cells))


def test_the_tables_are_those_of_the_published_results() -> None:
    """If not: see what tests/results_tables.py makes of the page."""
    page = PAGE.read_text()
    assert rewritten(page).splitlines() == page.splitlines()


def test_wrong_cells_are_written_again() -> None:
    page = PAGE.read_text()
    wrong = re.sub(r"(?m)^(\|.*) [+*]*0\.\d+ (?=\[)", r"\1 9.9 ", page)
    changed = [line for line in wrong.splitlines() if "9.9" in line]
    assert len(changed) > 100
    assert rewritten(wrong) == page


def test_the_table_in_short_has_every_study_of_the_papers_tables() -> None:
    published = {path.stem for path in (ROOT / "docs" / "results").glob("table*.json")}
    studies = {name.removesuffix(AGAIN) for name in published if "-version" not in name}
    assert {short_study(row[0], row[1]) for row in table_under("| method ")} == studies


def test_how_often_each_score_prefers_iec_to_its_equal_cost_rivals() -> None:
    names = [f"{table}-{spacing}" for table in ("table3", "table3-w4a8") for spacing in SPACINGS]
    judged = {
        metric: Counter(
            found.judgement
            for name in ("table2-quad", f"table2-uniform{AGAIN}", *names)
            for row in results_of(name).variants
            for found in row.comparisons
            if found.metric == metric and found.relation == "equal-cost"
        )
        for metric in ("fid-fashion", "is-fashion")
    }
    assert judged["fid-fashion"] == {"worse": 28}
    assert judged["is-fashion"] == {"better": 27, "not distinguishable": 1}
    page, readme = (" ".join(path.read_text().split()) for path in (PAGE, PAGES[0]))
    assert (
        "Inception Score prefers IEC in 27 of these 28 comparisons, and cannot tell in one" in page
    )
    assert "Inception Score prefers IEC in 27 of the 28 comparisons" in readme


# --- figures 1 and 2 ----------------------------------------------------------------------------

ANALYSIS = ROOT / "docs" / "results" / "analysis"


def figures_rows() -> list[list[str]]:
    """The cells of the table on what single steps do and how distances grow."""
    return table_under("| spacing | row | norm")


def analysis_file(part: str, row: Sequence[str], suffix: str) -> Path:
    name = row[1].lower().replace("n=", "n").replace(" ", "-")
    return ANALYSIS / f"{part}-{name}-{row[0]}.{suffix}"


@pytest.mark.parametrize("row", figures_rows(), ids=lambda row: f"{row[1]} {row[0]}")
def test_the_norms_are_the_published_ones(row: Sequence[str]) -> None:
    with analysis_file("spectral", row, "csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 20  # 10 steps of 2 images
    assert {line["converged"] for line in lines} == {"True"}
    norms = [float(line["norm_A_I_plus_B_J"]) for line in lines]
    assert all(map(rounds_to, (max(norms), min(norms)), row[2].split(", ")))
    prefix = "norm_grad_G_"
    columns = [column for column in lines[0] if column.startswith(prefix)]
    below = [
        column.removeprefix(prefix)
        for column in columns
        if all(float(line[column]) < 1 for line in lines)
    ]
    assert f"{below[0]} to {below[-1]}" == row[3]
    assert len(below) == columns.index(prefix + below[-1]) + 1  # none between is left out


@pytest.mark.parametrize(
    "row", [row for row in figures_rows() if row[4]], ids=lambda row: f"{row[1]} {row[0]}"
)
def test_the_distances_and_fits_are_the_published_ones(row: Sequence[str]) -> None:
    found = json.loads(analysis_file("growth", row, "json").read_text())
    series = {(one["run"], one["versus"]): one for one in found["series"]}
    plain = series["row", "full precision"]
    corrected = series["row + correction", "full precision + correction"]
    for one, cell in zip((plain, corrected), row[4:6], strict=True):
        mean, median = re.findall(NUMBER, cell)
        assert rounds_to(one["mean"][-1], mean)
        assert rounds_to(statistics.median(one["distance"][-1]), median)
    for one, cell in zip((plain, corrected), row[6:8], strict=True):
        assert cell.startswith(one["fit"]["better"])
        curves = ("exponential", "linear", "flattening")
        written = re.findall(r"\d\.\d+", cell)
        assert [f"{one['fit'][curve]['r2']:.2f}" for curve in curves] == written
        again = fit_growth(one["mean"])  # as the program fits them today
        assert again["better"] == one["fit"]["better"]
        for curve in curves:
            assert again[curve] == pytest.approx(one["fit"][curve], rel=1e-6)


@pytest.fixture(scope="module")
def series() -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Distances of the two rows by spacing and whether both runs are corrected."""
    found = defaultdict(list)
    for path in sorted(ANALYSIS.glob("growth-*.json")):
        for one in json.loads(path.read_text())["series"]:
            kinds = {"correction" in one["run"], "correction" in one["versus"]}
            if len(kinds) == 1:
                found[path.stem.rpartition("-")[2], *kinds].append(one)
    return found


def test_single_images_grow_as_the_page_says(
    series: dict[tuple[str, bool], list[dict[str, Any]]],
) -> None:
    count = {}
    for key, both in series.items():
        assert len(both) == 2
        images = np.concatenate([one["distance"] for one in both], axis=1).T
        kinds = [fit_growth(image.tolist())["better"] for image in images]
        count[key] = Counter(kinds)
        assert len(kinds) == 32
        assert count[key] == sum((Counter(one["fits_of_images"]) for one in both), Counter())
    page, readme = (" ".join(path.read_text().split()) for path in (PAGE, PAGES[0]))
    assert count["quad", False] == {"flattening": 32}
    assert "so do the means, and all 32 single images" in page
    plain, corrected = count["uniform", False], count["uniform", True]
    assert (
        f"of the single images {plain['exponential']} of 32 do, {plain['linear']} like a line, "
        f"{plain['flattening']} flatten out" in page
    )
    assert f"{corrected['exponential']} of 32 images exponentially" in page
    without, along = plain["exponential"], corrected["exponential"]
    assert f"in {without} of 32 images, and in {along} where" in readme
    told = f"in {along} of 32 images where both runs are corrected and {without} where neither is"
    assert told in page


def test_means_grow_by_the_rates_the_page_says(
    series: dict[tuple[str, bool], list[dict[str, Any]]],
) -> None:
    for key in (("uniform", False), ("uniform", True)):
        rates = {f"{math.expm1(one['fit']['exponential']['rate']):.3f}" for one in series[key]}
        assert rates == {"0.017", "0.014"}
    page = " ".join(PAGE.read_text().split())
    assert "by 1.7 (W8A8) and 1.4 % a step" in page
    assert "the means grow in the same way, by 1.7 and 1.4 %" in page


@pytest.mark.parametrize(
    ("row", "name"), [("W8A8", "w8a8-quad"), ("DeepCache N=10", "deepcache-n10-quad")]
)
def test_the_study_of_a_budget_runs_what_was_recommended(row: str, name: str) -> None:
    found = json.loads((ANALYSIS / f"recommendation-{name}.json").read_text())
    study = load(str(ROOT / "configs" / "embedded" / "budgeted.yaml"))
    (variant,) = (one for one in study.experiments() if one.name == f"{row} + IEC within 10 %")
    assert variant.callbacks == found["callbacks"]
    assert found["budget"] == 0.1
