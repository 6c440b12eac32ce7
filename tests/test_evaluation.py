"""Every image is scored once, from features computed once; a study gives the same numbers again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, Toy
from torch import Tensor

from iec_eval import stages
from iec_eval.cost import evaluation_costs
from iec_eval.evaluation import by_network, evaluate, groups, protocol, score
from iec_eval.intervals import Estimate
from iec_eval.jobs import network_id
from iec_eval.metrics.base import Metric
from iec_eval.metrics.features import ClassifierFeatures, Features, ImageClassifier
from iec_eval.metrics.fid import FID
from iec_eval.metrics.inception_score import InceptionScore, InceptionScoreOptions
from iec_eval.metrics.paired import PSNR
from iec_eval.options import BaseOptions
from iec_eval.progress import Progress
from iec_eval.session import prepare
from iec_eval.training.classifier import save_features

COUNT = 10
VARIANT_KEYS = {
    "name",
    "fingerprint",
    "control",
    "simulated",
    "efficiency",
    "callbacks",
    "metrics",
    "cost",
    "paper",
    "doubt",
    "status",
    "error",
    "judge_of",
    "lacks",
    "comparisons",
}
COST_KEYS = {
    "evaluations_full",
    "evaluations_cached",
    "macs_per_image",
    "relative_macs",
    "bit_operations_per_image",
    "relative_bit_operations",
    "seconds_per_image",
    "relative_seconds",
    "weight_bytes",
}
REMARKS = {"paper": {"cached": {"fid": 4.5}}, "doubtful": {"cached": "two values are published"}}
SECONDS = ("seconds_per_image", "relative_seconds")


@dataclass(frozen=True)
class Run:
    """A study and its run folder."""

    study: Path
    out: Path
    cli: Callable[..., Result]

    def __call__(self, verb: str, *overrides: str) -> Result:
        changes = [word for override in overrides for word in ("-s", override)]
        return self.cli(verb, self.study, "-o", self.out, *changes)

    @property
    def results(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "results.json").read_text())
        return content

    @property
    def timeless(self) -> dict[str, Any]:
        """Results without the seconds they took."""
        results = self.results
        for row in results["variants"]:
            row["cost"] = {k: v for k, v in row["cost"].items() if k not in SECONDS}
        return results


@pytest.fixture(scope="module")
def make_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_study: Callable[..., Path],
    cli: Callable[..., Result],
) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        folder = tmp_path_factory.mktemp("run")
        variants = [{"name": "plain"}, *VARIANTS[1:]]
        return Run(write_study(folder, variants=variants, **changes), folder / "out", cli)

    return make


@pytest.fixture(scope="module")
def launched(make_run: Callable[..., Run]) -> Run:
    """A finished run with a control and the paper's numbers."""
    run = make_run(controls=["full-precision"], **REMARKS)
    assert run("launch").exit_code == 0
    return run


# --- the result file ----------------------------------------------------------------------------


def test_results_have_exactly_the_keys_of_the_schema(launched: Run) -> None:
    results = launched.results
    keys = {"schema", "study", "images", "seeds", "protocol", "directions", "controls", "variants"}
    assert results.keys() == keys
    assert (results["schema"], results["study"], results["images"]) == (1, "toy", COUNT)
    assert results["protocol"].keys() == {"fid", "is"}
    assert results["directions"] == {"fid-toy": False, "is-toy": True}  # a spread has none
    names = [row["name"] for row in results["variants"]]
    assert names == ["full precision", "plain", "cached", "cached + IEC"]
    for row in results["variants"]:
        assert row.keys() == VARIANT_KEYS
        assert row["cost"].keys() == COST_KEYS
        assert None not in row["cost"].values()
        assert row["metrics"].keys() == {"fid-toy", "is-toy", "is-std-toy"}
        assert row["control"] == (row["name"] == "full precision")
        assert (row["status"], row["error"], row["simulated"]) == ("done", None, False)
        for measured in row["metrics"].values():
            assert measured.keys() == {"value", "ci95", "delta", "by_seed", "spread"}
    assert [row["paper"] for row in results["variants"]] == [None, None, {"fid": 4.5}, None]
    doubts = [row["doubt"] for row in results["variants"]]
    assert doubts == [None, None, "two values are published", None]


def test_a_rows_numbers_are_its_own(launched: Run) -> None:
    control, plain, cached, _ = (row["metrics"] for row in launched.results["variants"])
    assert control == plain  # the same images, after and before others
    assert cached["fid-toy"]["value"] != plain["fid-toy"]["value"]


