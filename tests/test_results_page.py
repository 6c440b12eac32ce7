"""What README and docs say was found is what the published results.json files hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from iec_eval.results import Results, read_results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "correctors.md"]
PUBLISHED = [read_results(path) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]

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
