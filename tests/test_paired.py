"""PSNR, SSIM and LPIPS: each against an independent implementation, and as rows of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, Toy
from helpers import build, packaged, random_backbone
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.evaluation import evaluate
from iec_eval.influence import read_estimates
from iec_eval.metrics import lpips
from iec_eval.metrics.base import PairedMetric, Pairs
from iec_eval.metrics.lpips import LPIPS, SMALLEST, lpips_network, published_weights
from iec_eval.metrics.paired import PSNR, SSIM, MeanOverPairs, best_psnr
from iec_eval.options import BaseOptions, validated
from iec_eval.plugins import load_registry
from iec_eval.progress import Progress
from iec_eval.report.verdicts import verdicts
from iec_eval.results import read_results
from iec_eval.session import prepare
from iec_eval.storage import sha256
from iec_eval.study import Study, full_precision, load
from iec_eval.study_plans import plan_metrics, plan_study
from iec_eval.testing import TinyModel

COUNT = 20


def pictures(shape: tuple[int, int, int], seed: int = 0) -> Pairs:
    """Pairs of smooth pictures and of ones a little off, more so from pair to pair."""
    random = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    coarse = torch.rand(COUNT, channels, 4, 4, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    strength = torch.linspace(1, 60, COUNT).view(-1, 1, 1, 1)
    noise = torch.randn(COUNT, *shape, generator=random) * strength
    uint8 = [each.clamp(0, 255).round().to(torch.uint8) for each in (smooth + noise, smooth)]
    return Pairs(*uint8)


def scored(metric: MeanOverPairs, pairs: Pairs) -> np.ndarray:
    """The metric's number of each pair; also checks that the result is their mean."""
    metric.update(pairs, torch.arange(COUNT))
    found = metric.per_image().numpy()
    assert metric.compute() == {metric.result_name: pytest.approx(found.mean(), rel=1e-12)}
    return found


def similarity(image: Tensor, reference: Tensor) -> float:
    """scikit-image's SSIM of uint8 ``[C, H, W]`` mirrored at the border, which it leaves out."""
    return float(
        structural_similarity(
            *(np.pad(x.numpy(), ((0, 0), (5, 5), (5, 5)), "reflect") for x in (image, reference)),
            data_range=255,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 24, 17)])
def test_psnr_equals_scikit_image(shape: tuple[int, int, int]) -> None:
    pairs = pictures(shape)
    wanted = [
        peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=255)
        for image, reference in zip(pairs.images, pairs.reference, strict=True)
    ]
    found = scored(build(PSNR), pairs)
    np.testing.assert_allclose(found, wanted, rtol=1e-7)  # it takes a logarithm in float32
    assert found.max() - found.min() > 10


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 24, 17), (1, 11, 11)])
def test_ssim_equals_scikit_image(shape: tuple[int, int, int]) -> None:
    pairs = pictures(shape)
    wanted = [
        similarity(image, reference)
        for image, reference in zip(pairs.images, pairs.reference, strict=True)
    ]
    found = scored(build(SSIM), pairs)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert found.max() - found.min() > 0.2


def test_equal_images_score_as_if_one_value_were_off_by_one_level() -> None:
    images = pictures((3, 16, 16)).reference
    nearly = images.clone()
    nearly[:, 1, 2, 3] = torch.where(images[:, 1, 2, 3] < 255, images[:, 1, 2, 3] + 1, 254)
    equal = scored(build(PSNR), Pairs(images, images))
    np.testing.assert_allclose(equal, scored(build(PSNR), Pairs(nearly, images)), rtol=1e-7)
    np.testing.assert_allclose(equal, 10 * math.log10(255**2 * 3 * 16 * 16), rtol=1e-7)
    assert best_psnr((3, 16, 16)) == equal[0]
    assert scored(build(SSIM), Pairs(images, images)) == pytest.approx(1)


def test_order_and_batches_do_not_matter() -> None:
    pairs, other = pictures((3, 16, 16)), build(PSNR)
    first = scored(build(PSNR), pairs)
    for part in torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).split(7):
        other.update(Pairs(pairs.images[part], pairs.reference[part]), part)
    np.testing.assert_array_equal(other.per_image().numpy(), first)


def test_an_image_counted_twice_is_noticed() -> None:
    metric, pairs = build(PSNR), pictures((3, 16, 16))
    metric.update(Pairs(pairs.images[:2], pairs.reference[:2]), torch.tensor([4, 4]))
    with pytest.raises(ValueError, match="twice"):
        metric.compute()


