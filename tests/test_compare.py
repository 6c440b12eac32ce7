"""``iec-eval compare``: what may be compared, the differences, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from iec_eval.errors import ConfigError, CorruptFile, Incompatible, UnknownName
from iec_eval.provenance import recorded_images
from iec_eval.report.compare import Run, compare, difference_interval, judgement
from iec_eval.results import Cost, Measurement, Results, Variant, write_results

Ci95 = tuple[float, float] | None


def row(name: str, fid: float, ci95: Ci95 = None, **more: Any) -> Variant:
    cost = Cost(macs_per_image=more.pop("macs", 2e8))
    metrics = {"fid": Measurement(value=fid, ci95=ci95), "is": Measurement(value=5.0)}
    return Variant(name=name, fingerprint="f", metrics=metrics, cost=cost, **more)


def run(label: str, *rows: Variant, seed: int | None = 0, **more: Any) -> Run:
    parts: dict[str, Any] = {"study": label, "images": 2000, "protocol": {"id": "p"}, **more}
    images = None if seed is None else {"seed": seed}
    return Run(label, Results(variants=list(rows), **parts), images)


def two() -> list[Run]:
    first = run("one", row("W8A8", 10.0, (9.7, 10.3)), row("only here", 1.0))
    return [first, run("two", row("W8A8", 9.0, (8.6, 9.4), macs=3e8), row("new", 2.0))]


MARKDOWN = """\
| row  | run |                 fid |           difference | verdict | MACs/image | relative MACs |
| ---- | --- | ------------------: | -------------------: | ------: | ---------: | ------------: |
| W8A8 | one | 10.00 [9.70, 10.30] |                    - |       - |      200 M |         1.00x |
| W8A8 | two |   9.00 [8.60, 9.40] | -1.00 [-1.50, -0.50] |  better |      300 M |         1.50x |

2,000 images per row; differences are from one.

Intervals of differences are unpaired: each run was scored on its own, so they are those of \
independent measurements, and too wide rather than too narrow where runs share their noise.

