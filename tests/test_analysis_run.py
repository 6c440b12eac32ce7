"""``iec-eval analyze`` as it is used: whole, resumed, interrupted, asked for the impossible."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from torch import Tensor

from iec_eval.analysis import ablation, growth, residuals
from iec_eval.analysis.bench import Bench, Subject, corrected_twin, full_precision_twin
from iec_eval.analysis.jacobian import Jacobian
from iec_eval.analysis.pieces import Pieces
from iec_eval.analysis.run import analyzed_folders
from iec_eval.assembly import calibrate, missing_artifacts
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.cost import evaluation_cost, expected_evaluations
from iec_eval.denoising import Denoiser, Step
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.planning import Plan
from iec_eval.plugins import load_registry
from iec_eval.progress import Progress
from iec_eval.results import read_results
from iec_eval.runs import RunFolder
from iec_eval.study import load
from iec_eval.study_plans import plan_study

Cli = Callable[..., Result]
IEC_ROW = {"name": "cached + IEC", "extends": "cached", "callbacks": [{"name": "iec"}]}
QUANTIZED = {
    "name": "quantized + IEC",
    "efficiency": [{"name": "timestep-quantizer"}],
    "callbacks": [{"name": "iec"}],
}
SMALL = ["--images", "3", "--spectral-images", "1", "--lambdas", "0.5,1", "--steps", "3"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Path]) -> Path:
    rows = [
        {"name": "cached", "efficiency": [{"name": "deepcache", "interval": 3, "cut": 2}]},
        IEC_ROW,
        QUANTIZED,
    ]
    folder = tmp_path_factory.mktemp("analysis")
    return write_study(folder, variants=rows, calibration={"seed": 1, "images": 4})


@pytest.fixture(scope="module")
def analyzed(study: Path, cli: Cli) -> tuple[Path, Result]:
    out = study.parent / "out"
    result = cli("analyze", study, "-o", out, *SMALL)
    assert result.exit_code == 0, result.output
    return out / "analysis", result


def folder_of(analysis: Path, row: str) -> Path:
    (found,) = analysis.glob(f"{row}-????????")
    return found


def content(analysis: Path, row: str, part: str) -> Any:
    return json.loads((folder_of(analysis, row) / f"{part}.json").read_text())


def test_every_row_and_full_precision_are_measured(analyzed: tuple[Path, Result]) -> None:
    analysis, result = analyzed
    parts = ("spectral", "growth", "residuals", "recommendation")
    for row in ("cached", "cached-iec", "quantized-iec"):
        for part in parts:
            for suffix in ("json", "csv", "svg"):
                assert (folder_of(analysis, row) / f"{part}.{suffix}").stat().st_size > 0
    assert (folder_of(analysis, "full-precision") / "spectral.json").is_file()
    assert not (folder_of(analysis, "cached") / "ablation.json").exists()
    for name in ("cached", "cached + IEC", "quantized + IEC", "full precision"):
        assert f"\n\n{name}\n" in f"\n\n{result.stdout}"


def test_the_price_is_told_first(analyzed: tuple[Path, Result]) -> None:
    _, result = analyzed
    told = result.stderr.splitlines()[0]
    assert told.startswith("To do: ")
    assert "products with Jacobians" in told
    assert "ms each, timed at full precision" in told
    assert "calibration comes on top: quantized + IEC (timestep-quantizer)" in told


@pytest.mark.parametrize("iterations", [3, 200])
def test_the_price_is_what_is_paid(
    iterations: int, study: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the residual after a row's own correction, which steps without one do not have.

    Products are at most what is told, and exactly that if every search is cut short.
    """
    paid = {"evaluations": 0, "products": 0}
    evaluate, product, run = Denoiser.__call__, Jacobian._product, Bench.run
    at_work = list[bool]()

    def counted_run(self: Bench, *args: Any, **more: Any) -> Any:
        at_work.append(True)
        try:
            return run(self, *args, **more)
        finally:
            at_work.pop()

    def counted_evaluation(self: Denoiser, sample: Tensor, *args: Any, **more: Any) -> Tensor:
        paid["evaluations"] += len(sample) if at_work else 0
        return evaluate(self, sample, *args, **more)

    def counted_product(self: Jacobian, apply: Any, vectors: Tensor) -> Tensor:
        paid["products"] += len(vectors)
        return product(self, apply, vectors)

    monkeypatch.setattr(Bench, "run", counted_run)
    monkeypatch.setattr(Denoiser, "__call__", counted_evaluation)
    monkeypatch.setattr(Jacobian, "_product", counted_product)
    more = ["--what", "spectral,growth,residuals", "--iterations", str(iterations)]
    result = cli("analyze", study, "-o", tmp_path / "out", *SMALL, *more)
    assert result.exit_code == 0, result.output
    told = result.stderr.splitlines()[0].replace(",", "")
    pattern = r"To do: (\d+) network .*; (\d+) linearisations and at most (\d+) products"
    found = re.match(pattern, told)
    assert found
    evaluations, linearizations, products = map(int, found.groups())
    steps, images, rows = 3, 3, 3
    spared = evaluations + linearizations - paid["evaluations"]
    assert 0 <= spared < steps * images * rows
    if iterations == 3:
        assert paid["products"] == products
    assert products / 20 < paid["products"] <= products


