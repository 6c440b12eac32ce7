"""``iec-eval compare``: what may be compared, the differences, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile, Incompatible, UnknownName
from iec_eval.influence import read_estimates, write_estimates
from iec_eval.intervals import Estimate
from iec_eval.provenance import recorded_settings
from iec_eval.report.compare import compare, difference_interval
from iec_eval.report.experiments import Run, apart
from iec_eval.report.wording import judgement
from iec_eval.results import Cost, Measurement, Results, Variant, read_results, write_results

Ci95 = tuple[float, float] | None
NUMBERS = count()


def row(name: str, fid: float, ci95: Ci95 = None, **more: Any) -> Variant:
    """A finished row, of another experiment than those made before unless it has a fingerprint."""
    cost = Cost(macs_per_image=more.pop("macs", 2e8))
    metrics = {"fid": Measurement(value=fid, ci95=ci95), "is": Measurement(value=5.0)}
    named = {"fingerprint": f"f{next(NUMBERS)}", **more}
    return Variant(name=name, metrics=metrics, cost=cost, **named)


def run(label: str, *rows: Variant, seed: int | None = 0, **more: Any) -> Run:
    settings = more.pop("settings", {})
    parts: dict[str, Any] = {"study": label, "images": 2000, "protocol": {"id": "p"}, **more}
    settings = None if seed is None else {"images": {"seed": seed}, **settings}
    return Run(label, Results(variants=list(rows), **parts), settings)


def quantized(bits: int) -> list[dict[str, Any]]:
    return [{"name": "quantizer", "bits": bits}]


def two() -> list[Run]:
    """Two runs with one row in common, which is a different experiment in each."""
    one = row("W8A8", 10.0, (9.7, 10.3), efficiency=quantized(8))
    other = row("W8A8", 9.0, (8.6, 9.4), macs=3e8, efficiency=quantized(9))
    return [run("one", one, row("only here", 1.0)), run("two", other, row("new", 2.0))]


MARKDOWN = """\
| row  | run |               fid ↓ |           difference | verdict | MACs/image | MACs vs one |
| ---- | --- | ------------------: | -------------------: | ------: | ---------: | ----------: |
| W8A8 | one | 10.00 [9.70, 10.30] |                    - |       - |      200 M |       1.00x |
| W8A8 | two |   9.00 [8.60, 9.40] | -1.00 [-1.50, -0.50] |  better |      300 M |       1.50x |

2,000 images per row; differences are from one.

Intervals of differences are unpaired, those of independent measurements, and too wide rather \
than too narrow, as the runs share their noise: there is no fitting influence.safetensors \
(evaluate again).

Other experiments in one and two under one name: W8A8 differs in \
efficiency.quantizer.bits (8 and 9).

Only in one: only here.