In one run only: only here, new."""


def test_markdown_whole() -> None:
    assert compare(two(), "md", metrics=["fid"]) == MARKDOWN


def test_every_metric_has_a_block_and_says_where_noise_may_be_all() -> None:
    text = compare(two(), "md")
    assert text.count("| row ") == 2
    assert "Differences without an interval may be noise." in text


def test_json_holds_every_number_unrounded() -> None:
    found = json.loads(compare(two(), "json", rows=["W8A8"], metrics=["fid"]))
    assert found["paired"] is False
    assert [one["run"] for one in found["runs"]] == ["one", "two"]
    first, second = found["entries"]
    assert (first["difference"], first["judgement"]) == (None, None)
    assert second["difference"] == -1.0
    assert second["difference_ci95"] == pytest.approx([-1.5, -0.5])
    assert (second["versus"], second["judgement"]) == ("one", "better")


def test_intervals_of_differences_cover_the_truth() -> None:
    """Two independent normal measurements: 95 % of the intervals hold the true difference."""
    draws = torch.randn((4000, 2), generator=torch.Generator().manual_seed(3)).double()
    spread = torch.tensor([0.5, 1.2])
    measured = torch.tensor([3.0, 1.0]) + spread * draws
    half = 1.959964 * spread
    hits = 0
    for value, other in measured.tolist():
        bounds = difference_interval(
            value, (value - half[0].item(), value + half[0].item()),
            other, (other - half[1].item(), other + half[1].item()),
        )  # fmt: skip
        assert bounds is not None
        hits += bounds[0] <= 2.0 <= bounds[1]
    assert 0.94 <= hits / len(measured) <= 0.96


def test_lopsided_intervals_stay_lopsided() -> None:
    assert difference_interval(5.0, (2.0, 5.0), 1.0, (1.0, 1.0)) == (1.0, 4.0)
    assert difference_interval(1.0, (1.0, 1.0), 5.0, (2.0, 5.0)) == (-4.0, -1.0)
    assert difference_interval(1.0, None, 5.0, (2.0, 5.0)) is None


def test_a_judgement_needs_an_interval_off_zero_and_a_direction() -> None:
    assert judgement("fid", (-2.0, -1.0)) == "better"
    assert judgement("is", (-2.0, -1.0)) == "worse"
    assert judgement("fid", (-1.0, 0.0)) == "not distinguishable"
    assert judgement("fid", None) is judgement("is_std", (1.0, 2.0)) is None


@pytest.mark.parametrize("status", ["failed", "partial"])
def test_an_unfinished_row_has_no_numbers(status: str) -> None:
    runs = two()
    broken = row("W8A8", 0.5, (0.4, 0.6), status=status, error="power cut")
    text = compare([runs[0], run("two", broken)], "md", metrics=["fid"])
    line = next(line for line in text.splitlines() if f"two [{status}]" in line)
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["-"] * 5
    text = compare([run("two", broken), runs[0]], "md", metrics=["fid"])
    assert "better" not in text
    assert "worse" not in text


def test_what_was_measured_differently_is_refused_with_the_reason() -> None:
    one = two()[0]
    with pytest.raises(Incompatible, match=r"protocols, which differ in id \('p' and 'q'\)"):
        compare([one, run("two", row("W8A8", 1.0), protocol={"id": "q"})], "md")
    with pytest.raises(Incompatible, match=r"\(2000 in one, 500 in two\)"):
        compare([one, run("two", row("W8A8", 1.0), images=500)], "md")


@pytest.mark.parametrize("seed", [1, None])
def test_other_seeds_are_refused_where_no_interval_tells_noise_from_effect(
    seed: int | None,
) -> None:
    one, other = two()[0], run("two", row("W8A8", 9.0, (8.6, 9.4)), seed=seed)
    told = "unknown" if seed is None else "1"
    with pytest.raises(Incompatible, match=rf"seeds \(0 in one, {told} in two\) and is has no"):
        compare([one, other], "md")
    assert "better" in compare([one, other], "md", metrics=["fid"])


def test_unknown_names_and_too_few_runs_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown row 'W8A9'; did you mean 'W8A8'"):
        compare(two(), "md", rows=["W8A9"])
    with pytest.raises(UnknownName, match="unknown metric 'fud'; did you mean 'fid'"):
        compare(two(), "md", metrics=["fud"])
    with pytest.raises(ConfigError, match="two or more runs"):
        compare(two()[:1], "md")
    with pytest.raises(ConfigError, match="wanted md or json"):
        compare(two(), "csv")


def test_a_manifest_tells_which_images_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert recorded_images(path) is None
    path.write_text('{"study": {"images": {"seed": 3, "count": 9}}}')
    assert recorded_images(path) == {"seed": 3}
    for text in ("{", "[]", '{"study": {}}', '{"study": {"images": 5}}'):
        path.write_text(text)
        with pytest.raises(CorruptFile, match="not the manifest of a run"):
            recorded_images(path)


def test_the_command_compares_run_folders(cli: Callable[..., Result], tmp_path: Path) -> None:
    folders = [tmp_path / one.label for one in two()]
    for folder, one in zip(folders, two(), strict=True):
        write_results(folder / "results.json", one.results)
        (folder / "manifest.json").write_text('{"study": {"images": {"seed": 0}}}')
    shown = cli("compare", *folders, "--metric", "fid", "--row", "W8A8")
    assert shown.exit_code == 0
    assert shown.stdout == compare(two(), "md", metrics=["fid"], rows=["W8A8"]) + "\n"
    found = json.loads(cli("compare", folders[0], folders[1], "--json").stdout)
    assert found == json.loads(compare(two(), "json"))
    (folders[1] / "manifest.json").write_text('{"study": {"images": {"seed": 1}}}')
    refused = cli("compare", *folders)
    assert refused.exit_code == 2
    assert "different seeds (0 in one, 1 in two)" in refused.stderr
