"""Confidence intervals: derivatives against finite differences, coverage against known answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from iec_eval.intervals import (
    FEWEST,
    GROUPS,
    Estimate,
    groups_of,
    is_spread,
    parts_of,
    quantile,
    simultaneous,
)
from iec_eval.jackknife import with_groups
from iec_eval.metrics.base import Metric, PerImageMetric
from iec_eval.metrics.extrapolation import extrapolate, influence_of_all, intercept_weights, needed
from iec_eval.metrics.features import ClassifierFeatures, Features, ImageClassifier
from iec_eval.metrics.fid import FID, FIDOptions
from iec_eval.metrics.frechet import FrechetDistance
from iec_eval.metrics.inception_score import InceptionScore, InceptionScoreOptions
from iec_eval.metrics.kid import KID, KIDOptions, mmd_influence
from iec_eval.metrics.precision_recall import (
    PrecisionRecall,
    PrecisionRecallOptions,
)
from iec_eval.metrics.statistics import KeptFeatures, ReferenceStatistics
from iec_eval.options import BaseOptions
from iec_eval.training.classifier import save_features

WIDTH = 64  # of a packaged network's features


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(count: int, seed: int, size: int = WIDTH, *, shift: float = 0.0) -> Tensor:
    """Correlated, skewed features ``[count, size]``."""
    mixing = torch.randn(size, size, generator=generator(0)) / math.sqrt(size)
    return (0.5 * torch.randn(count, size, generator=generator(seed)) @ mixing + shift).exp()


def in_batches(features: Any, indices: Tensor, size: int = 37) -> list[tuple[Any, Tensor]]:
    rows = torch.arange(len(indices)).split(size)
    return [(features[chosen], indices[chosen]) for chosen in rows]


def estimates(metric: Metric, batches: list[tuple[Any, Tensor]]) -> dict[str, Estimate]:
    for features, indices in batches:
        metric.update(features, indices)
    return metric.estimates(batches)


def derivative(functional: Callable[[np.ndarray], float], count: int) -> np.ndarray:
    """N d functional / d w_i by central differences, where weights are divided by their sum."""
    found = []
    for image in range(count):
        ends = []
        for step in (1e-4, -1e-4):
            weights = np.ones(count)
            weights[image] += step
            ends.append(functional(weights / weights.sum()))
        found.append((ends[0] - ends[1]) / 2e-4)
    return count * np.array(found)


# --- the packaged shape of metrics ----------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("net")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = ImageClassifier(channels=1, size=8, classes=5, width=4)
    save_features(classifier, folder / "net", "toy")
    return str(folder / "net")


def write_reference(features: str, real: Tensor) -> str:
    double = real.double()
    moments = double.mean(dim=0), torch.cov(double.T), len(real)
    path = Path(features).parent / f"{len(real)}-{float(real.sum()):.6f}.safetensors"
    identity = ClassifierFeatures(Path(features)).identity()
    ReferenceStatistics(*moments, identity, kept=KeptFeatures.of(real)).save(path)
    return str(path)


# --- derivatives ----------------------------------------------------------------------------------


def weighted_fid(f: np.ndarray, mu_r: np.ndarray, sigma_r: np.ndarray, w: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, of weighted images, by scipy's matrix square root."""
    mu, count = w @ f, len(f)
    sigma = count / (count - 1) * (f - mu).T @ (w[:, None] * (f - mu))
    root = np.real(scipy.linalg.sqrtm(sigma_r @ sigma))
    return float((mu - mu_r) @ (mu - mu_r) + np.trace(sigma + sigma_r - 2 * root))


def test_influence_on_fid_is_its_derivative() -> None:
    fake, real = draw(25, 1, size=6, shift=0.2).double(), draw(60, 2, size=6).double()
    reference = ReferenceStatistics(real.mean(dim=0), torch.cov(real.T), 60, {})
    found = FrechetDistance(reference).at(fake.mean(dim=0), torch.cov(fake.T), 25)
    moments = (reference.mu.numpy(), reference.sigma.numpy())
    wanted = derivative(lambda w: weighted_fid(fake.numpy(), *moments, w), 25)
    assert found.distance == pytest.approx(
        weighted_fid(fake.numpy(), *moments, np.full(25, 1 / 25)), rel=1e-9
    )
    np.testing.assert_allclose(found.influence(fake), wanted, rtol=1e-4, atol=1e-5)
    assert float(found.influence(fake).mean()) == pytest.approx(0, abs=1e-10)


