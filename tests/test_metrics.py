"""FID, Inception Score and reference statistics, against independent implementations."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.images import FolderImages, ImagePreparation, load_all
from iec_eval.metrics.base import Metric
from iec_eval.metrics.features import ClassifierFeatures, Features, ImageClassifier
from iec_eval.metrics.fid import FID, FIDOptions, distance_to
from iec_eval.metrics.inception_score import (
    InceptionScore,
    InceptionScoreOptions,
    inception_score,
    shuffled,
)
from iec_eval.metrics.statistics import (
    Moments,
    ReferenceStatistics,
    open_reference,
    reference_from_images,
)
from iec_eval.training.classifier import save_features

COUNT = 150


def draw_features(count: int, seed: int, *, shift: float = 0.0) -> Tensor:
    """Correlated features ``[count, 64]``, float32, all positive as pooled activations are."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    return (torch.randn(count, 64, generator=random) @ mixing + shift).exp()


def statistics_of(features: Tensor, protocol: dict[str, str]) -> ReferenceStatistics:
    moments = Moments(features.shape[1])
    moments.update(features)
    return ReferenceStatistics(moments.mean, moments.covariance(), moments.count, protocol)


REAL = draw_features(400, seed=1)
FAKE = Features(draw_features(COUNT, seed=2, shift=0.2), 3 * draw_features(COUNT, seed=3)[:, :5])
INDICES = torch.arange(1000, 1000 + COUNT)


@pytest.fixture
def network(tmp_path: Path) -> ClassifierFeatures:
    torch.manual_seed(0)
    save_features(ImageClassifier(channels=1, size=8, classes=5, width=4), tmp_path / "net", "toy")
    return ClassifierFeatures(tmp_path / "net")


@pytest.fixture
def fid(network: ClassifierFeatures, tmp_path: Path) -> FID:
    statistics_of(REAL, network.identity()).save(tmp_path / "real.safetensors")
    reference = str(tmp_path / "real.safetensors")
    return FID(FIDOptions(features=str(tmp_path / "net"), reference=reference))


@pytest.fixture
def score(network: ClassifierFeatures, tmp_path: Path) -> InceptionScore:
    return InceptionScore(InceptionScoreOptions(features=str(tmp_path / "net"), splits=4))


def take_in(metric: Metric, order: Tensor, batch: int) -> None:
    for chosen in torch.split(order, batch):
        metric.update(Features(FAKE.features[chosen], FAKE.logits[chosen]), INDICES[chosen])


@pytest.fixture(params=["fid", "score"])
def metric(request: pytest.FixtureRequest) -> Metric:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Metric)
    return found


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, with scipy's matrix square root."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    sigma_1, sigma_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_1 @ sigma_2).real
    gap = first.mean(axis=0) - second.mean(axis=0)
    return float(gap @ gap + np.trace(sigma_1 + sigma_2 - 2 * root))


def test_fid_equals_the_formula_and_torch_fidelity(fid: FID) -> None:
    take_in(fid, torch.arange(COUNT), 37)
    result = fid.compute()
    wanted = frechet_distance(FAKE.features.numpy(), REAL.numpy())
    both = [fid_features_to_statistics(features) for features in (FAKE.features, REAL)]
    theirs = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert list(result) == ["fid-toy"]
    assert result["fid-toy"] == pytest.approx(wanted, rel=1e-6)
    assert result["fid-toy"] == pytest.approx(theirs, rel=2e-5)  # its mean is float32


def test_fid_of_stored_statistics_is_that_of_the_features(fid: FID) -> None:
    direct = FrechetInceptionDistance(torch.nn.Flatten(), input_img_size=(1, 8, 8))
    direct.update(REAL.double(), real=True)
    direct.update(FAKE.features.double(), real=False)
    take_in(fid, torch.arange(COUNT), COUNT)
    assert fid.compute()["fid-toy"] == pytest.approx(float(direct.compute()), rel=1e-9)


def test_distance_takes_weights(fid: FID) -> None:
    weights = torch.randint(0, 3, (COUNT,), generator=torch.Generator().manual_seed(4))
    f = FAKE.features.double()
    weighted = distance_to(
        fid.reference, weights.double() @ f, f.T @ (weights[:, None] * f), int(weights.sum())
    )
    repeated = f.repeat_interleave(weights, dim=0)
    assert weighted == pytest.approx(frechet_distance(repeated.numpy(), REAL.numpy()), rel=1e-6)


