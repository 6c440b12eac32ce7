"""KID, precision and recall on kept features, against independent implementations."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import Toy
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.images import ImagePreparation, open_images
from iec_eval.metrics import statistics
from iec_eval.metrics.base import Metric
from iec_eval.metrics.features import ClassifierFeatures, Features, ImageClassifier
from iec_eval.metrics.inception_score import shuffled
from iec_eval.metrics.kid import KID, KIDOptions
from iec_eval.metrics.precision_recall import PrecisionRecall, PrecisionRecallOptions
from iec_eval.metrics.statistics import (
    KeptFeatures,
    ReferenceStatistics,
    open_reference,
    reference_from_images,
    spread,
)
from iec_eval.training.classifier import save_features

Cli = Callable[..., Result]
COUNT, KEPT, SIZE = 90, 120, 64


def draw_features(count: int, seed: int, *, shift: float = 0.0, spread: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / 8
    low = torch.randn(count, SIZE, generator=random) * (torch.arange(SIZE) < 4)
    return (spread * low @ mixing + shift).exp()


REAL = draw_features(KEPT, 1)
FAKE = draw_features(COUNT, 2, shift=0.1, spread=0.8)
INDICES = 1000 + 3 * torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def network(tmp_path: Path) -> ClassifierFeatures:
    torch.manual_seed(0)
    save_features(ImageClassifier(channels=1, size=8, classes=5, width=4), tmp_path / "net", "toy")
    return ClassifierFeatures(tmp_path / "net")


@pytest.fixture
def reference(network: ClassifierFeatures, tmp_path: Path) -> Path:
    real = REAL.double()
    moments = real.mean(dim=0), torch.cov(real.T), KEPT
    made = ReferenceStatistics(*moments, network.identity(), kept=KeptFeatures.of(REAL))
    made.save(tmp_path / "real.safetensors")
    return tmp_path / "real.safetensors"


Make = Callable[..., Metric]


@pytest.fixture
def make(reference: Path, tmp_path: Path) -> Make:
    """``make("kid", ...)``: the metric with these options, prepared for all the images."""

    def made(name: str, **options: Any) -> Metric:
        named = {"features": str(tmp_path / "net"), "reference": str(reference), **options}
        metric: Metric
        if name == "kid":
            metric = KID(KIDOptions(**{"subset_size": 40, "subsets": 7, **named}))
        else:
            metric = PrecisionRecall(PrecisionRecallOptions(**{"samples": 80, **named}))
        metric.prepare(COUNT)
        return metric

    return made


def scored(metric: Metric, order: Tensor | None = None, batch: int = 32) -> dict[str, float]:
    chosen = torch.arange(COUNT) if order is None else order
    for rows in torch.split(chosen, batch):
        metric.update(Features(FAKE[rows], FAKE[rows]), INDICES[rows])
    return metric.compute()


def by_index() -> Tensor:
    return FAKE[INDICES.argsort()]


# --- the numbers ------------------------------------------------------------------------------


def unbiased_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Binkowski et al. 2018, eq. 4, term by term."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    m, n = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(m) for j in range(m) if i != j)
    among = sum(kernel(second[i], second[j]) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(x, y) for x in first for y in second)
    return within / (m * (m - 1)) + among / (n * (n - 1)) - 2 * between / (m * n)


@pytest.mark.parametrize("seed", [0, 5])
def test_kid_is_torch_fidelitys(make: Make, seed: int) -> None:
    theirs = kid_features_to_metric(
        *(by_index().double(), REAL.double()),
        kid_subsets=7,
        kid_subset_size=40,
        rng_seed=seed,
        verbose=False,
    )
    assert scored(make("kid", seed=seed)) == {
        "kid-toy": pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9),
        "kid-std-toy": pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9),
    }


def test_kid_of_whole_sets_is_the_formula(make: Make, reference: Path) -> None:
    kept = KeptFeatures.of(REAL[:COUNT])
    replace(open_reference(str(reference)), kept=kept).save(reference)
    found = scored(make("kid", subset_size=COUNT, subsets=2))
    wanted = unbiased_mmd(FAKE.double().numpy(), REAL[:COUNT].double().numpy())
    assert found["kid-toy"] == pytest.approx(wanted, rel=1e-9)
    assert found["kid-std-toy"] == pytest.approx(0, abs=1e-12)


def brute_force(fake: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, eq. 1 and 2, one distance at a time."""

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(float(np.linalg.norm(c - other)) for other in centres)[k] for c in centres]
        inside = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]
        return float(np.mean(inside))

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_the_formula(
    make: Make, neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iec_eval.metrics.precision_recall.BLOCK", 17)
    found = scored(make("precision-recall", neighbours=neighbours))
    indices = sorted(INDICES.tolist())
    fake = by_index()[shuffled(indices, 0)[:80]].double().numpy()
    real = REAL[shuffled(range(KEPT), 0)[:80]].double().numpy()
    precision, recall = brute_force(fake, real, neighbours)
    assert found == {
        "precision-toy": pytest.approx(precision, abs=1e-6),
        "recall-toy": pytest.approx(recall, abs=1e-6),
    }
    assert 0 < recall < precision < 1  # values that tell the two apart


def test_images_of_the_reference_are_at_no_distance(make: Make) -> None:
    metric = make("precision-recall", samples=COUNT)
    metric.update(Features(REAL, REAL), torch.arange(KEPT))
    assert metric.compute() == {"precision-toy": 1.0, "recall-toy": 1.0}


# --- a function of the images -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["kid", "precision-recall"])
def test_order_and_batches_do_not_matter(make: Make, name: str) -> None:
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(5))
    assert scored(make(name), order, batch=11) == scored(make(name))