def nuclear_fid(f: np.ndarray, mu_r: np.ndarray, root_r: np.ndarray, w: np.ndarray) -> float:
    """The same where the covariance has no full rank: the trace as a sum of singular values.

    tr (S sigma S)^(1/2) is the sum of the singular values of S X^T with sigma = X^T X, which is as
    accurate as its arguments are.
    """
    mu, count = w @ f, len(f)
    x = np.sqrt(count / (count - 1) * w)[:, None] * (f - mu)
    cross = np.linalg.svd(x @ root_r, compute_uv=False).sum()
    return float((mu - mu_r) @ (mu - mu_r) + (x**2).sum() + (root_r**2).sum() - 2 * cross)


def test_influence_on_fid_of_fewer_images_than_dimensions() -> None:
    fake, real = draw(7, 3, size=12, shift=0.2).double(), draw(60, 4, size=12).double()
    reference = ReferenceStatistics(real.mean(dim=0), torch.cov(real.T), 60, {})
    tangent = FrechetDistance(reference).at(fake.mean(dim=0), torch.cov(fake.T), 7)
    root = np.real(scipy.linalg.sqrtm(reference.sigma.numpy()))
    wanted = derivative(lambda w: nuclear_fid(fake.numpy(), reference.mu.numpy(), root, w), 7)
    np.testing.assert_allclose(tangent.influence(fake), wanted, rtol=1e-4, atol=1e-4)
    assert len(tangent.factor) == 6


def test_fid_streams_its_influence_in_the_order_of_indices(features: str) -> None:
    real, fake = draw(300, 5), draw(90, 6, shift=0.1)
    options = FIDOptions(features=features, reference=write_reference(features, real))
    indices = 1000 + 3 * torch.randperm(90, generator=generator(7))
    made = estimates(FID(options), in_batches(Features(fake, fake), indices))
    assert list(made) == ["fid-toy"]  # too few to extrapolate
    tangent = FrechetDistance(FID(options).reference).at(
        fake.double().mean(dim=0), torch.cov(fake.double().T), 90
    )
    assert made["fid-toy"].value == pytest.approx(tangent.distance, rel=1e-8)
    assert made["fid-toy"].influence is not None
    wanted = tangent.influence(fake)[indices.argsort()]
    np.testing.assert_allclose(made["fid-toy"].influence, wanted, rtol=1e-6, atol=1e-8)