def test_score_equals_torch_fidelity(network: ClassifierFeatures, tmp_path: Path) -> None:
    theirs = isc_features_to_metric(FAKE.logits, splits=1)["inception_score_mean"]
    assert inception_score(FAKE.logits.double()) == pytest.approx(theirs, rel=1e-12)
    whole = InceptionScore(InceptionScoreOptions(features=str(tmp_path / "net"), splits=1))
    take_in(whole, torch.arange(COUNT), 40)
    assert whole.compute() == {"is-toy": pytest.approx(theirs, rel=1e-12), "is-std-toy": 0.0}


def test_score_splits_as_torch_fidelity_does(score: InceptionScore) -> None:
    take_in(score, torch.arange(COUNT), 40)
    order = shuffled(INDICES.tolist(), seed=0)
    theirs = isc_features_to_metric(FAKE.logits[order], splits=4, shuffle=False)
    assert score.compute() == {
        "is-toy": pytest.approx(theirs["inception_score_mean"], rel=1e-9),
        "is-std-toy": pytest.approx(theirs["inception_score_std"], rel=1e-9),
    }


def test_halves_merge_into_the_whole(metric: Metric) -> None:
    first, second = metric.clone(), metric.clone()
    take_in(metric, torch.arange(COUNT), 32)
    take_in(first, torch.arange(40), 7)
    take_in(second, torch.arange(40, COUNT), 64)
    first.merge_state(second)
    assert first.compute() == pytest.approx(metric.compute(), rel=1e-9)


def test_order_and_batches_do_not_matter(metric: Metric) -> None:
    other = metric.clone()
    take_in(metric, torch.arange(COUNT), 32)
    take_in(other, torch.randperm(COUNT, generator=torch.Generator().manual_seed(5)), 11)
    assert other.compute() == pytest.approx(metric.compute(), rel=1e-9)


def test_splits_follow_seed_and_index(tmp_path: Path, network: ClassifierFeatures) -> None:
    def scored(seed: int, indices: Tensor) -> dict[str, float]:
        options = InceptionScoreOptions(features=str(tmp_path / "net"), splits=4, seed=seed)
        metric = InceptionScore(options)
        metric.update(FAKE, indices)
        return metric.compute()

    assert scored(0, INDICES) == scored(0, INDICES)
    assert scored(0, INDICES)["is-toy"] != scored(1, INDICES)["is-toy"]
    assert scored(0, INDICES)["is-toy"] != scored(0, INDICES + 1)["is-toy"]


def test_shuffle_is_pinned() -> None:
    """Changing it would change every published split."""
    assert shuffled(range(8), seed=0) == [6, 4, 5, 2, 3, 1, 7, 0]


def test_score_does_not_depend_on_the_global_generator() -> None:
    logits, values = FAKE.logits.double(), set()
    for seed in range(8):  # bits, not digits: torchmetrics adds up in an order it draws
        torch.manual_seed(seed)
        values.add(inception_score(logits))
    assert len(values) == 1


def test_an_image_counted_twice_is_noticed(score: InceptionScore) -> None:
    take_in(score, torch.tensor([0, 1, 1, 2, 3]), 5)
    with pytest.raises(ValueError, match="twice"):
        score.compute()


def test_score_is_silent_and_leaves_the_generator_alone(score: InceptionScore) -> None:
    take_in(score, torch.arange(COUNT), 50)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score.compute()
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_starts_again(metric: Metric) -> None:
    take_in(metric, torch.arange(20), 20)
    metric.reset()
    take_in(metric, torch.arange(COUNT), 50)
    fresh = metric.clone()
    fresh.reset()
    take_in(fresh, torch.arange(COUNT), 50)
    assert metric.compute() == fresh.compute()


def test_protocol_names_what_a_number_depends_on(fid: FID, score: InceptionScore) -> None:
    assert fid.protocol()["features"] == fid.network.identity()
    assert fid.protocol()["reference"]["digest"] == fid.reference.digest()
    assert score.protocol()["splits"]["count"] == 4


def test_other_protocol_is_refused(fid: FID, tmp_path: Path) -> None:
    torch.manual_seed(9)
    save_features(ImageClassifier(channels=1, size=8, classes=5, width=4), tmp_path / "b", "toy")
    reference = str(tmp_path / "real.safetensors")
    other = FID(FIDOptions(features=str(tmp_path / "b"), reference=reference))
    there, here = fid.network.identity()["weights"], other.network.identity()["weights"]
    with pytest.raises(Incompatible, match=rf"weights: '{there}' there, '{here}' here"):
        other.prepare(COUNT)