Only in two: new."""


def test_markdown_whole() -> None:
    assert compare(two(), "md", metrics=["fid"]) == MARKDOWN


def test_every_metric_has_a_block_and_says_where_noise_may_be_all() -> None:
    text = compare(two(), "md")
    assert text.count("| row ") == 2
    assert "\n\nis has no interval: its differences may be noise, and are not judged.\n\n" in text


def test_json_holds_every_number_unrounded() -> None:
    found = json.loads(compare(two(), "json", rows=["W8A8"], metrics=["fid"]))
    assert [one["run"] for one in found["runs"]] == ["one", "two"]
    first, second = found["entries"]
    assert (first["difference"], first["judgement"]) == (None, None)
    assert second["difference"] == -1.0
    assert second["difference_ci95"] == pytest.approx([-1.5, -0.5])
    assert (second["versus"], second["judgement"]) == ("one", "better")
    assert (first["paired"], second["paired"]) == (None, False)


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


def influences(seed: int, shared: Tensor, scale: float) -> Estimate:
    own = torch.randn(len(shared), generator=torch.Generator().manual_seed(seed)).double()
    return Estimate(10.0 - seed, shared + scale * own)


def with_estimates(runs: list[Run], fids: list[Estimate]) -> list[Run]:
    return [replace(r, estimates={"W8A8": {"fid": e}}) for r, e in zip(runs, fids, strict=True)]


def test_runs_of_one_noise_are_compared_image_by_image() -> None:
    shared = torch.randn(2000, generator=torch.Generator().manual_seed(9)).double()
    fids = [influences(seed, shared, 0.1) for seed in (0, 1)]
    runs = with_estimates(two(), fids)
    entry = json.loads(compare(runs, "json", metrics=["fid"]))["entries"][1]
    assert entry["paired"] is True
    difference = fids[1].influence - fids[0].influence  # type: ignore[operator]
    half = 1.959964 * float(difference.std()) / 2000**0.5
    assert entry["difference_ci95"] == pytest.approx([-1 - half, -1 + half], abs=1e-9)
    text = compare(runs, "md", metrics=["fid"])
    assert "differences are paired: the runs start from the same noise, image by image.\n" in text
    assert "unpaired" not in text


def test_runs_of_other_noise_are_not_paired_whatever_they_keep() -> None:
    shared = torch.zeros(2000).double()
    fids = [influences(seed, shared, 1.0) for seed in (0, 1)]
    one, other = with_estimates(two(), fids)
    runs = [one, replace(other, settings={"images": {"seed": 5}})]
    entry = json.loads(compare(runs, "json", metrics=["fid"]))["entries"][1]
    assert (entry["paired"], entry["difference_ci95"]) == (False, pytest.approx([-1.5, -0.5]))
    assert "paired: the runs start" not in compare(runs, "md")


def test_of_three_runs_it_is_told_which_are_paired() -> None:
    shared = torch.zeros(2000).double()
    third = run("three", row("W8A8", 9.5, (9.1, 9.9), efficiency=quantized(7)))
    runs = [*with_estimates(two(), [influences(s, shared, 1.0) for s in (0, 1)]), third]
    text = compare(runs, "md", metrics=["fid"])
    assert "image by image (two)." in text
    assert "(evaluate again) (three)." in text


def test_what_images_contribute_is_read_back_where_it_fits(tmp_path: Path) -> None:
    rows = [row("A", 1.5, fingerprint="a"), row("B", 2.5, fingerprint="b")]
    results = run("one", *rows).results
    made = {
        "A": {"fid": Estimate(1.5, torch.arange(3.0).double()), "is": Estimate(5.0)},
        "B": {"fid": Estimate(9.0), "is": Estimate(5.0, without=torch.ones(20).double())},
    }
    assert read_estimates(tmp_path, results) is None
    write_estimates(tmp_path, results, made)
    found = read_estimates(tmp_path, results)
    assert found is not None
    assert torch.equal(found["A"]["fid"].influence, made["A"]["fid"].influence)  # type: ignore[arg-type]
    assert found["B"].keys() == {"is"}  # its fid was 9.0 when that was written
    assert torch.equal(found["B"]["is"].without, torch.ones(20).double())  # type: ignore[arg-type]
    other = run("one", row("A", 1.5, fingerprint="c")).results
    assert read_estimates(tmp_path, other) == {"A": {}}
    content = bytearray((tmp_path / "influence.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "influence.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match="checksum"):
        read_estimates(tmp_path, results)


def test_rows_of_two_runs_differ_as_rows_of_one_run_do(
    cli: Callable[..., Result], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """The same two rows in one run and in two: one difference, one interval."""

    def launch(name: str, *variants: dict[str, Any]) -> Path:
        place = tmp_path / name
        place.mkdir()
        study = write_study(place, images={"count": 40}, controls=[], variants=list(variants))
        assert cli("launch", study, "-o", place / "out").exit_code == 0
        return place / "out"

    cache = {"efficiency": [{"name": "deepcache", "interval": 3}]}
    corrected = {**cache, "callbacks": [{"name": "iec"}]}
    both = launch("both", {"name": "A", **cache}, {"name": "B", **corrected})
    known = read_results(both / "results.json").variants[1].comparisons
    wanted = {one.metric: (one.value, list(one.ci95)) for one in known if one.ci95}
    assert wanted
    folders = [launch("one", {"name": "A", **cache}), launch("two", {"name": "A", **corrected})]

    def differences() -> dict[str, Any]:
        found = json.loads(cli("compare", *folders, "--json").stdout)["entries"][1::2]
        return {one["metric"]: one for one in found if one["difference_ci95"]}

    found = differences()
    assert {m: (e["difference"], e["difference_ci95"]) for m, e in found.items()} == wanted
    assert all(entry["paired"] for entry in found.values())
    (folders[0] / "influence.safetensors").unlink()
    for metric, entry in differences().items():
        (low, high), (lower, higher) = wanted[metric][1], entry["difference_ci95"]
        assert entry["paired"] is False
        assert lower < low < high < higher


def test_lopsided_intervals_stay_lopsided() -> None:
    assert difference_interval(5.0, (2.0, 5.0), 1.0, (1.0, 1.0)) == (1.0, 4.0)
    assert difference_interval(1.0, (1.0, 1.0), 5.0, (2.0, 5.0)) == (-4.0, -1.0)
    assert difference_interval(1.0, None, 5.0, (2.0, 5.0)) is None


def test_a_judgement_needs_an_interval_off_zero_and_a_direction() -> None:
    assert judgement((-2.0, -1.0), False) == "better"
    assert judgement((-2.0, -1.0), True) == "worse"
    assert judgement((-1.0, 0.0), False) == "not distinguishable"
    assert judgement(None, False) is judgement((1.0, 2.0), None) is None


def edges(label: str, value: float, directions: dict[str, bool]) -> Run:
    measured = {"edges": Measurement(value=value, ci95=(value - 0.1, value + 0.1))}
    only = row("W8A8", 1.0).model_copy(update={"metrics": measured})
    return run(label, only, directions=directions)


@pytest.mark.parametrize(("higher", "said"), [(True, "better"), (False, "worse"), (None, None)])
def test_numbers_of_plugins_are_judged_by_the_direction_in_the_results(
    higher: bool | None, said: str | None
) -> None:
    directions = {} if higher is None else {"edges": higher}
    runs = [edges("one", 1.0, {}), edges("two", 2.0, directions)]  # one is from before
    assert json.loads(compare(runs, "json"))["entries"][1]["judgement"] == said
    silent = "edges is not judged: nothing says which way it improves." in compare(runs, "md")
    assert silent == (higher is None)
    assert ("| edges ↑ |" in compare(runs, "md").replace("  ", "")) == (higher is True)


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
    assert f"\n\nW8A8 in two [{status}]: power cut\n\n" in text
    found = json.loads(compare([run("two", broken), runs[0]], "json", metrics=["fid"]))
    assert [one["without"] for one in found["entries"]] == [None, "no value in two"]
    assert found["entries"][0]["error"] == "power cut"


def test_what_was_measured_differently_is_refused_with_the_reason() -> None:
    one = two()[0]
    with pytest.raises(Incompatible, match=r"protocols, which differ in id \('p' and 'q'\)"):
        compare([one, run("two", row("W8A8", 1.0), protocol={"id": "q"})], "md")
    with pytest.raises(Incompatible, match=r"\(2000 in one, 500 in two\)"):
        compare([one, run("two", row("W8A8", 1.0), images=500)], "md")


@pytest.mark.parametrize(("seed", "told"), [(1, "seed 1"), (None, "unknown, no manifest.json")])
def test_without_an_interval_runs_of_other_noise_have_no_difference(
    seed: int | None, told: str
) -> None:
    one, other = two()[0], run("two", row("W8A8", 9.0, (8.6, 9.4)), seed=seed)
    text = compare([one, other], "md")
    assert f"for runs that share theirs (one: seed 0; two: {told})." in text
    assert "is has no interval, and the runs do not share their noise" in text
    of_fid, of_is = json.loads(compare([one, other], "json"))["entries"][1::2]
    assert (of_fid["difference"], of_fid["judgement"]) == (-1.0, "better")
    assert (of_is["difference"], of_is["without"]) == (None, "no interval, and other noise")


def test_a_difference_within_one_experiment_is_not_the_noises() -> None:
    rows = [row("W8A8", fid, (fid - 0.1, fid + 0.1), fingerprint="same") for fid in (10.0, 9.0)]
    runs = [run(label, one) for label, one in zip(("one", "two"), rows, strict=True)]
    line, text = compare(runs, "md", metrics=["fid"]).splitlines()[3], compare(runs, "md")
    assert [cell.strip() for cell in line.split("|")[4:6]] == ["-1.00", "same experiment"]
    assert "better" not in text
    assert "same experiment: model, sampler, parts and noise agree" in text
    entry = json.loads(compare(runs, "json"))["entries"][1]
    assert (entry["same_experiment"], entry["difference_ci95"]) == (True, None)


def test_rows_of_one_name_are_told_apart_by_all_that_is_known_of_them() -> None:
    def told(here: Variant, there: Variant, **settings: Any) -> str:
        first = run("one", here, settings={"model": {"name": "m"}, "samplers": {"A": {"steps": 5}}})
        return apart("A", first, run("two", there, settings=settings))

    plain, cached = row("A", 1.0), row("A", 1.0, efficiency=[{"name": "cache", "cut": 1}])
    samplers = {"B": {"steps": 9}, "A": {"steps": 7}}
    assert told(plain, plain, model={"name": "other"}) == ""  # one fingerprint: one experiment
    other = row("A", 2.0)
    assert told(plain, other, samplers=samplers) == "sampler.steps (5 and 7)"
    assert told(plain, other, model={"name": "n"}) == "model.name ('m' and 'n')"
    assert told(plain, cached) == "efficiency.cache (not there and there)"
    assert told(plain, other).startswith("their fingerprints, for a reason")
    assert apart("B", run("one", plain), run("two", other)) == ""


def test_calibration_tells_rows_apart_only_where_something_is_calibrated() -> None:
    def told(**parts: Any) -> str:
        runs = [
            run(str(n), row("A", 1.0, **parts), settings={"calibration": {"seed": n}})
            for n in range(2)
        ]
        return apart("A", *runs)

    assert told(efficiency=quantized(8)) == "calibration.seed (0 and 1)"
    assert told().startswith("their fingerprints")


def test_runs_without_a_row_in_common_and_runs_given_twice_are_refused() -> None:
    runs = [run("one", row("A", 1.0)), run("two", row("B", 1.0), row("C", 1.0))]
    with pytest.raises(Incompatible, match=r"same name \(one: A; two: B, C\)"):
        compare(runs, "md")
    with pytest.raises(ConfigError, match="one is given twice"):
        compare([runs[0], runs[0]], "md")


def test_unknown_names_and_too_few_runs_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown row 'W8A9'; did you mean 'W8A8'"):
        compare(two(), "md", rows=["W8A9"])
    with pytest.raises(UnknownName, match="unknown metric 'fud'; did you mean 'fid'"):
        compare(two(), "md", metrics=["fud"])
    with pytest.raises(ConfigError, match="two or more runs"):
        compare(two()[:1], "md")
    with pytest.raises(ConfigError, match="wanted md or json"):
        compare(two(), "csv")


def test_a_manifest_tells_what_images_are_made_of_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert recorded_settings(path) is None
    path.write_text('{"study": {"images": {"seed": 3, "count": 9}}}')  # as older ones are
    assert recorded_settings(path) == {"images": {"seed": 3}}
    more = {"model_files": {"a": "b"}, "samplers": {"row": {"name": "ddim"}}}
    study = {"model": {"name": "m"}, "calibration": {"seed": 1}}
    made = {"study": {**study, "images": {"seed": 3}, "study": "s"}, **more, "git": "abc"}
    path.write_text(json.dumps(made))
    assert recorded_settings(path) == {"images": {"seed": 3}, **study, **more}
    for text in ("{", "[]", '{"study": {}}', '{"study": {"images": 5}}'):
        path.write_text(text)
        with pytest.raises(CorruptFile, match="not the manifest of a run"):
            recorded_settings(path)


def test_the_command_compares_run_folders(cli: Callable[..., Result], tmp_path: Path) -> None:
    runs = two()
    folders = [tmp_path / one.label for one in runs]
    for folder, one in zip(folders, runs, strict=True):
        write_results(folder / "results.json", one.results)
        (folder / "manifest.json").write_text('{"study": {"images": {"seed": 0}}}')
    shown = cli("compare", *folders, "--metric", "fid", "--row", "W8A8")
    assert shown.exit_code == 0
    assert shown.stdout == compare(runs, "md", metrics=["fid"], rows=["W8A8"]) + "\n"
    found = json.loads(cli("compare", folders[0], folders[1], "--json").stdout)
    assert found == json.loads(compare(runs, "json"))
    (folders[1] / "manifest.json").write_text('{"study": {"images": {"seed": 1}}}')
    assert "(one: seed 0; two: seed 1)" in cli("compare", *folders).stdout
    twice = cli("compare", folders[0], f"{folders[0]}/results.json")
    assert (twice.exit_code, "one is given twice" in twice.stderr) == (2, True)


def test_runs_of_one_study_are_named_by_their_folders(
    cli: Callable[..., Result], tmp_path: Path
) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for place, folder in enumerate(folders):
        protocol = {"id": "q" if place == 2 else "p"}
        one = run("mine", row("W8A8", 9.0 + place), protocol=protocol)
        write_results(folder / "results.json", one.results)
    for command in ("table", "compare"):
        refused = cli(command, folders[0], folders[2])
        assert refused.exit_code == 2
        assert "of 'run' and 'c' were measured with different protocols" in refused.stderr
    broken = run("mine", row("W8A8", 1.0, status="partial", error="power cut"))
    write_results(folders[1] / "results.json", broken.results)
    assert f"\n{folders[1]}, W8A8 [partial]: power cut\n" in cli("table", *folders[:2]).stdout
    assert "\nW8A8 [partial]: power cut\n" in cli("table", folders[1]).stdout
    found = json.loads(cli("table", *folders[:2], "--json").stdout)
    assert [one["study"] for one in found] == [str(folder) for folder in folders[:2]]
    assert [one["study"] for one in json.loads(cli("table", folders[0], "--json").stdout)] == [
        "mine"
    ]