def test_influence_on_inception_score_is_its_derivative(features: str) -> None:
    logits = 2 * torch.randn(31, 5, generator=generator(8)).double()
    indices = torch.randperm(31, generator=generator(9))
    p = logits.softmax(dim=1).numpy()[indices.argsort()]

    def score(weights: np.ndarray, rows: list[int]) -> float:
        w = weights[rows] / weights[rows].sum()
        mean = w @ p[rows]
        return math.exp((w[:, None] * p[rows] * np.log(p[rows] / mean)).sum())

    def mean_score(weights: np.ndarray, parts: list[list[int]]) -> float:
        return float(np.mean([score(weights, rows) for rows in parts]))

    for splits in (1, 3):
        metric = InceptionScore(InceptionScoreOptions(features=features, splits=splits))
        made = estimates(metric, in_batches(Features(logits, logits), indices, 7))["is-toy"]
        order = InceptionScore(InceptionScoreOptions(features=features, splits=splits))
        for batch, chosen in in_batches(Features(logits, logits), indices, 31):
            order.update(batch, chosen)
        shuffle = order._shuffled()[1]
        cuts = [part * 31 // splits for part in range(splits + 1)]
        parts = [shuffle[cuts[part] : cuts[part + 1]] for part in range(splits)]
        mean = partial(mean_score, parts=parts)
        assert made.value == pytest.approx(mean(np.full(31, 1 / 31)), rel=1e-9)
        np.testing.assert_allclose(made.influence, derivative(mean, 31), rtol=1e-5, atol=1e-6)


def test_influence_on_kid_is_its_derivative() -> None:
    fake, real = draw(20, 10, size=5, shift=0.2).double(), draw(20, 11, size=5).double()
    within = (fake.numpy() @ fake.numpy().T / 5 + 1) ** 3
    between = (fake.numpy() @ real.numpy().T / 5 + 1) ** 3

    def discrepancy(w: np.ndarray) -> float:
        pairs = np.outer(w, w) * (1 - np.eye(20))
        return float((pairs * within).sum() / pairs.sum() - 2 * w @ between.mean(axis=1))

    np.testing.assert_allclose(
        mmd_influence(fake, real), derivative(discrepancy, 20), rtol=1e-5, atol=1e-7
    )


def test_influence_on_kid_counts_how_often_an_image_is_drawn(features: str) -> None:
    """With one subset of all images it is the whole; images that are never drawn have none."""
    real, fake = draw(60, 12), draw(60, 13, shift=0.1)
    named = {"features": features, "reference": write_reference(features, real)}
    batches = in_batches(Features(fake, fake), torch.arange(60))
    whole = estimates(KID(KIDOptions(subsets=3, subset_size=60, **named)), batches)
    wanted = mmd_influence(fake.double(), real.double())
    np.testing.assert_allclose(whole["kid-toy"].influence, wanted, rtol=1e-6, atol=1e-12)
    some = estimates(KID(KIDOptions(subsets=2, subset_size=30, **named)), batches)["kid-toy"]
    assert some.influence is not None
    assert 0 < int((some.influence == 0).sum()) < 30
    assert float(some.influence.mean()) == pytest.approx(0, abs=1e-12)
    assert some.interval() is not None


def test_few_compared_images_have_no_interval_whatever_their_number(features: str) -> None:
    """KID may draw, precision and recall may compare fewer than are there."""
    real, fake = draw(400, 12), draw(400, 13, shift=0.1)
    named = {"features": features, "reference": write_reference(features, real)}
    batches = in_batches(Features(fake, fake), torch.arange(400))

    def known(metric: Metric) -> set[str]:
        made = with_groups(metric, estimates(metric, batches), batches)
        return {name for name, one in made.items() if one.interval() is not None}

    assert known(KID(KIDOptions(subsets=2, subset_size=15, **named))) == set()
    assert known(KID(KIDOptions(subsets=2, subset_size=40, **named))) == {"kid-toy"}
    both = {"precision-toy", "recall-toy"}
    for samples, wanted in ((FEWEST - 1, set()), (FEWEST, both)):
        options = PrecisionRecallOptions(samples=samples, **named)
        assert known(PrecisionRecall(options)) == wanted


class Level(PerImageMetric):
    """The mean of an image's only value."""

    name = "level"

    def update(self, features: Any, indices: Tensor) -> None:
        self.keep(features.flatten(), indices)


def test_an_average_over_images_has_their_deviations() -> None:
    order = torch.randperm(60, generator=generator(2))
    values, indices = torch.tensor([5.0, 1.0, 3.0]).repeat(20)[order], order
    made = estimates(Level(BaseOptions()), in_batches(values, indices, 2))["level"]
    assert made.value == 3
    assert made.influence is not None
    assert made.influence.tolist() == [2, -2, 0] * 20
    low, high = made.interval() or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(8 / 3 / 59), rel=1e-6)


def test_few_images_have_no_interval() -> None:
    values = torch.randn(FEWEST, generator=generator(3)).double()
    assert Estimate(0.0, values).interval() is not None
    assert Estimate(0.0, values[1:]).interval() is None
    of_seeds = [Estimate(0.0, values[1:]), Estimate(0.0, values[1:])]
    assert Estimate.mean(of_seeds).interval() is None


# --- groups ---------------------------------------------------------------------------------------