# --- LPIPS --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's checkpoints folder, empty; a download fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("net", ["alex", "squeeze", pytest.param("vgg", marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_equals_torchmetrics_with_the_same_backbone(
    hub: Path, net: Any, channels: int
) -> None:
    path = hub / published_weights(net).default_place.name
    random_backbone(path, net)
    pairs = pictures((channels, 32, 40))
    theirs = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", normalize=True)
    coloured = [x.expand(-1, 3, -1, -1).float() / 255 for x in (pairs.images, pairs.reference)]
    wanted = theirs(*coloured).numpy()
    found = scored(build(LPIPS, {"net": net, "weights": str(path)}), pairs)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)
    assert found.max() > 3 * found.min() > 0


def test_lpips_is_named_for_its_net_and_for_weights_that_are_not_the_published_ones(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub / "mine.pth"
    random_backbone(path)
    metric = build(LPIPS, {"net": "squeeze", "weights": str(path)})
    digest = sha256(path)
    assert metric.result_name == f"lpips-squeeze-{digest[:8]}"
    assert metric.protocol()["weights"] == digest
    url = f"https://somewhere/squeezenet1_1-{digest[:8]}.pth"
    published = lpips.PublishedWeights(url, 5)
    monkeypatch.setattr(lpips, "published_weights", lambda net: published)
    assert metric.result_name == "lpips-squeeze"
    path.rename(published.default_place)
    in_place = build(LPIPS, {"net": "squeeze"})
    in_place.prepare(1)
    assert in_place.result_name == "lpips-squeeze"


def test_lpips_without_weights_says_where_they_are_to_be_had(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is downloaded") as caught:
        build(LPIPS).prepare(1)
    said = str(caught.value)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth (233 MB)" in said
    assert str(hub / "alexnet-owt-7be5be79.pth") in said
    with pytest.raises(ConfigError, match=r"at elsewhere\.pth"):
        build(LPIPS, {"weights": "elsewhere.pth"}).prepare(1)


def test_lpips_refuses_other_weights_than_it_says(hub: Path) -> None:
    random_backbone(hub / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(CorruptFile, match=r"not the published file, .* begins with b8a52dc0"):
        build(LPIPS, {"net": "squeeze"}).prepare(1)
    given = {"net": "alex", "weights": str(hub / "squeezenet1_1-b8a52dc0.pth")}
    with pytest.raises(CorruptFile, match="not those of torchvision's alexnet"):
        scored(build(LPIPS, given), pictures((3, 32, 32)))
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CorruptFile, match="cannot be read"):
        scored(build(LPIPS, given), pictures((3, 32, 32)))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_knows_the_smallest_image(hub: Path, net: Any) -> None:
    smallest = SMALLEST[net]
    network = lpips_network(net, random_backbone(hub / "any.pth", net), hub / "any.pth")
    assert network(*torch.zeros(2, 1, 3, smallest, smallest)).isfinite().all()
    with pytest.raises(RuntimeError):
        network(*torch.zeros(2, 1, 3, smallest - 1, smallest))


def of_shape(*shape: int) -> TinyModel:
    model = TinyModel()
    model.shape = shape  # type: ignore[assignment]
    return model


def test_images_that_cannot_be_compared_are_refused() -> None:
    build(SSIM).bind(of_shape(1, 11, 11))
    with pytest.raises(Incompatible, match="window is 11x11 pixels, the images are only 10x32"):
        build(SSIM).bind(of_shape(3, 10, 32))
    build(LPIPS).bind(of_shape(3, 31, 31))
    for shape in ((3, 31, 30), (4, 64, 64)):
        with pytest.raises(Incompatible, match=r"1 or 3 channels and 31x31 pixels or more, got"):
            build(LPIPS).bind(of_shape(*shape))


# --- in a study ---------------------------------------------------------------------------------

PAIRED = [{"name": "psnr"}]
Run = Callable[..., Result]


@pytest.fixture
def make_run(
    tmp_path: Path, write_study: Callable[..., Path], cli: Callable[..., Result], toy: Toy
) -> Callable[..., Run]:
    """``make_run(**changes)`` is ``run(verb, *overrides)`` of a study that has PSNR too."""

    def make(**changes: Any) -> Run:
        study = write_study(tmp_path, **{"metrics": [*toy.metrics(), *PAIRED], **changes})

        def run(verb: str, *overrides: str) -> Result:
            changes = [word for override in overrides for word in ("-s", override)]
            return cli(verb, study, "-o", tmp_path / "out", *changes)

        return run

    return make


def rows_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "out" / "results.json").read_text())
    return {row["name"]: row for row in results["variants"]}


def images_of(folder: Path) -> dict[str, Tensor]:
    session = prepare(str(folder / "study.yaml"), [], folder / "out")
    return {
        job.plan.experiment.name: torch.cat(
            [job.folder.read_chunk(part).images for part in job.folder.finished()]
        )
        for job in session.jobs
    }


