"""Several seeds a row: each is the run it would be alone, and the row is their mean."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, Toy

from iec_eval.intervals import GROUPS, Estimate
from iec_eval.results import Results, Variant, read_results
from iec_eval.study import load

SEEDS = [7, 3]
Cli = Callable[..., Result]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_study: Write, toy: Toy) -> Path:
    """A study of 40 images, with a metric that compares with the full-precision row."""
    folder = tmp_path_factory.mktemp("seeds")
    write_study(
        folder,
        images={"seed": 7, "count": 40},
        metrics=[*toy.metrics(), {"name": "psnr"}],
        execution={"batch_size": 20, "chunk_size": 20, "threads": 1, "accelerator": "cpu"},
    )
    return folder


@pytest.fixture(scope="module")
def alone(place: Path, cli: Cli) -> dict[int, Results]:
    """The results of each seed in a run folder of its own."""
    return {seed: launched(cli, place, f"seed-{seed}", f"images.seed={seed}") for seed in SEEDS}


@pytest.fixture(scope="module")
def together(place: Path, cli: Cli, alone: dict[int, Results]) -> Results:
    """The results of both seeds, in a folder where the first was made before."""
    launched(cli, place, "both", f"images.seed={SEEDS[0]}")
    return launched(cli, place, "both", *several())


def several(seeds: list[int] = SEEDS) -> list[str]:
    """Overrides that give a study several seeds instead of its one."""
    return [f"images={json.dumps({'seeds': seeds, 'count': 40})}"]


def launched(cli: Cli, place: Path, out: str, *overrides: str) -> Results:
    changed = [word for override in overrides for word in ("-s", override)]
    found = cli("launch", place / "study.yaml", "-o", place / out, *changed)
    assert found.exit_code == 0, found.output
    return read_results(place / out / "results.json")


def row_of(results: Results, name: str) -> Variant:
    return next(row for row in results.variants if row.name == name)


def test_a_row_is_the_mean_of_what_each_seed_gives_alone(
    together: Results, alone: dict[int, Results]
) -> None:
    assert together.seeds == SEEDS
    for row in together.variants:
        parts = [row_of(alone[seed], row.name) for seed in SEEDS]
        assert row.metrics.keys() == parts[0].metrics.keys()
        for name, found in row.metrics.items():
            values = [part.metrics[name].value for part in parts]
            assert found.by_seed == values
            assert found.value == pytest.approx(statistics.fmean(values), rel=1e-12)
            assert found.spread == pytest.approx(np.std(values, ddof=1), rel=1e-12)
            assert len(set(values)) == 2


def test_seeds_are_independent_so_the_mean_is_surer_by_their_number(
    together: Results, alone: dict[int, Results]
) -> None:
    def half(interval: tuple[float, float]) -> float:
        return (interval[1] - interval[0]) / 2

    for row in together.variants:
        parts = [row_of(alone[seed], row.name) for seed in SEEDS]
        for name, found in row.metrics.items():
            if found.ci95 is None:
                continue
            each = [half(part.metrics[name].ci95) for part in parts]
            # each seed's influence values are centred, and have the variance of N - 1, not 2 N - 1
            assert half(found.ci95) == pytest.approx(math.hypot(*each) / 2, rel=0.01)
            if found.delta:
                each = [half(part.metrics[name].delta.ci95) for part in parts]
                assert half(found.delta.ci95) == pytest.approx(math.hypot(*each) / 2, rel=0.01)
                changes = [part.metrics[name].delta.value for part in parts]
                assert found.delta.spread == pytest.approx(np.std(changes, ddof=1), rel=1e-9)


def test_numbers_and_differences_have_intervals(alone: dict[int, Results]) -> None:
    for row in alone[SEEDS[0]].variants:
        for name, measured in row.metrics.items():
            numbers = [measured, *([measured.delta] if measured.delta else [])]
            for value, ci95 in [(one.value, one.ci95) for one in numbers]:
                if name == "is-std-toy":
                    assert ci95 is None
                else:
                    assert ci95[0] < value < ci95[1]
                    assert sum(ci95) / 2 == pytest.approx(value, abs=1e-9)


def test_a_row_is_judged_by_all_its_seeds(together: Results, alone: dict[int, Results]) -> None:
    row = row_of(together, "cached + IEC")
    assert {(one.versus, one.relation) for one in row.comparisons} == {("cached", "base")}
    for one in row.comparisons:
        gaps = [
            next(o.value for o in part.comparisons if o.metric == one.metric)
            for part in (row_of(alone[seed], row.name) for seed in SEEDS)
        ]
        assert one.value == pytest.approx(statistics.fmean(gaps), rel=1e-9, abs=1e-12)
        assert (one.judgement is None) == (one.metric == "is-std-toy")


def test_images_of_a_seed_made_before_are_kept(place: Path, together: Results) -> None:
    folders = {path.parent.name for path in (place / "both").glob("*/chunks")}
    separate = {
        path.parent.name for seed in SEEDS for path in (place / f"seed-{seed}").glob("*/chunks")
    }
    assert folders == separate
    assert len(folders) == 2 * len(VARIANTS)
    first, both = ((place / out).glob("cached-*/chunks/*.json") for out in ("seed-7", "both"))
    assert {path.name for path in first} == {path.name for path in both}


def test_costs_are_those_of_one_seed(together: Results, alone: dict[int, Results]) -> None:
    for row in together.variants:
        one = row_of(alone[SEEDS[0]], row.name).cost
        same = ("evaluations_full", "evaluations_cached", "macs_per_image", "relative_macs")
        for key in same:
            assert getattr(row.cost, key) == getattr(one, key)
        assert row.cost.seconds_per_image is not None


def test_show_and_status_and_table_tell_of_the_seeds(
    place: Path, cli: Cli, together: Results
) -> None:
    study = [place / "study.yaml", "-o", place / "both", "-s", *several([*SEEDS, 9])]
    shown = json.loads(cli("show", *study, "--json").output)
    assert [row["name"] for row in shown["rows"]] == [row["name"] for row in VARIANTS]
    assert {(row["images"], row["missing"]) for row in shown["rows"]} == {(120, 40)}
    assert "40 of 120 images of 3 seeds missing" in cli("show", *study).output
    assert "cached (seed 3)" in cli("status", place / "both").output
    text = cli("table", place / "both").output
    assert "seeds 7, 3" in text
    fid = row_of(together, "cached").metrics["fid-toy"]
    assert f" ± {fid.spread:.0f}" in text
    page = (place / "both" / "report.html").read_text()
    assert "±" in page
    records = json.loads(cli("table", place / "both", "--json").output)
    assert {record["seeds"] for record in records} == {"7 3"}
    assert records[1]["fid-toy_spread"] == fid.spread


def test_one_seed_that_fails_leaves_its_row_without_numbers_and_verdicts(
    tmp_path: Path, write_study: Write, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path, images={"seeds": SEEDS, "count": 10})
    out = tmp_path / "out"
    assert cli("launch", study, "-o", out).exit_code == 0
    whole = read_results(out / "results.json")
    (lost,) = [
        path
        for path in out.glob("cached-*")
        if path.name.rpartition("-")[2] == fingerprint(study, "cached", 3)[:8]
    ]
    for path in (lost / "chunks").iterdir():
        path.unlink()
    for path in lost.glob("features/*/*"):
        path.unlink()
    assert cli("evaluate", study, "-o", out).exit_code == 1
    rows = {row.name: row for row in read_results(out / "results.json").variants}
    assert rows["cached"].status == "partial"
    assert rows["cached"].error is not None
    assert rows["cached"].error.startswith("cached (seed 3): ")
    assert "seed 7" not in rows["cached"].error
    assert rows["cached"].metrics == {}
    assert rows["cached + IEC"].status == "done"
    assert rows["cached + IEC"].comparisons == []
    assert row_of(whole, "cached + IEC").comparisons != []


def fingerprint(study: Path, row: str, seed: int) -> str:
    from iec_eval.session import prepare

    jobs = prepare(str(study), [], None).jobs
    return next(job.plan.fingerprint for job in jobs if job.name == f"{row} (seed {seed})")


def test_seeds_share_what_is_calibrated(tmp_path: Path, write_study: Write, cli: Cli) -> None:
    quantized = {"name": "quantized", "efficiency": [{"name": "timestep-quantizer"}]}
    study = write_study(
        tmp_path,
        images={"seeds": SEEDS, "count": 4},
        calibration={"seed": 1, "images": 4},
        variants=[quantized],
    )
    assert cli("launch", study, "-o", tmp_path / "out").exit_code == 0
    assert len(list((tmp_path / "out" / "artifacts").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ({"seed": 1, "seeds": [1, 2]}, "seed and seeds are both given"),
        ({"seeds": [2, 2]}, "wanted each once"),
        ({"seeds": []}, "at least 1 item"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"seeds": 3}, "list"),
    ],
)
def test_wrong_seeds_are_refused(
    images: dict[str, Any], complaint: str, tmp_path: Path, write_study: Write, cli: Cli
) -> None:
    found = cli("show", write_study(tmp_path, images={"count": 4, **images}))
    assert found.exit_code == 2
    assert complaint in found.output


def test_the_report_of_several_seeds_is_written_again(
    place: Path, cli: Cli, together: Results
) -> None:
    arguments = ("report", place / "study.yaml", "-o", place / "both")
    assert cli(*arguments, "-s", several()[0]).exit_code == 0
    told = cli(*arguments, "-s", several(SEEDS[::-1])[0])
    assert (told.exit_code, "made otherwise: " in told.stderr) == (2, True)


@pytest.mark.parametrize("seeds", [[5, 6], [0, 7], [3]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_study_of_seeds_can_be_written_and_read_again(
    seeds: list[int], whole: bool, tmp_path: Path, write_study: Write
) -> None:
    study = load(str(write_study(tmp_path, images={"seeds": seeds, "count": 4})))
    assert study.images.seed == seeds[0]
    written = study.model_dump(mode="json", exclude_defaults=not whole)
    again = type(study).model_validate(written)
    assert [one.seed for one in again.images.each()] == seeds
    assert again == study


# --- the mean of estimates ------------------------------------------------------------------------


def test_a_mean_of_jackknifed_numbers_has_the_error_of_a_mean() -> None:
    random = torch.Generator().manual_seed(0)
    each = [
        Estimate(float(seed), without=torch.randn(GROUPS, generator=random, dtype=torch.float64))
        for seed in range(3)
    ]
    found = Estimate.mean(each)
    errors = [one.standard_error() or 0.0 for one in each]
    assert found.value == 1.0
    assert found.spread() == 1.0
    assert found.standard_error() == pytest.approx(math.hypot(*errors) / 3, rel=1e-12)
    one_seed = Estimate.mean(each[:1])
    assert one_seed.interval() == each[0].interval()
    assert one_seed.spread() is None


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_of_a_mean_over_seeds_hold_its_truth(grouped: bool) -> None:
    """A uniform variable's second moment, 1/3: 3 seeds of 60 images, 3,000 times."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(3000):
        seeds = [_second_moment(random.uniform(size=60), grouped) for _ in range(3)]
        low, high = Estimate.mean(seeds).interval() or (0.0, 0.0)
        held += low <= 1 / 3 <= high
    assert 0.935 < held / 3000 < 0.965


def _second_moment(values: np.ndarray, grouped: bool) -> Estimate:
    squares = torch.from_numpy(values**2)
    if not grouped:
        return Estimate(float(squares.mean()), squares - squares.mean())
    groups = squares.reshape(GROUPS, -1)
    others = (squares.sum() - groups.sum(1)) / (len(squares) - groups.shape[1])
    return Estimate(float(squares.mean()), without=others)