def test_groups_are_even_and_follow_the_index_alone() -> None:
    indices = list(range(0, 3000, 3))
    groups = groups_of(indices)
    assert groups.bincount().tolist() == [1000 // GROUPS] * GROUPS
    order = torch.randperm(1000, generator=generator(1))
    again = groups_of([indices[position] for position in order.tolist()])
    assert torch.equal(again, groups[order])
    # not in step with classes, which go round with the index
    classes = [groups[torch.arange(1000) % 10 == number].bincount() for number in range(10)]
    assert all(int(counts.max()) < 20 for counts in classes)
    assert parts_of([5], 3).tolist() == [0]
    assert parts_of([], 3).tolist() == []


def middle(values: np.ndarray) -> float:
    return float(scipy.stats.trim_mean(values, 0.25))


class Middle(Metric):
    """The mean of the middle half of the values; gives no influence values."""

    name = "middle"
    values: list[Tensor]

    def __init__(self, least: int = 0, otherwise: float | None = None) -> None:
        super().__init__(BaseOptions())
        self.add_state("values", [], "cat")
        self.add_state("seen", torch.zeros(()), "sum")
        self.least, self.otherwise = least, otherwise

    def update(self, features: Any, indices: Tensor) -> None:
        self.values.append(features.flatten())
        self.seen += len(indices)

    def compute(self) -> dict[str, float]:
        values = torch.cat(self.values)
        if len(values) < self.least and self.otherwise is not None:
            return {"middle": self.otherwise, "middle-std": 0.0}
        if len(values) < self.least:
            raise ValueError(f"{len(values)} are too few")
        assert len(values) == int(self.seen)
        return {"middle": middle(values.numpy()), "middle-std": float(values.std())}


def test_a_metric_is_computed_without_each_group() -> None:
    values = torch.randn(200, generator=generator(2))
    indices = torch.randperm(200, generator=generator(3))
    batches = in_batches(values, indices, 23)
    metric = Middle()
    made = with_groups(metric, estimates(metric, batches), batches)
    groups = groups_of(indices.tolist()).numpy()
    wanted = [middle(values.numpy()[groups != group]) for group in range(GROUPS)]
    assert made["middle"].without is not None
    np.testing.assert_allclose(made["middle"].without, wanted, atol=1e-6)
    assert made["middle-std"].interval() is None  # a spread
    # Efron 1982, eq. 3.5, with groups for images
    error = math.sqrt((GROUPS - 1) / GROUPS * ((wanted - np.mean(wanted)) ** 2).sum())
    low, high = made["middle"].interval() or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 19) * error, rel=1e-5)


def test_a_number_that_takes_a_second_look_takes_no_interval_from_the_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    batches = in_batches(torch.arange(100.0), torch.arange(100))
    metric = Middle()
    second = {**estimates(metric, batches), "second-look": Estimate(1.0)}
    made = with_groups(metric, second, batches)
    assert made["middle"].interval() is not None
    assert (made["second-look"].value, made["second-look"].interval()) == (1.0, None)
    told = capfd.readouterr().err
    assert "no confidence interval for second-look" in told
    assert "compute() does not give it" in told


def test_without_enough_images_there_is_no_interval(capfd: pytest.CaptureFixture[str]) -> None:
    batches = in_batches(torch.arange(2 * GROUPS - 1.0), torch.arange(2 * GROUPS - 1))
    few = Middle()
    assert with_groups(few, estimates(few, batches), batches)["middle"].interval() is None
    assert capfd.readouterr().err == ""
    batches = in_batches(torch.arange(100.0), torch.arange(100))
    strict = Middle(least=100)
    made = with_groups(strict, estimates(strict, batches), batches)["middle"]
    assert (made.value, made.interval()) == (49.5, None)
    wanted = "no confidence interval for middle; without a 20th of the images it cannot be computed"
    assert wanted in capfd.readouterr().err
    undefined = Middle(least=100, otherwise=math.nan)  # of which the others are not the worse
    made = with_groups(undefined, estimates(undefined, batches), batches)["middle"]
    assert (made.value, made.interval()) == (49.5, None)
    assert wanted in capfd.readouterr().err