def test_a_row_is_compared_with_full_precision_image_by_image(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    launched = run("launch")
    assert launched.exit_code == 0, launched.output
    rows, images = rows_of(tmp_path), images_of(tmp_path)
    assert rows["full precision"]["metrics"].keys() == {"fid-toy", "is-toy", "is-std-toy"}
    for name in ("cached", "cached + IEC"):
        pairs = zip(images["full precision"], images[name], strict=True)
        wanted = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in pairs]
        assert rows[name]["metrics"]["psnr"]["value"] == pytest.approx(np.mean(wanted), rel=1e-7)
        assert (rows[name]["status"], rows[name]["error"]) == ("done", None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"]["psnr"]["reference"] == "full precision"
    table = [line.split("|") for line in launched.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    assert cells[2][cells[0].index("psnr ↑")] == "-"
    # the same numbers, whatever the files and their order
    assert run("evaluate").exit_code == 0
    assert rows_of(tmp_path) == rows


def test_a_row_with_other_steps_is_in_no_verdict_on_likeness(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """It has the number, but being unlike the images of other steps does not make it worse."""
    run = make_run(controls=["equal-cost"])
    assert run("launch").exit_code == 0
    rows = rows_of(tmp_path)
    (steps,) = (row for row in rows.values() if row["name"].endswith(" steps"))
    assert steps["metrics"]["psnr"]["value"] > 0
    assert steps["error"] is None
    assert steps["metrics"]["psnr"]["delta"] is None
    assert steps["metrics"]["fid-toy"]["delta"]["versus"] == "cached"
    found = rows["cached + IEC"]["comparisons"]
    fid, psnr = ({x["versus"] for x in found if x["metric"] == m} for m in ("fid-toy", "psnr"))
    assert steps["name"] in fid
    assert psnr == fid - {steps["name"], "full precision"}
    assert {one["metric"] for one in steps["comparisons"]} == {"fid-toy", "is-toy", "is-std-toy"}
    results = read_results(tmp_path / "out" / "results.json")
    kept = read_estimates(tmp_path / "out", results)
    assert kept is not None  # other runs may be compared with it
    assert kept[steps["name"]].keys() == steps["metrics"].keys()
    alone = [
        row.model_copy(update={"metrics": {m: x for m, x in row.metrics.items() if m == "psnr"}})
        for row in results.variants
    ]
    told = "".join(verdicts(results.model_copy(update={"variants": alone})))
    assert f"not held against {steps['name']} (psnr is to images of other steps)" in told


def test_pairs_are_found_however_the_files_are_cut(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, first = make_run(), "images.count=5"
    only = "variants=[{name: full precision}]"
    assert run("generate", first, "execution.chunk_size=5", only).exit_code == 0
    assert run("launch", "execution.chunk_size=3").exit_code == 0
    session = prepare(str(tmp_path / "study.yaml"), [], tmp_path / "out")
    cuts = [[len(part) for part in job.folder.finished()] for job in session.jobs]
    assert cuts[0] != cuts[1]
    images, witness = images_of(tmp_path), Witness(BaseOptions())
    evaluate(session.jobs[1], [witness], Progress("", visible=False), session.jobs[0])
    shown = [torch.cat([pairs.images, pairs.reference], dim=1) for pairs, _ in witness.shown]
    assert torch.equal(torch.cat(shown)[:, :1], images["cached"])
    assert torch.equal(torch.cat(shown)[:, 1:], images["full precision"])
    assert torch.cat([indices for _, indices in witness.shown]).tolist() == list(range(10))


class Witness(PairedMetric):
    """Keeps the pairs it is shown and their indices."""

    name = "paired-witness"

    def __init__(self, options: BaseOptions) -> None:
        super().__init__(options)
        self.shown: list[tuple[Pairs, Tensor]] = []

    def update(self, pairs: Pairs, indices: Tensor) -> None:
        self.shown.append((pairs, indices))

    def compute(self) -> dict[str, float]:
        return {"witnessed": float(len(self.shown))}


def test_added_control_is_the_row_compared_with(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    changes = {"controls": ["full-precision"], "variants": [{"name": "plain"}, *VARIANTS[1:]]}
    make_run(**changes)
    session = prepare(str(tmp_path / "study.yaml"), [], tmp_path / "out")
    assert session.metrics[-1].protocol()["reference"] == "full precision"
    rows = [job.plan.experiment for job in session.jobs]
    assert full_precision(rows[1:]).name == "plain"  # type: ignore[union-attr]
    assert full_precision([]) is None


def test_a_study_without_full_precision_is_refused(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(variants=VARIANTS[1:2])
    refused = run("show")
    assert refused.exit_code == 2
    assert "psnr: compares rows with the full-precision one" in refused.stderr
    assert "controls: [full-precision]" in refused.stderr
    assert run("show", "controls=[full-precision]").exit_code == 0


def test_images_too_small_are_refused_when_planned(make_run: Callable[..., Run]) -> None:
    refused = make_run(metrics=[{"name": "ssim"}])("show")
    assert refused.exit_code == 2
    assert "window is 11x11 pixels, the images are only 8x8" in refused.stderr


def test_a_damaged_image_of_full_precision_takes_its_own_metrics_only(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """It is beyond the gallery, so that nobody has read it before."""
    run = make_run(images={"seed": 0, "count": 14})
    assert run("launch").exit_code == 0
    before = rows_of(tmp_path)
    (folder,) = (tmp_path / "out").glob("full-precision-*")
    (chunk,) = folder.glob("chunks/000012*")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run("evaluate").exit_code == 1
    rows = rows_of(tmp_path)
    for name in ("cached", "cached + IEC"):
        assert rows[name]["status"] == "done"
        assert "'full precision', is incomplete (image 12 of 14" in rows[name]["error"]
        for metric in ("fid-toy", "is-toy", "is-std-toy"):
            assert rows[name]["metrics"][metric] == before[name]["metrics"][metric]
    assert run("launch").exit_code == 0
    assert rows_of(tmp_path)["cached"]["metrics"] == before["cached"]["metrics"]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (
            lambda folder: (
                (folder / "error.txt").write_text("OSError: no more\nmuch text"),
                next(folder.glob("chunks/000004*")).unlink(),
            ),
            "psnr: the row compared with, 'full precision', failed (OSError: no more)",
        ),
        (
            lambda folder: next(folder.glob("chunks/000004*")).unlink(),
            "psnr: the row compared with, 'full precision', is incomplete (image 4 of 10 is",
        ),
    ],
    ids=["failed", "partial"],
)
def test_without_full_precision_images_rows_say_what_they_lack(
    make_run: Callable[..., Run], tmp_path: Path, break_it: Callable[[Path], Any], reason: str
) -> None:
    run = make_run()
    assert run("launch").exit_code == 0
    before = rows_of(tmp_path)
    (folder,) = (tmp_path / "out").glob("full-precision-*")
    break_it(folder)
    scored = run("evaluate")
    assert scored.exit_code == 1
    assert f"cached: {reason}" in scored.stdout
    rows = rows_of(tmp_path)
    assert rows["full precision"]["status"] in ("failed", "partial")
    for name in ("cached", "cached + IEC"):
        assert rows[name]["status"] == "done"
        assert rows[name]["error"].startswith(reason)
        assert rows[name]["metrics"].keys() == {"fid-toy", "is-toy", "is-std-toy"}
        for metric, measured in rows[name]["metrics"].items():
            assert measured == before[name]["metrics"][metric]


def test_the_packaged_model_from_the_command_line(
    cli: Callable[..., Result], tmp_path: Path
) -> None:
    packaged()
    study = {
        "study": "pairs",
        "model": {"name": "fashion-mnist"},
        "sampler": {"name": "ddim", "steps": 4},
        "images": {"count": 6},
        "metrics": [{"name": "psnr"}, {"name": "ssim"}],
        "controls": ["full-precision"],
        "variants": [
            {"name": "cached", "efficiency": [{"name": "deepcache", "interval": 2, "cut": 3}]}
        ],
        "execution": {"batch_size": 4, "chunk_size": 4, "threads": 1, "accelerator": "cpu"},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = cli("launch", tmp_path / "study.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows, images = rows_of(tmp_path), images_of(tmp_path)
    assert rows["full precision"]["metrics"] == {}
    pairs = zip(images["cached"], images["full precision"], strict=True)
    similar = [similarity(image, reference) for image, reference in pairs]
    assert rows["cached"]["metrics"]["ssim"]["value"] == pytest.approx(np.mean(similar), rel=1e-9)
    assert 5 < rows["cached"]["metrics"]["psnr"]["value"] < 60


def test_planned_metrics_are_told_their_model(toy: Toy, write_study: Any, tmp_path: Path) -> None:
    study = load(str(write_study(tmp_path, metrics=PAIRED)))
    registry = load_registry()
    (metric,) = plan_metrics(study, registry, plan_study(study, registry))
    assert isinstance(metric, PSNR)
    assert metric.reference_row == "full precision"
    assert metric.protocol() == reference_of(study)
    seeds = validated(Study, {**study.model_dump(), "images": {"seeds": [4, 5], "count": 2}}, "")
    assert reference_of(seeds) == reference_of(study)  # their numbers can be compared
    finer = {**study.model_dump(), "sampler": {**study.sampler, "steps": 7}}
    assert reference_of(validated(Study, finer, "")) != reference_of(study)


def reference_of(study: Study) -> dict[str, Any]:
    registry = load_registry()
    (metric,) = plan_metrics(study, registry, plan_study(study, registry))
    return metric.protocol()