def test_each_piece_of_work_is_counted_by_itself(analyzed: tuple[Path, Result]) -> None:
    """One step of norms takes as long as many of a trajectory: one count would say nothing."""
    _, result = analyzed
    lines = result.stderr.splitlines()
    begun = [line for line in lines if re.match(r"\d+ of \d+, .*: 0/\d+ steps$", line)]
    count = len(begun)
    assert [line.split(",")[0] for line in begun] == [
        f"{n} of {count}" for n in range(1, count + 1)
    ]
    assert f"1 of {count}, cached: spectral norms: 0/3 steps" in begun
    assert any(line.endswith("cached: trajectory of full precision: 0/5 steps") for line in begun)


def test_norms(analyzed: tuple[Path, Result]) -> None:
    analysis, _ = analyzed
    for row in ("cached-iec", "quantized-iec", "full-precision"):
        found = content(analysis, row, "spectral")
        assert [step["step"] for step in found["steps"]] == [0, 2, 4]
        assert found["not_converged"] == 0
        assert found["largest_adjoint_error"] < 1e-4
        for step in found["steps"]:
            norms = {name: one[0]["value"] for name, one in step["norms"].items()}
            assert norms.keys() == {"step", "jacobian", "0.5", "1"}
            reach = abs(step["b"]) * norms["jacobian"]
            assert abs(norms["step"] - step["a"]) <= reach * (1 + 1e-4)
            assert norms["1"] == pytest.approx(reach, rel=1e-3)
    full = [step["full"] for step in content(analysis, "cached", "spectral")["steps"]]
    assert full == [True, False, False]
    with (folder_of(analysis, "cached") / "spectral.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert float(rows[0]["norm_A_I_plus_B_J"]) > 0


class _Dense(DenoisingCallback):
    """Spectral norms of the Jacobian at each step, from all its entries; also of a full step."""

    name = "dense"

    def __init__(self) -> None:
        super().__init__(BaseOptions())
        self.found: dict[int, tuple[float, float]] = {}

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        norms = []
        for full in (None, True):
            predict = functools.partial(step.predict, full=full, store=False)
            with torch.enable_grad():
                entries = torch.autograd.functional.jacobian(predict, step.sample)
            size = step.sample.numel()
            norms.append(torch.linalg.matrix_norm(entries.reshape(size, size).double(), 2).item())
        self.found[step.index] = (norms[0], norms[1])
        return prediction


def test_norms_are_those_of_the_network_as_deployed(
    study: Path, analyzed: tuple[Path, Result]
) -> None:
    """A cached step is that of the cheap path, a quantized network is not the one it came from."""
    analysis, _ = analyzed
    bench = Bench(RunFolder(analysis.parent), torch.device("cpu"), Progress("", visible=False))
    plans = {plan.experiment.name: plan for plan in plan_study(load(str(study)), load_registry())}
    norms = {}
    for name, folder in (("cached", "cached"), ("quantized + IEC", "quantized-iec")):
        dense = _Dense()
        bench.run(plans[name], 1, before=[dense])
        for step in content(analysis, folder, "spectral")["steps"]:
            norms[name, step["step"]] = step["norms"]["jacobian"][0]["value"]
            deployed, full = dense.found[step["step"]]
            assert norms[name, step["step"]] == pytest.approx(deployed, rel=1e-3)
            assert step["full"] or deployed != pytest.approx(full, rel=1e-2)
    plain = content(analysis, "full-precision", "spectral")["steps"][0]["norms"]["jacobian"][0]
    assert norms["cached", 0] == pytest.approx(plain["value"], rel=1e-4)  # the same noise, and full
    assert norms["quantized + IEC", 0] != pytest.approx(plain["value"], rel=1e-3)


def test_growth(analyzed: tuple[Path, Result]) -> None:
    """Both runs against both twins, from nothing at the shared noise."""
    analysis, _ = analyzed
    found = content(analysis, "cached-iec", "growth")
    pairs = {(one["run"], one["versus"]) for one in found["series"]}
    assert len(pairs) == len(found["series"]) == 4
    for series in found["series"]:
        assert len(series["distance"]) == 6
        assert series["distance"][0] == [0, 0, 0]
        assert series["mean"][-1] == pytest.approx(sum(series["distance"][-1]) / 3)
        assert series["fit"]["better"]
    # the row without its correction is the cached row
    plain = content(analysis, "cached", "growth")["series"][0]
    assert found["series"][0]["distance"] == plain["distance"]
    assert max(plain["distance"][-1]) > 0


def subject_of(plan: Plan, folder: Path) -> Subject:
    """The row as the analysis has it, its schedule calibrated if it has to be."""
    bench = Bench(RunFolder(folder / "run"), torch.device("cpu"), Progress("", visible=False))
    return Subject("row", folder, plan, bench.full_steps(plan))


def test_a_calibrated_schedule_says_where_corrections_are(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """DPS chooses the full steps; as many uniform ones are planned before it has."""
    cache = {"name": "deepcache", "interval": 4, "cut": 2, "schedule": "dps"}
    row = {**IEC_ROW, "extends": None, "efficiency": [cache, {"name": "timestep-quantizer"}]}
    study = load(
        str(
            write_study(
                tmp_path,
                variants=[row],
                sampler={"name": "ddim", "steps": 14, "spacing": "quad"},
                calibration={"seed": 1, "images": 4},
            )
        )
    )
    registry = load_registry()
    (plan,) = plan_study(study, registry)
    subject = subject_of(plan, tmp_path)
    # the quantizer is not calibrated for it
    assert len(missing_artifacts(plan, RunFolder(tmp_path / "run"))) == 1
    full = calibrate(plan, RunFolder(tmp_path / "run")).clock.full_steps
    assert full != plan.planned_full_steps()
    assert subject.full_steps == full
    assert subject_of(plan, tmp_path).full_steps == full  # from what is kept
    twin = corrected_twin(subject, registry)
    assert twin.experiment.callbacks == [{"name": "iec", "where": sorted(full)}]
    made = {choice.label: choice for choice in ablation.choices(subject, registry)}
    assert made["last"].where == [max(full)]
    cost = evaluation_cost(plan)
    found = ablation.overheads(subject, [*made.values()], cost, tmp_path / "none.json")
    counts = {one["label"]: one["evaluations_full"] for one in found["choices"]}
    assert counts["last"] == counts["none"] + 1


def test_the_ablation_of_a_row_with_another_sampler_is_of_the_same_experiment(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """Its sampler is written whole: of the study's own only the steps would be taken over."""
    row = {"name": "row", "sampler": {"name": "plms"}, "callbacks": [{"name": "iec"}]}
    shared = {"name": "ddim", "steps": 5}
    study = load(str(write_study(tmp_path, variants=[row], sampler=shared, controls=[])))
    registry = load_registry()
    (plan,) = plan_study(study, registry)
    made = ablation.choices(subject_of(plan, tmp_path), registry)
    content = ablation.study_of(study, made)
    wanted = {"name": "plms", "steps": 5}
    assert [one["sampler"] for one in content["variants"]] == [wanted] * len(made)
    ablation.write_study(tmp_path / "again.yaml", content)
    again = plan_study(load(str(tmp_path / "again.yaml")), registry)
    assert {one.plan.fingerprint for one in made} <= {one.fingerprint for one in again}


@pytest.mark.parametrize("where", ["full", {"ends": "1/4"}, "all", [0, 2]])
def test_the_twin_is_corrected_where_the_row_is(
    where: Any, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """The network of the twin is full at every step, that of the row at some."""
    rows = [
        {"name": "cached", "efficiency": [{"name": "deepcache", "interval": 3, "cut": 2}]},
        {**IEC_ROW, "callbacks": [{"name": "iec", "where": where}]},
    ]
    study = load(str(write_study(tmp_path, variants=rows)))
    _, plan = plan_study(study, load_registry())
    twin = corrected_twin(subject_of(plan, tmp_path), load_registry())
    counts = [expected_evaluations(one) for one in (plan, twin)]
    steps = [c.full + c.cached - len(plan.sampler.timesteps) for c in counts]
    assert steps[0] == steps[1] > 0
    assert (counts[1].cached, twin.experiment.efficiency) == (0, [])


def test_residuals(analyzed: tuple[Path, Result]) -> None:
    """Cached, interval 3: of the measured steps 0, 2, 4 the row corrects step 0 alone."""
    analysis, _ = analyzed
    found = content(analysis, "cached-iec", "residuals")
    assert found["corrected_steps"] == 1
    assert found["contracts_own"]["pairs"] == 3
    corrections = found["steps"][0]["corrections"]
    # what the callback itself saw is lambda times the residual before
    halves = [value / 2 for value in found["steps"][0]["before"]]
    assert corrections[0]["residual"] == pytest.approx(halves, rel=1e-4)
    assert found["steps"][0]["after_own"] == pytest.approx(
        found["steps"][0]["after_half"], rel=1e-3
    )
    assert content(analysis, "cached", "residuals")["contracts_own"] is None


def test_the_recommendation_is_a_piece_of_a_study(
    analyzed: tuple[Path, Result], study: Path, cli: Cli
) -> None:
    analysis, _ = analyzed
    bounds = ["-o", analysis.parent, *SMALL, "--what", "residuals", "--budget", "0.5"]
    result = cli("analyze", study, *bounds, "--rows", "quantized + IEC")
    assert result.exit_code == 0, result.output
    found = content(analysis, "quantized-iec", "recommendation")
    assert 0 < found["extra_macs"] <= 0.5
    assert len(found["chosen"]) == 2  # of five evaluations a half
    assert found["chosen"] == sorted(found["ranking"][:2])
    assert found["scored"] == {}
    assert "image quality has not been asked" in result.stdout
    told = yaml.safe_load(
        (folder_of(analysis, "quantized-iec") / "recommendation.yaml").read_text()
    )
    assert told["callbacks"] == found["callbacks"]
    plans = plan_study(
        load(str(study), [f"variants.2.callbacks={json.dumps(told['callbacks'])}"]), load_registry()
    )
    assert len(plans[2].callbacks) == len(found["callbacks"])


def test_what_other_callbacks_do_is_kept_and_is_no_correction(
    write_study: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """time-shift changes predictions, which is nothing the corrector's residual speaks of."""
    shift = {"name": "time-shift", "cutoff": 0}
    rows = [
        {"name": "shifted", "callbacks": [shift]},
        {"name": "both", "callbacks": [shift, {"name": "iec"}]},
    ]
    study = write_study(tmp_path, variants=rows)
    bounds = ["--images", "2", "--what", "residuals", "--budget", "1"]
    result = cli("analyze", study, "-o", tmp_path, *bounds)
    assert result.exit_code == 0, result.output
    analysis = tmp_path / "analysis"
    found = {row: content(analysis, row, "residuals") for row in ("shifted", "both")}
    assert (found["shifted"]["corrected_steps"], found["both"]["corrected_steps"]) == (0, 5)
    advised = content(analysis, "both", "recommendation")["callbacks"]
    assert advised[0] == shift
    assert {part["name"] for part in advised[1:]} == {"iec"}


def test_nothing_is_recommended_that_a_launch_refuses(
    write_study: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    heun = {"name": "diffusers", "scheduler": "HeunDiscreteScheduler", "steps": 3}
    clipped = {"name": "ddim", "steps": 5, "clip_sample": True}
    allowed = {"name": "iec", "allow_clipping": True, "refresh_cache": False}
    rows = [
        {"name": "pairs", "sampler": heun},
        {"name": "clipped", "sampler": clipped},
        {"name": "allowed", "sampler": clipped, "callbacks": [allowed]},
    ]
    study = write_study(tmp_path, variants=rows)
    asked = ["analyze", study, "-o", tmp_path, "--images", "2", "--budget", "1"]
    result = cli(*asked, "--what", "residuals")
    assert result.exit_code == 0, result.output
    analysis = tmp_path / "analysis"
    for row, reason in (("pairs", "two evaluations"), ("clipped", "clips")):
        found = content(analysis, row, "residuals")
        assert reason in found["refused"]
        assert found["steps"] == []
        assert not (folder_of(analysis, row) / "recommendation.yaml").exists()
    assert result.stdout.count("no residuals, and no recommendation: iec: ") == 2
    assert content(analysis, "allowed", "residuals")["refused"] is None
    for part in content(analysis, "allowed", "recommendation")["callbacks"]:
        assert part == {**part, **allowed}
    told = (folder_of(analysis, "allowed") / "recommendation.yaml").read_text()
    advised = json.dumps(yaml.safe_load(told)["callbacks"])
    plan_study(load(str(study), [f"variants.2.callbacks={advised}"]), load_registry())
    result = cli(*asked, "--what", "spectral", "--rows", "pairs", *SMALL)
    assert result.exit_code == 0, result.output
    assert "no step to measure" in result.stdout
    assert "left out: a step of its method takes two evaluations" in result.stdout


def test_a_row_whose_steps_are_not_affine_lacks_its_norms_alone(
    write_study: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    cached = {"efficiency": [{"name": "deepcache", "interval": 3, "cut": 2}]}
    rows = [
        {"name": "clipped", **cached, "sampler": {"clip_sample": True}},
        {"name": "plain", **cached},
    ]
    study = write_study(tmp_path, variants=rows)
    asked = ["analyze", study, "-o", tmp_path, "--images", "2", *SMALL]
    result = cli(*asked, "--what", "spectral,growth")
    assert result.exit_code == 0, result.output
    analysis = tmp_path / "analysis"
    clipped, plain = (content(analysis, row, "spectral") for row in ("clipped", "plain"))
    assert clipped["steps"] == [] != plain["steps"]
    assert "clips the predicted image" in clipped["left_out_because"]
    assert result.stderr.count("switch clipping off to analyze the row. No norms of it") == 1
    for row in ("clipped", "plain"):
        assert content(analysis, row, "growth")["series"]


def test_a_second_run_computes_nothing(
    analyzed: tuple[Path, Result], study: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, first = analyzed

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a network was wanted")

    monkeypatch.setattr(Bench, "assembly", refuse)
    again = cli("analyze", study, "-o", analysis.parent, *SMALL)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "To do" not in again.stderr


def test_what_is_finished_is_kept(
    study: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two steps of residuals, it makes the three others, and no more."""
    asked = ["analyze", study, "-o", tmp_path, "--images", "2", "--rows", "cached + IEC"]
    asked += ["--what", "residuals"]
    measured, write = list[int](), residuals.residuals_at

    def counted(step: Any, *predictions: Any) -> Any:
        if len(measured) == 2 and not resumed:
            raise KeyboardInterrupt
        measured.append(step.index)
        return write(step, *predictions)

    resumed = False
    monkeypatch.setattr(residuals, "residuals_at", counted)
    result = cli(*asked)
    assert result.exit_code == 130
    assert "everything finished is kept" in result.stderr
    resumed = True
    assert cli(*asked).exit_code == 0
    assert measured == [0, 1, 2, 3, 4]


def test_a_finished_trajectory_is_kept(
    study: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["analyze", study, "-o", tmp_path, "--images", "2", "--rows", "cached"]
    asked += ["--what", "growth"]
    made, write = list[str](), Pieces.write_tensor

    def counted(self: Pieces, name: str, value: Any) -> None:
        if len(made) == 3 and not resumed:
            raise KeyboardInterrupt
        made.append(name)
        write(self, name, value)

    resumed = False
    monkeypatch.setattr(growth.Pieces, "write_tensor", counted)
    assert cli(*asked).exit_code == 130
    resumed = True
    assert cli(*asked).exit_code == 0
    assert len(made) == 4


def test_other_bounds_are_other_pieces(
    analyzed: tuple[Path, Result], study: Path, cli: Cli
) -> None:
    """More steps add to those that are there; another lambda is measured anew."""
    analysis, _ = analyzed
    bounds = ["-o", analysis.parent, "--rows", "cached", "--what", "spectral"]
    pieces = folder_of(analysis, "cached") / "pieces"
    before = {path: path.stat().st_mtime_ns for path in pieces.rglob("*.json")}
    more = ["--spectral-images", "1", "--lambdas", "0.5,1", "--steps", "5"]
    assert cli("analyze", study, *bounds, *more).exit_code == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(pieces.rglob("*.json"))) == len(before) + 2
    found = content(analysis, "cached", "spectral")
    assert [step["step"] for step in found["steps"]] == [0, 1, 2, 3, 4]


def test_the_ablation_is_a_study_that_runs(
    analyzed: tuple[Path, Result], study: Path, cli: Cli
) -> None:
    analysis, result = analyzed
    path = analysis / "ablation.yaml"
    assert f"iec-eval launch {path} -o {analysis / 'ablation'}" in result.stdout
    rows = load(str(path)).experiments()
    planned = plan_study(load(str(path)), load_registry())
    counts = [expected_evaluations(plan) for plan in planned if not plan.experiment.control]
    taken = sum(one.full + one.cached for one in counts) * load(str(path)).images.count
    told = f"{len(counts)} rows in {path}, which take {taken:,} network evaluations"
    assert told in " ".join(result.stdout.split())
    assert [row.name for row in rows if row.name.startswith("cached")] == [
        "cached + IEC, none", "cached + IEC, every full step", "cached + IEC, ends 1/4",
        "cached + IEC, last",
    ]  # fmt: skip
    assert "&id" not in path.read_text()
    assert load(str(path)).controls == ["full-precision"]  # the choices are told apart without more
    before = content(analysis, "quantized-iec", "ablation")["choices"]
    assert before[0]["predicted_overhead"] == 0
    assert before[1]["predicted_overhead"] == pytest.approx(1)
    assert {choice["measured"] for choice in before} == {None}
    made = cli("launch", path, "-o", analysis / "ablation", "-s", "images.count=40")
    assert made.exit_code == 0, made.output
    more = ["--what", "ablation,residuals", "--budget", "0.5"]
    told = cli("analyze", study, "-o", analysis.parent, *SMALL, *more)
    line = r"every full step 100.0 %, measured 100.0 %: fid-toy [\d.]+ \([+-][\d.]+ \[.*\], \w"
    assert re.search(line, told.stdout)
    assert "scores of 40 images (uncorrected: fid-toy" in told.stdout
    results = read_results(analysis / "ablation" / "results.json")
    rows_found = {row.name: row for row in results.variants}
    for row in ("cached-iec", "quantized-iec"):
        for choice in content(analysis, row, "ablation")["choices"]:
            measured = choice["measured"]
            assert measured["overhead"] == pytest.approx(choice["predicted_overhead"])
            assert measured["metrics"]["fid-toy"] >= 0
            compared = rows_found[choice["name"]].comparisons
            to_none = {one.metric: one for one in compared if one.relation == "base"}
            assert bool(to_none) == (choice["label"] != "none")
            assert measured["differences"].keys() == to_none.keys()
            for metric, gap in measured["differences"].items():
                one = to_none[metric]
                assert (gap["value"], gap["judgement"]) == (one.value, one.judgement)
                assert gap["ci95"] == (None if one.ci95 is None else list(one.ci95))
        assert (folder_of(analysis, row) / "ablation.svg").is_file()
        table = list(csv.DictReader((folder_of(analysis, row) / "ablation.csv").open()))
        assert table[0]["fid-toy_difference"] == ""
        ends = ("_low", "", "_high")
        low, value, high = (float(table[1][f"fid-toy_difference{end}"]) for end in ends)
        assert low < value < high
        scored = content(analysis, row, "recommendation")["scored"]
        choices = content(analysis, row, "ablation")["choices"][1:]
        for choice in choices:
            judgement = choice["measured"]["differences"]["fid-toy"]["judgement"]
            assert choice["label"] in scored[judgement]
        assert sum(map(len, scored.values())) == len(choices)
    said = "image quality of the choices that were scored, against no correction: "
    assert said in " ".join(told.stdout.split())


@pytest.mark.parametrize("images", [{"seed": 7}, {"seeds": [5, 6]}, {"seeds": [3]}], ids=str)
def test_rows_of_the_study_itself_are_measured_choices(
    images: dict[str, Any], write_study: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    quantized = {k: v for k, v in QUANTIZED.items() if k != "callbacks"} | {"name": "quantized"}
    last = {**QUANTIZED, "name": "last", "callbacks": [{"name": "iec", "where": [4]}]}
    path = write_study(
        tmp_path,
        variants=[quantized, QUANTIZED, last],
        calibration={"seed": 1, "images": 4},
        images={**images, "count": 4},
    )
    out, rows = tmp_path / "out", ["--rows", "quantized + IEC"]
    assert cli("launch", path, "-o", out).exit_code == 0
    assert cli("analyze", path, "-o", out, *rows, "--what", "ablation").exit_code == 0
    found = content(out / "analysis", "quantized-iec", "ablation")
    measured = {choice["label"]: choice["measured"] for choice in found["choices"]}
    there = {label for label, one in measured.items() if one is not None}
    assert there == {"none", "every full step", "last"} < measured.keys()
    assert found["images"] == 4
    assert measured["every full step"]["overhead"] == pytest.approx(1)
    results = {row.name: row for row in read_results(out / "results.json").variants}
    assert measured["last"]["metrics"]["fid-toy"] == results["last"].metrics["fid-toy"].value
    again = load(str(out / "analysis" / "ablation.yaml")).images
    assert again == load(str(path)).images
    assert cli("report", path, "-o", out).exit_code == 0
    (drawn,) = out.glob("analysis/quantized-iec-*/ablation.svg")
    assert drawn.parent.name in (out / "report.html").read_text()


def test_the_folders_of_an_analysis_are_known(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """How they end, of rows and twins; of one that its batch decides, how they begin."""
    mixed = {**IEC_ROW, "extends": None, "name": "mixed"}
    mixed["callbacks"] = [{"name": "iec", "preset": "official_ddim"}]
    study = load(str(write_study(tmp_path, variants=[QUANTIZED, mixed])))
    plans = plan_study(study, load_registry())
    run = RunFolder(tmp_path / "run")
    jobs: Any = [SimpleNamespace(plan=plan) for plan in plans]
    found = analyzed_folders(jobs, run, load_registry())
    twin = full_precision_twin(plans[0], load_registry())
    assert found == {one.fingerprint[:8] for one in (*plans, twin)} | {"mixed"}


def test_a_row_that_cannot_be_counted_or_measured_leaves_the_others(
    write_study: Callable[..., Path], cli: Cli, picky: None, tmp_path: Path
) -> None:
    rows = [
        {"name": "fails", "efficiency": [{"name": "picky", "fails": True}]},
        {"name": "looks", "efficiency": [{"name": "picky"}]},
        {"name": "looks + IEC", "extends": "looks", "callbacks": [{"name": "iec"}]},
        {"name": "plain"},
        {"name": "again"},
    ]
    study, out = write_study(tmp_path, variants=rows), tmp_path / "out"
    done = cli("analyze", study, "-o", out, *SMALL)
    assert done.exit_code == 1
    assert "again is the same experiment as plain, and is analyzed as that" in done.stderr
    assert "looks: MACs not counted, RuntimeError: Tensor.item() cannot" in done.stderr
    analysis = out / "analysis"
    failed = folder_of(analysis, "fails")
    assert f"FAILED, spectral norms: ValueError: too much light; see {failed}" in done.stdout
    assert "too much light" in (failed / "error.txt").read_text()
    assert not (failed / "spectral.json").exists()
    for row in ("looks", "looks-iec", "plain"):
        assert content(analysis, row, "spectral")["steps"]
        assert content(analysis, row, "residuals")["steps"]
    assert (folder_of(analysis, "plain") / "recommendation.json").exists()
    assert not (folder_of(analysis, "looks") / "recommendation.json").exists()
    choices = content(analysis, "looks-iec", "ablation")["choices"]
    assert {choice["predicted_overhead"] for choice in choices} == {None}
    assert "not counted" in done.stdout
    assert not list(analysis.glob("full-precision-*"))  # that is the row called plain


def test_what_was_scored_is_told_in_the_metric_of_quality() -> None:
    """That of the verdicts, wherever it stands among the metrics."""
    gaps = {"is": {"judgement": "better"}, "fid": {"judgement": "worse"}}
    choices = [{"label": "full", "measured": {"differences": gaps}}]
    found = {"choices": [{"label": "none", "measured": None}, *choices], "quality": "fid"}
    assert ablation.judgements(found) == {"worse": ["full"]}
    assert ablation.judgements({**found, "quality": None}) == {}


def test_no_image_of_a_calibration_is_analyzed(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever the seeds: those of images and calibration may be the same."""
    row = {"name": "plain"}
    started = []
    for seed in (1, 2):
        path = write_study(
            tmp_path,
            variants=[row],
            images={"seed": seed, "count": 4},
            calibration={"seed": 1, "images": 3},
        )
        (plan,) = plan_study(load(str(path)), load_registry())
        bench = Bench(RunFolder(tmp_path / "run"), torch.device("cpu"), Progress("", visible=False))
        started.append(bench.trajectory(plan, 2)[0])
        used = [Noise(1, range(3), plan.model.shape, calibration=True).initial()]
        used.append(Noise(seed, range(4), plan.model.shape).initial())
        for noise in torch.cat(used):
            assert not any(torch.equal(noise, image) for image in started[-1])


def test_overheads_of_table_5(write_study: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    """T = 100, every step full: correcting both ends costs twice the share."""
    sampler = {"name": "ddim", "steps": 100}
    row = {"name": "IEC", "callbacks": [{"name": "iec"}]}
    path = write_study(tmp_path, sampler=sampler, variants=[row])
    result = cli("analyze", path, "-o", tmp_path / "out", "--what", "ablation")
    assert result.exit_code == 0, result.output
    found = content(tmp_path / "out" / "analysis", "iec", "ablation")["choices"]
    overheads = {choice["label"]: choice["predicted_overhead"] for choice in found}
    wanted = {"none": 0, "every full step": 1, "ends 1/4": 0.5, "ends 1/8": 0.25, "ends 1/10": 0.2,
              "ends 1/20": 0.1, "first": 0.01, "last": 0.01}  # fmt: skip
    assert overheads == pytest.approx(wanted)


WRONG: list[tuple[list[str], str]] = [
    (["--rows", "cashed"], "unknown row 'cashed'; did you mean 'cached'"),
    (["--what", "groth"], "unknown part of the analysis 'groth'; did you mean 'growth'"),
    (["--rows", "cached", "--what", "ablation"], "none of the rows cached has a corrector"),
    (["-s", "sampler.clip_sample=true", "--what", "spectral"], "clips the predicted image"),
    (["--images", "5"], "5 images wanted, which are denoised together"),
    (["--lambdas", "0"], "wanted numbers above 0"),
    (["--budget", "-1"], "--budget"),
    (["--steps", "0"], "--steps"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_questions(
    options: list[str], message: str, write_study: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """Refused before anything runs, so nothing is left behind."""
    cached = {"name": "cached", "efficiency": [{"name": "deepcache", "interval": 3, "cut": 2}]}
    path = write_study(tmp_path, variants=[cached])
    result = cli("analyze", path, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "analysis").exists()