def test_differences_are_to_the_same_row_without_callbacks(launched: Run) -> None:
    rows = {row["name"]: row for row in launched.results["variants"]}
    both, cached = rows["cached + IEC"]["metrics"], rows["cached"]["metrics"]
    for name, measured in both.items():
        assert measured["delta"]["versus"] == "cached"
        assert measured["delta"]["value"] == measured["value"] - cached[name]["value"]
    assert all(measured["delta"] is None for measured in cached.values())


def test_a_corrected_row_is_compared_with_its_base(launched: Run) -> None:
    rows = {row["name"]: row for row in launched.results["variants"]}
    every = rows["cached + IEC"]["comparisons"]
    assert {one["relation"] for one in every} >= {"base", "full-precision"}
    found = {one["metric"]: one for one in every if one["relation"] == "base"}
    assert found.keys() == {"fid-toy", "is-toy", "is-std-toy"}
    for metric, one in found.items():
        delta = rows["cached + IEC"]["metrics"][metric]["delta"]
        assert (one["versus"], one["relation"]) == ("cached", "base")
        assert (one["value"], one["ci95"]) == (delta["value"], delta["ci95"])
        assert (one["ci95"], one["judgement"]) == (None, None)  # of so few images
    assert {one["versus"] for one in rows["cached"]["comparisons"]} == {"full precision"}
    assert rows["full precision"]["comparisons"] == rows["plain"]["comparisons"] == []


def test_costs_are_the_evaluations_that_were_made(launched: Run) -> None:
    rows = {row["name"]: row["cost"] for row in launched.results["variants"]}
    made = {n: (row["evaluations_full"], row["evaluations_cached"]) for n, row in rows.items()}
    # five steps, 0 and 3 of them full; IEC evaluates once more at each full one
    assert made == {
        "full precision": (5, 0),
        "plain": (5, 0),
        "cached": (2, 3),
        "cached + IEC": (4, 3),
    }
    assert (
        rows["full precision"]["relative_macs"] == rows["full precision"]["relative_seconds"] == 1
    )
    assert 2 / 5 < rows["cached"]["relative_macs"] < 1
    assert all(row["seconds_per_image"] > 0 for row in rows.values())


def test_the_files_of_a_run_are_there(launched: Run) -> None:
    wanted = {"study.yaml", "results.json", "table.md", "report.html", "gallery.png"}
    assert wanted | {"manifest.json", "influence.safetensors"} <= {
        path.name for path in launched.out.iterdir()
    }
    manifest = json.loads((launched.out / "manifest.json").read_text())
    assert manifest["fingerprints"] == {
        row["name"]: row["fingerprint"] for row in launched.results["variants"]
    }
    assert manifest["protocol"] == launched.results["protocol"]


def test_the_same_study_gives_the_same_numbers_in_another_folder(
    launched: Run, make_run: Callable[..., Run]
) -> None:
    again = make_run(controls=["full-precision"], **REMARKS)
    assert again("launch").exit_code == 0
    assert again.timeless == launched.timeless


def test_shards_and_evaluate_equal_launch(
    launched: Run, make_run: Callable[..., Run], cli: Callable[..., Result]
) -> None:
    parts = make_run(controls=["full-precision"], **REMARKS)
    for shard in ("1/2", "0/2"):
        done = cli("generate", parts.study, "-o", parts.out, "--shard", shard)
        assert done.exit_code == 0
    assert parts("evaluate").exit_code == 0
    assert parts.timeless == launched.timeless


# --- once ---------------------------------------------------------------------------------------


class Witness(Metric):
    """Keeps the images it is shown and their indices."""

    name = "witness"

    def __init__(self) -> None:
        super().__init__(BaseOptions())
        self.shown: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Any, indices: Tensor) -> None:
        self.shown.append((features, indices))

    def compute(self) -> dict[str, float]:
        return {"witnessed": float(sum(len(indices) for _, indices in self.shown))}


@pytest.mark.parametrize("count", [2, 5, 8, COUNT])
def test_every_index_is_scored_once_in_order_with_its_own_image(launched: Run, count: int) -> None:
    session = prepare(str(launched.study), [f"images.count={count}"], launched.out)
    job, metric = session.jobs[2], Witness()
    found = evaluate(job, [metric], Progress("", visible=False))
    assert found == [(metric, {"witnessed": Estimate(count)})]
    images, indices = (torch.cat(shown) for shown in zip(*metric.shown, strict=True))
    assert indices.tolist() == list(range(count))
    stored = torch.cat([job.folder.read_chunk(part).images for part in job.folder.finished()])
    assert torch.equal(images, stored[:count])


class Sharpness(Witness):
    """Two numbers, neither with the metric's own name."""

    name = "sharpness"
    higher_is_better = True

    def compute(self) -> dict[str, float]:
        return {"edges": 1.0, "edges-std": 0.1}