@pytest.mark.parametrize("name", ["kid", "precision-recall"])
def test_halves_merge_into_the_whole(make: Make, name: str) -> None:
    first, second = make(name), make(name)
    first.update(Features(FAKE[50:], FAKE[50:]), INDICES[50:])
    second.update(Features(FAKE[:50], FAKE[:50]), INDICES[:50])
    first.merge_state(second)
    assert first.compute() == scored(make(name))


@pytest.mark.parametrize("name", ["kid", "precision-recall"])
def test_the_seed_is_the_only_chance(make: Make, name: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = scored(make(name))
    torch.manual_seed(2)
    np.random.seed(2)
    assert scored(make(name)) == first
    assert scored(make(name, seed=1)) != first


@pytest.mark.parametrize("name", ["kid", "precision-recall"])
def test_an_image_counted_twice_is_noticed(make: Make, name: str) -> None:
    metric = make(name)
    metric.update(Features(FAKE, FAKE), torch.zeros(COUNT, dtype=torch.int64))
    with pytest.raises(ValueError, match="twice"):
        metric.compute()


def test_protocols_name_what_a_number_depends_on(make: Make, reference: Path) -> None:
    kept = open_reference(str(reference)).kept
    assert kept is not None
    kid, both = make("kid", seed=4).protocol(), make("precision-recall").protocol()
    for protocol in (kid, both):
        assert protocol["features"] == make("kid").network.identity()  # type: ignore[union-attr]
        assert protocol["reference"]["digest"] == kept.digest
        assert protocol["reference"]["count"] == KEPT
        json.dumps(protocol)
    assert (kid["seed"], kid["subsets"]["count"], kid["subsets"]["size"]) == (4, 7, 40)
    assert (both["seed"], both["neighbours"], both["samples"]["count"]) == (0, 3, 80)


# --- features in the file ---------------------------------------------------------------------


def test_kept_features_are_spread_evenly() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(5, 0) == []
    with pytest.raises(ConfigError, match="features of 6 images to be kept, there are 5"):
        spread(5, 6)


def write_images(folder: Path, count: int) -> str:
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return str(folder)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_kept_features_are_those_of_their_images(
    network: ClassifierFeatures, tmp_path: Path, batch_size: int
) -> None:
    images = open_images(write_images(tmp_path / "images", 13))
    options: dict[str, Any] = {"source": "here", "batch_size": batch_size}
    made = reference_from_images(images, ImagePreparation(), network, keep=5, **options)
    plain = reference_from_images(images, ImagePreparation(), network, **options)
    assert made.kept is not None
    chosen = torch.stack([images.image(index) for index in (0, 2, 5, 7, 10)])
    torch.testing.assert_close(made.kept.read(), network.extract(chosen).features)
    assert plain.kept is None
    assert made.digest() == plain.digest()  # they do not concern FID
    assert made.source == plain.source


def test_features_are_read_when_asked_for(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Witness:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> Witness:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def metadata(self) -> Any:
            return self.file.metadata()

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(statistics, "safe_open", Witness)
    loaded = open_reference(str(reference))
    assert read == ["mu", "sigma"]
    assert loaded.kept is not None
    assert loaded.kept.count == KEPT
    assert torch.equal(loaded.kept.read(), REAL)
    assert read == ["mu", "sigma", "features"]


def test_features_that_changed_are_noticed(make: Make, reference: Path) -> None:
    with safe_open(reference, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(reference)
    tensors["features"][3, 4] += 1
    save_file(tensors, reference, metadata)
    with pytest.raises(CorruptFile, match=r"real\.safetensors: its features are damaged"):
        scored(make("kid"))
    del tensors["features"]
    save_file(tensors, reference, metadata)
    with pytest.raises(CorruptFile, match="its features cannot be read"):
        scored(make("kid"))


def test_features_of_another_length_are_noticed(make: Make, reference: Path) -> None:
    kept = KeptFeatures.of(REAL[:, :9])
    replace(open_reference(str(reference)), kept=kept).save(reference)
    with pytest.raises(CorruptFile, match=r"wanted features of 64 dimensions, got \(9,\)"):
        scored(make("kid"))


# --- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option"), [("kid", "subset_size"), ("precision-recall", "samples")]
)
def test_too_few_of_either_side_are_refused(make: Make, name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: 90 images, wanted 91 .*set {option}: 90"):
        make(name, **{option: 91})
    metric = make(name)
    metric.prepare(80)
    with pytest.raises(ConfigError, match=f"{name}: 1 images, wanted"):
        metric.prepare(1)
    many = make(name, **{option: COUNT})
    kept = KeptFeatures.of(REAL[:50])
    many.__dict__["reference"] = replace(many.reference, kept=kept)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="holds the features of 50 images, wanted 90 or more"):
        many.prepare(COUNT)


def test_another_protocol_is_refused(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(9)
    save_features(ImageClassifier(channels=1, size=8, classes=5, width=4), tmp_path / "b", "toy")
    with pytest.raises(Incompatible, match=r"kid: reference .*weights: .* there, .* here"):
        make("kid", features=str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"subset_size": 1}, "subset_size"), ({"subsets": 0}, "subsets"), ({"seed": -1}, "seed")],
)
def test_wrong_options_are_refused(make: Make, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("kid", **options)


def test_a_ball_needs_enough_neighbours(make: Make) -> None:
    with pytest.raises(ValueError, match="wanted fewer neighbours than samples, got 80 and 80"):
        make("precision-recall", neighbours=80)


def test_the_command_in_the_refusal_makes_what_is_missing(
    cli: Cli, toy: Toy, tmp_path: Path
) -> None:
    images, out = write_images(tmp_path / "my images", 9), tmp_path / "out.safetensors"
    preparation = ["--features", toy.features, "--size", 8, "--crop", "none", "--count", 8]
    assert cli("reference", images, out, *preparation).exit_code == 0
    options = {"features": str(toy.features), "reference": str(out), "subset_size": 5}
    with pytest.raises(ConfigError, match=r"holds the features of no images, wanted 5") as refusal:
        KID(KIDOptions(**options)).prepare(10)
    words = shlex.split(str(refusal.value).partition("make it with iec-eval ")[2])
    before = open_reference(str(out))
    told = cli(*words)
    assert told.stdout == f"{out}: 8 images, 64 features, those of 5 images kept\n"
    KID(KIDOptions(**options)).prepare(10)
    assert open_reference(str(out)).digest() == before.digest()


def test_the_packaged_reference_has_no_features_and_stays() -> None:
    options = {"features": "fashion-mnist", "reference": "fashion-mnist"}
    with pytest.raises(ConfigError, match=r"torchvision:FashionMNIST:data:train OUT .*--pad 2"):
        KID(KIDOptions(**options)).prepare(1000)


def test_a_study_scores_them(
    cli: Cli, toy: Toy, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "reference.safetensors"
    images = write_images(tmp_path / "images", 12)
    told = cli("reference", images, out, "--features", toy.features, "--keep-features", 11)
    assert told.exit_code == 0, told.stderr
    common = {"features": str(toy.features), "reference": str(out)}
    kid = {"name": "kid", "subset_size": 6, "subsets": 3, **common}
    both = {"name": "precision-recall", "samples": 9, "neighbours": 2, **common}
    study = write_study(tmp_path, metrics=[kid, both], variants=[{"name": "full precision"}])
    assert cli("launch", study, "-o", tmp_path / "run").exit_code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["protocol"].keys() == {"kid", "precision-recall"}
    (row,) = results["variants"]
    assert row["metrics"].keys() == {"kid-toy", "kid-std-toy", "precision-toy", "recall-toy"}
    header = (tmp_path / "run" / "table.md").read_text()
    assert "kid-toy ↓" in header
    assert "precision-toy ↑" in header