def test_recall_without_groups_is_recall_of_the_others(
    features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    monkeypatch.setattr("iec_eval.metrics.precision_recall.BLOCK", 17)
    real, fake = draw(80, 14), draw(100, 15, shift=0.05)
    reference = write_reference(features, real)
    options = PrecisionRecallOptions(features=features, reference=reference, samples=80)
    metric = PrecisionRecall(options)
    made = estimates(metric, in_batches(Features(fake, fake), torch.arange(100)))
    compared, real_compared, chosen = metric._compared()
    groups = groups_of(chosen)
    wanted = [
        prc_features_to_metric(
            compared[groups != group],
            real_compared,
            prc_neighborhood=3,
            prc_batch_size=1000,
            save_cpu_ram=True,
            verbose=False,
        )["recall"]
        for group in range(GROUPS)
    ]
    assert made["recall-toy"].without is not None
    np.testing.assert_allclose(made["recall-toy"].without, wanted, atol=1e-6)
    assert len(set(wanted)) > 3
    # precision is a share of 80 images
    influence, value = made["precision-toy"].influence, made["precision-toy"].value
    assert influence is not None
    assert int((influence == 0).sum()) == 20
    assert 0 < value < 1
    error = made["precision-toy"].standard_error()
    assert error == pytest.approx(math.sqrt(value * (1 - value) / 80), rel=0.01)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.995])
def test_quantiles(level: float) -> None:
    half = (1 + level) / 2
    assert quantile(level) == pytest.approx(scipy.stats.norm.ppf(half), rel=1e-9)
    for freedom in (15, GROUPS - 1, 100):
        wanted = scipy.stats.t.ppf(half, freedom)
        assert quantile(level, freedom) == pytest.approx(wanted, rel=1e-4)


def test_several_intervals_hold_together() -> None:
    assert [simultaneous(rivals) for rivals in (0, 1, 5)] == pytest.approx([0.95, 0.95, 0.99])


def test_differences_are_taken_image_by_image() -> None:
    values = torch.randn(50, generator=generator(4)).double()
    one, other = Estimate(3.0, values), Estimate(1.0, values + 0.0)
    assert (one - other).interval() == (2.0, 2.0)
    assert one.interval() != (3.0, 3.0)
    with pytest.raises(ValueError, match=r"50.*and.*49"):
        one - Estimate(1.0, values[1:])
    assert (one - Estimate(1.0)).interval() is None
    with pytest.raises(ValueError, match=r"standard error of 3\.0 is"):
        Estimate(3.0, values / 0).interval()


def test_spreads_are_told_by_their_name() -> None:
    assert [is_spread(name) for name in ("is-std", "kid_std-x", "fid", "standard")] == [
        True, True, False, False,
    ]  # fmt: skip


# --- coverage -------------------------------------------------------------------------------------
# Many studies are drawn from known distributions. The mean over studies of what is estimated is
# what the intervals are to cover: for FID that of N images, with its bias.


def coverage(made: Iterable[Estimate], truth: float | None = None) -> float:
    """The share of 95 % intervals that hold ``truth``, or else the mean of the values."""
    drawn = list(made)
    wanted = truth if truth is not None else float(np.mean([one.value for one in drawn]))
    bounds = [one.interval() or (math.inf, math.inf) for one in drawn]
    return float(np.mean([low <= wanted <= high for low, high in bounds]))


class Study:
    """Pairs of rows: images ``x [N, D]`` from common noise, changed a little in the second row."""

    def __init__(self, size: int, count: int, *, distance: float = 1.0) -> None:
        self.count = count
        scale = torch.arange(1, size + 1).double() ** -0.5
        self.reference = ReferenceStatistics(
            torch.zeros(size).double(), torch.diag(scale**2), None, {}
        )
        self.distance = FrechetDistance(self.reference)
        self.mean, self.scale = 0.4 * distance * scale, (1 + 0.3 * distance) * scale
        self.shrink = 0.8
        self.listed = torch.arange(count)

    def rows(self, seed: int) -> tuple[Tensor, Tensor]:
        noise, own = torch.randn(2, self.count, len(self.scale), generator=generator(seed)).double()
        changed = 0.9 * noise + math.sqrt(1 - 0.9**2) * own
        return self.mean + self.scale * noise, self.mean + self.shrink * self.scale * changed

    def fid(self, x: Tensor) -> Estimate:
        tangent = self.distance.at(x.mean(dim=0), torch.cov(x.T), len(x))
        return Estimate(tangent.distance, tangent.influence(x))

    def infinite(self, x: Tensor) -> Estimate:
        batches = in_batches(Features(x, x), self.listed, len(x))
        return extrapolate(self.distance, self.fid(x), batches, self.listed)

    def true_fid(self, shrink: float = 1.0) -> float:
        """Both covariances are diagonal."""
        roots = self.reference.sigma.diagonal().sqrt()
        return float((self.mean**2).sum() + ((shrink * self.scale - roots) ** 2).sum())