@pytest.mark.parametrize(("higher", "wanted"), [(True, {"edges": True}), (None, {})])
def test_numbers_improve_as_their_metric_says(
    launched: Run, monkeypatch: pytest.MonkeyPatch, higher: bool | None, wanted: dict[str, bool]
) -> None:
    monkeypatch.setattr(Sharpness, "higher_is_better", higher)
    session = prepare(str(launched.study), [], launched.out)
    (cost,) = evaluation_costs([session.firsts[0].plan])
    scored = score(session.jobs[0], [Sharpness()], cost, Progress("", visible=False))
    assert scored.row.metrics.keys() == {"edges", "edges-std"}
    assert scored.directions == wanted


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the feature network got."""
    calls: list[int] = []
    extract = ClassifierFeatures.extract

    def counted(network: ClassifierFeatures, images: Tensor) -> Features:
        calls.append(len(images))
        return extract(network, images)

    monkeypatch.setattr(ClassifierFeatures, "extract", counted)
    return calls


def test_a_failure_that_somebody_has_made_good_since_is_forgotten(
    launched: Run, tmp_path: Path
) -> None:
    """The features of a row failed in the evaluating job of a launch, and are there now."""
    out = tmp_path / "out"
    shutil.copytree(launched.out, out)
    session = prepare(str(launched.study), [], out)
    session.jobs[1].folder.write_failure("OutOfMemoryError: no", "", "an earlier launch")
    assert stages.score(session, heal=False).variants[1].status == "done"
    assert session.jobs[1].folder.failure() is None
    session.jobs[1].folder.write_failure("OutOfMemoryError: no", "", "an earlier launch")
    next(session.jobs[1].folder.path.glob("features/**/*.safetensors")).unlink()
    assert stages.score(session, heal=False).variants[1].status == "failed"


def test_single_precision_is_not_rounded_to_tf32(launched: Run) -> None:
    """PyTorch's default lets convolutions do so on GPUs that can."""
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = True
    prepare(str(launched.study), [], launched.out)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_features_are_computed_once_for_all_metrics(
    make_run: Callable[..., Run], extracted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    assert run("launch").exit_code == 0
    assert extracted == [4, 4, 2] * 3  # three rows of three chunks; two metrics
    first = run.results

    def refuse(*_: Any) -> None:
        raise AssertionError("features are there")

    monkeypatch.setattr(ClassifierFeatures, "extract", refuse)
    monkeypatch.setattr(ClassifierFeatures, "load", refuse)
    assert run("evaluate").exit_code == 0
    assert run("launch").exit_code == 0
    assert run.results == first


def test_only_new_images_are_looked_at(make_run: Callable[..., Run], extracted: list[int]) -> None:
    run = make_run()
    assert run("launch", "images.count=8").exit_code == 0
    extracted.clear()
    assert run("launch").exit_code == 0
    assert extracted == [2, 2, 2]
    assert run.results["images"] == COUNT


def test_damaged_features_are_computed_again(
    make_run: Callable[..., Run], extracted: list[int]
) -> None:
    run = make_run()
    assert run("launch").exit_code == 0
    first = run.results
    path = next(run.out.glob("cached-iec-*/features/*/000004-000007.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    extracted.clear()
    assert run("evaluate").exit_code == 0
    assert extracted == [4]
    assert run.results == first


def test_other_weights_have_other_features(launched: Run, toy: Toy, tmp_path: Path) -> None:
    (metric, other) = prepare(str(launched.study), [], launched.out).metrics
    assert [len(group) for _, group in by_network([metric, other])] == [2]
    assert metric.network is not None
    (folder,) = launched.out.glob("cached-iec-*/features/*")
    assert folder.name == network_id(metric.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_features(ImageClassifier(1, 8, classes=4, width=4), tmp_path / "net", "toy")
    assert network_id(ClassifierFeatures(tmp_path / "net")) != folder.name
    assert network_id(ClassifierFeatures(toy.features)) == folder.name


def test_numbers_do_not_depend_on_how_images_are_cut(
    launched: Run, make_run: Callable[..., Run]
) -> None:
    whole = make_run(controls=["full-precision"])
    assert whole("launch", "execution.chunk_size=256").exit_code == 0
    rows = zip(whole.results["variants"], launched.results["variants"], strict=True)
    for one, other in rows:
        for name, measured in one["metrics"].items():
            assert measured["value"] == pytest.approx(other["metrics"][name]["value"], rel=1e-3)


def test_images_beyond_the_count_are_not_scored(make_run: Callable[..., Run]) -> None:
    some, all_of_them = make_run(), make_run()
    assert some("launch", "images.count=6").exit_code == 0
    assert all_of_them("launch").exit_code == 0
    more = all_of_them.results
    assert all_of_them("evaluate", "images.count=6").exit_code == 0
    rows = zip(
        some.results["variants"], all_of_them.results["variants"], more["variants"], strict=True
    )
    for one, other, too_many in rows:
        for name, measured in one["metrics"].items():
            assert other["metrics"][name]["value"] == pytest.approx(measured["value"], rel=1e-3)
            assert too_many["metrics"][name]["value"] != pytest.approx(measured["value"], rel=1e-3)


# --- not everything is there ----------------------------------------------------------------------


def test_incomplete_images_are_a_partial_row(
    make_run: Callable[..., Run], cli: Callable[..., Result]
) -> None:
    run = make_run()
    assert cli("generate", run.study, "-o", run.out, "--shard", "0/2").exit_code == 0
    scored = run("evaluate")
    assert scored.exit_code == 1
    for row in run.results["variants"]:
        assert row["status"] == "partial"
        assert "image 4 of 10 is missing" in row["error"]
        assert row["metrics"] == {}
        assert set(row["cost"].values()) == {None}
    assert "partial" in scored.stdout
    assert run("launch").exit_code == 0


def test_nothing_at_all_is_a_partial_row_too(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert run("evaluate").exit_code == 1
    assert {row["status"] for row in run.results["variants"]} == {"partial"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "ValueError: metric 'fid' gave fid-toy = nan"),
        (math.inf, "ValueError: metric 'fid' gave fid-toy = inf"),
        (ZeroDivisionError("of its own"), "ZeroDivisionError: of its own"),
    ],
    ids=["nan", "inf", "raises"],
)
def test_a_metric_that_fails_on_one_row_leaves_the_others(
    launched: Run, monkeypatch: pytest.MonkeyPatch, value: Any, reason: str
) -> None:
    right, calls = FID.compute, []

    def compute(metric: FID) -> dict[str, float]:
        calls.append(metric)
        if len(calls) != 3:
            return right(metric)
        if isinstance(value, Exception):
            raise value
        return {"fid-toy": value}

    monkeypatch.setattr(FID, "compute", compute)
    before = {row["name"]: row["metrics"] for row in launched.results["variants"]}
    scored = launched("evaluate")
    assert scored.exit_code == 1
    assert "Traceback" not in scored.output
    rows = {row["name"]: row for row in launched.results["variants"]}
    assert (rows["cached"]["status"], rows["cached"]["error"]) == ("failed", reason)
    assert rows["cached"]["metrics"] == {}
    for name in ("full precision", "plain", "cached + IEC"):
        assert rows[name]["status"] == "done"
        for metric, measured in rows[name]["metrics"].items():
            assert measured["value"] == before[name][metric]["value"]
    monkeypatch.undo()
    assert launched("evaluate").exit_code == 0


def test_two_metrics_of_one_name_both_say_how_they_measure() -> None:
    metrics = [metric_of(splits) for splits in (1, 2, 3)]
    found = protocol(metrics)
    assert list(found) == ["is", "is 2", "is 3"]
    assert [found[name]["splits"]["count"] for name in found] == [1, 2, 3]


def test_no_number_takes_the_place_of_another(make_run: Callable[..., Run], toy: Toy) -> None:
    """The name of a metric that the study has twice says which of them it is in the protocol."""
    score = {"name": "is", "features": str(toy.features)}
    run = make_run(metrics=[{**score, "splits": splits} for splits in (2, 1, 5)])
    assert run("launch").exit_code == 0
    found, alone = run.results, {}
    assert list(found["protocol"]) == ["is", "is 2", "is 3"]
    for number, splits in enumerate((2, 1, 5), start=1):
        other = make_run(metrics=[{**score, "splits": splits}])
        assert other("launch").exit_code == 0
        alone[number] = other.results["variants"][0]["metrics"]
    row = found["variants"][0]["metrics"]
    for number, metrics in alone.items():
        for name, one in metrics.items():
            told = name if number == 1 else f"{name} (is {number})"
            assert row[told]["value"] == one["value"]
    assert len({one["value"] for name, one in row.items() if name.startswith("is-toy")}) == 3


def test_the_progress_counts_a_pass_for_each_network_and_one_for_pairs() -> None:
    paired = PSNR(BaseOptions())
    assert groups([metric_of(1), metric_of(2), Witness(), paired]) == 3
    assert groups([metric_of(1), paired]) == 2
    assert groups([metric_of(1)]) == groups([paired]) == 1


def metric_of(splits: int) -> Metric:
    return InceptionScore(InceptionScoreOptions(features="fashion-mnist", splits=splits))