def test_too_few_images_are_refused(fid: FID, score: InceptionScore, tmp_path: Path) -> None:
    fid.prepare(64)
    with pytest.raises(ConfigError, match=r"63 images, wanted 64 or more.*allow_biased: true"):
        fid.prepare(63)
    score.prepare(4)
    with pytest.raises(ConfigError, match="3 images in 4 splits"):
        score.prepare(3)
    biased = FID(FIDOptions(**{**fid.options.model_dump(), "allow_biased": True}))
    biased.prepare(2)
    with pytest.raises(ConfigError, match="2 or more"):
        biased.prepare(1)


def test_too_small_a_reference_is_refused(network: ClassifierFeatures, tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    statistics_of(REAL[:50], network.identity()).save(path)
    few = FID(FIDOptions(features=str(tmp_path / "net"), reference=str(path)))
    with pytest.raises(ConfigError, match="50 reference images, wanted 64"):
        few.prepare(COUNT)


def test_construction_needs_no_reference(network: ClassifierFeatures, tmp_path: Path) -> None:
    metric = FID(FIDOptions(features=str(tmp_path / "net"), reference="nowhere.safetensors"))
    with pytest.raises(ConfigError, match=r"wanted a file or one of fashion-mnist"):
        metric.prepare(COUNT)


def test_statistics_come_back_as_saved(tmp_path: Path) -> None:
    saved = ReferenceStatistics(
        *(torch.rand(3).double(), torch.rand(3, 3).double(), 7),
        protocol={"weights": "é"},
        source={"images": "x", "preparation": {"size": None}},
    )
    saved.save(tmp_path / "a.safetensors")
    loaded = open_reference(str(tmp_path / "a.safetensors"))
    assert loaded.digest() == saved.digest()
    assert (loaded.count, loaded.protocol, loaded.source) == (7, saved.protocol, saved.source)
    assert torch.equal(loaded.sigma, saved.sigma)
    assert loaded.sigma.dtype == torch.float64


def test_files_that_are_no_statistics_are_refused(fid: FID, tmp_path: Path) -> None:
    path = tmp_path / "real.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"real\.safetensors: not reference statistics"):
        open_reference(str(path))
    save_file({"mu": torch.zeros(2)}, path)
    with pytest.raises(CorruptFile, match="wanted schema 'iec_eval reference 1', got None"):
        open_reference(str(path))
    broken = ReferenceStatistics(torch.zeros(2).double(), torch.zeros(3, 3).double(), 4, {})
    broken.save(path)
    with pytest.raises(CorruptFile, match=r"mu \(2,\), sigma \(3, 3\)"):
        open_reference(str(path))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_moments_are_those_of_the_whole(offset: float) -> None:
    vectors = draw_features(300, seed=6).double() + offset
    moments = Moments(64)
    for batch in torch.split(vectors, 71):
        moments.update(batch)
    wanted = np.cov(vectors.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.mean, vectors.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance(), wanted, rtol=1e-7, atol=1e-12)


def write_images(folder: Path, sizes: list[int]) -> FolderImages:
    folder.mkdir()
    random = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        pixels = random.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return FolderImages(folder)


def test_reference_from_images(network: ClassifierFeatures, tmp_path: Path) -> None:
    images, seen = write_images(tmp_path / "images", [12, 10, 9, 8, 12]), []
    preparation = ImagePreparation(size=8)
    made = reference_from_images(
        images,
        preparation,
        network,
        source="here",
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    features = network.extract(load_all(images, preparation)[0]).features.double().numpy()
    np.testing.assert_allclose(made.mu, features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(made.sigma, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-9)
    assert made.protocol == network.identity()
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert made.source["images"] == "here"
    assert made.source["preparation"] == {"pad": 0, "size": 8, "channels": None}


def test_pixel_hash_follows_the_pixels_alone(network: ClassifierFeatures, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [8, 8, 8])

    def pixels(preparation: ImagePreparation, batch_size: int) -> str:
        made = reference_from_images(
            images, preparation, network, source="here", batch_size=batch_size
        )
        return str(made.source["pixels"])

    assert pixels(ImagePreparation(), 2) == pixels(ImagePreparation(), 3)
    assert pixels(ImagePreparation(), 2) != pixels(ImagePreparation(pad=1, size=8), 2)


def test_images_of_several_shapes_are_refused(network: ClassifierFeatures, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [8, 8, 9])
    with pytest.raises(ConfigError, match=r"image 2 has shape \(1, 9, 9\), the first \(1, 8, 8\)"):
        reference_from_images(images, ImagePreparation(), network, source="here", batch_size=2)