def check_fid_coverage(size: int, count: int, studies: int, low: float, high: float) -> None:
    study, rows = Study(size, count), [Study(size, count).rows(seed) for seed in range(studies)]
    first, second = ([study.fid(row) for row in both] for both in zip(*rows, strict=True))
    differences = [one - other for one, other in zip(first, second, strict=True)]
    for made in (first, second, differences):
        assert low <= coverage(made) <= high
    # sharing noise makes a difference surer than two rows on their own
    alone = math.hypot(first[0].standard_error() or 0, second[0].standard_error() or 0)
    assert (differences[0].standard_error() or 0) < 0.8 * alone


def test_intervals_of_fid_and_its_differences_cover() -> None:
    check_fid_coverage(size=4, count=600, studies=1000, low=0.93, high=0.97)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(4, 1000), (16, 400), (32, 1000)])
def test_intervals_of_fid_cover_for_more_dimensions(size: int, count: int) -> None:
    check_fid_coverage(size, count, studies=3000, low=0.935, high=0.965)


@pytest.mark.parametrize(("size", "count"), [(8, 96), (16, 96)])
def test_extrapolated_fid_has_hardly_any_bias(size: int, count: int) -> None:
    """Down to the fewest images it is given for, six a dimension."""
    assert count >= needed(size)
    study = Study(size, count, distance=0.1)
    rows = [study.rows(seed)[0] for seed in range(150)]
    true, infinite = study.true_fid(), [study.infinite(row).value for row in rows]
    bias = float(np.mean([study.fid(row).value for row in rows])) - true
    left = float(np.mean(infinite)) - true
    assert bias > 10 * float(np.std(infinite)) / math.sqrt(150)
    assert abs(left) < 0.2 * bias


def check_infinite_coverage(size: int, count: int, studies: int, low: float, high: float) -> None:
    """Its intervals are to cover the true FID, not that of N images."""
    study = Study(size, count)
    made = [study.infinite(study.rows(seed)[0]) for seed in range(studies)]
    assert low <= coverage(made, study.true_fid()) <= high


def test_intervals_of_extrapolated_fid_cover_the_true_one() -> None:
    check_infinite_coverage(size=4, count=400, studies=400, low=0.93, high=0.97)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(8, 400), (16, 400)])
def test_intervals_of_extrapolated_fid_cover_for_more_dimensions(size: int, count: int) -> None:
    check_infinite_coverage(size, count, studies=2000, low=0.935, high=0.965)


def test_extrapolation_is_a_line_through_the_parts() -> None:
    assert intercept_weights([1, 2, 3]).tolist() == pytest.approx([4 / 3, 1 / 3, -2 / 3])
    study = Study(3, 100)
    x = study.rows(0)[0]
    y = [study.fid(x).value]
    for cut in (2, 3):
        part = parts_of(range(100), cut)
        y.append(float(np.mean([study.fid(x[part == number]).value for number in range(cut)])))
    sizes = [np.mean([1 / int((parts_of(range(100), cut) == n).sum()) for n in range(cut)])
             for cut in (1, 2, 3)]  # fmt: skip
    wanted = np.polynomial.Polynomial.fit(sizes, y, 1).convert().coef[0]
    assert study.infinite(x).value == pytest.approx(wanted, rel=1e-9)


def test_influence_on_extrapolated_fid_is_its_derivative() -> None:
    study = Study(2, 61)  # the parts cannot be equally large
    x = study.rows(1)[0]
    parts = {cut: parts_of(range(61), cut) for cut in (1, 2, 3)}
    places = [float((61 / part.bincount()).mean()) for part in parts.values()]
    line = intercept_weights(places).numpy()
    moments = study.reference.mu.numpy(), study.reference.sigma.numpy()

    def extrapolated(weights: np.ndarray) -> float:
        means = []
        for cut, part in parts.items():
            rows = [np.flatnonzero(part.numpy() == number) for number in range(cut)]
            found = [
                weighted_fid(x.numpy()[row], *moments, weights[row] / weights[row].sum())
                for row in rows
            ]
            means.append(np.mean(found))
        return float(line @ np.array(means))

    wanted = derivative(extrapolated, 61)
    np.testing.assert_allclose(study.infinite(x).influence, wanted, rtol=1e-3, atol=1e-4)


def test_fid_infinity_is_a_result_where_there_are_enough_images(features: str) -> None:
    reference = write_reference(features, draw(500, 16))
    enough = needed(WIDTH)
    assert enough == 384
    fake = draw(enough, 17, shift=0.1)

    def made(count: int, **options: Any) -> dict[str, Estimate]:
        metric = FID(FIDOptions(features=features, reference=reference, **options))
        batches = in_batches(Features(fake[:count], fake[:count]), torch.arange(count), 100)
        return estimates(metric, batches)

    found = made(enough)
    assert list(found) == ["fid-toy", "fid-infinity-toy"]
    assert found["fid-infinity-toy"].value < found["fid-toy"].value
    assert found["fid-infinity-toy"].interval() is not None
    assert list(made(enough - 1)) == list(made(enough, extrapolate=False)) == ["fid-toy"]
    rule = FID(FIDOptions(features=features, reference=reference)).protocol()["extrapolation"]
    assert rule == {"parts": [1, 2, 3], "least_images": enough}


def score_study(features: str, seed: int) -> Estimate:
    """Four kinds of images and noise."""
    drawn = torch.randint(0, 4, (240,), generator=generator(seed))
    noise = torch.randn(240, 6, generator=generator(seed + 10_000))
    logits = (3 * torch.eye(4, 6)[drawn] + noise).double()
    metric = InceptionScore(InceptionScoreOptions(features=features, splits=2))
    batches = in_batches(Features(logits, logits), torch.arange(240), 240)
    return estimates(metric, batches)["is-toy"]


def kid_study(features: str, reference: str, seed: int) -> Estimate:
    options = KIDOptions(features=features, reference=reference, subsets=2, subset_size=150)
    fake = few_dimensions(300, seed, 0.5)
    batches = in_batches(Features(fake, fake), torch.arange(300), 300)
    return estimates(KID(options), batches)["kid-toy"]


def few_dimensions(count: int, seed: int, shift: float) -> Tensor:
    """Features of which eight vary."""
    drawn = torch.zeros(count, WIDTH)
    drawn[:, :8] = 2 * torch.randn(count, 8, generator=generator(seed)) + shift
    return drawn


def average_study(seed: int) -> Estimate:
    """Values with the mean one, skewed."""
    values = torch.rand(200, generator=generator(seed)).double() ** 2 * 3
    batches = in_batches(values, torch.arange(200), 200)
    return estimates(Level(BaseOptions()), batches)["level"]


@pytest.mark.parametrize("name", ["score", "kid", "average"])
@pytest.mark.parametrize(
    ("studies", "slack"), [(300, 0.02), pytest.param(3000, 0.015, marks=pytest.mark.slow)]
)
def test_intervals_cover(features: str, name: str, studies: int, slack: float) -> None:
    reference = write_reference(features, few_dimensions(300, 99_999, 0.0))
    make = {
        "score": partial(score_study, features),
        "kid": partial(kid_study, features, reference),
        "average": average_study,
    }[name]
    truth = 1.0 if name == "average" else None
    assert coverage(map(make, range(studies)), truth) == pytest.approx(0.95, abs=slack)


def test_intervals_by_groups_cover() -> None:
    def study(seed: int) -> Estimate:
        values = torch.randn(200, generator=generator(seed))
        batches, metric = in_batches(values, torch.arange(200), 200), Middle()
        return with_groups(metric, estimates(metric, batches), batches)["middle"]

    assert 0.90 <= coverage((study(seed) for seed in range(100)), truth=0.0) <= 0.99


def test_all_images_influence_their_own_part() -> None:
    study = Study(2, 40)
    x = study.rows(2)[0]
    part = parts_of(range(40), 2)
    tangents = [
        study.distance.at(x[part == n].mean(dim=0), torch.cov(x[part == n].T), 20) for n in (0, 1)
    ]
    batches = in_batches(Features(x, x), study.listed, 7)
    found = influence_of_all(tangents, batches, study.listed, part)
    for number, tangent in enumerate(tangents):
        wanted = tangent.influence(x[part == number])
        np.testing.assert_allclose(found[part == number], wanted)
