"""Fréchet Inception Distance (Heusel et al. 2017, eq. 6) against stored reference statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.intervals import Estimate
from iec_eval.metrics import extrapolation
from iec_eval.metrics.base import FeatureOptions
from iec_eval.metrics.features import Features
from iec_eval.metrics.frechet import FrechetDistance
from iec_eval.metrics.referenced import ReferenceMetric
from iec_eval.metrics.statistics import ReferenceStatistics, check_protocols


class FIDOptions(FeatureOptions):
    """Options of FID."""

    reference: str = Field(
        description="reference statistics: a file or a packaged set (fashion-mnist)"
    )
    allow_biased: bool = Field(
        False, description="score fewer images than feature dimensions, where FID means little"
    )
    allow_other_protocol: bool = Field(
        False,
        description="score against a reference of another protocol, under a name that says so",
    )
    extrapolate: bool = Field(
        True,
        description="also estimate FID of infinitely many images (fid-infinity), where there are "
        "at least 6 images per feature dimension",
    )


class FID(ReferenceMetric):
    """``|mu - mu_r|^2 + tr(sigma + sigma_r - 2 (sigma sigma_r)^(1/2))``; zero is best.

    The result is called ``fid`` for InceptionV3 and ``fid-<tag>`` for any other network. Against
    a reference of another protocol, which only ``allow_other_protocol`` scores at all, the name
    goes on with whose it is: ``fid-vs-pytorch-fid``. States are the float64 sums of torchmetrics'
    own metric, which computes the distance. ``fid-infinity`` is named alike; being unbiased, or
    nearly so, it may be a little below zero.
    """

    name = "fid"
    Options = FIDOptions
    higher_is_better = False
    features_sum: Tensor
    features_cov_sum: Tensor
    features_num_samples: Tensor

    def __init__(self, options: FIDOptions) -> None:
        super().__init__(options, options.reference)
        self._allow_biased = options.allow_biased
        self._allow_other = options.allow_other_protocol
        self._extrapolate = options.extrapolate
        size = self.network.dimensions
        self.add_state("features_sum", torch.zeros(size, dtype=torch.float64), "sum")
        self.add_state("features_cov_sum", torch.zeros(size, size, dtype=torch.float64), "sum")
        self.add_state("features_num_samples", torch.tensor(0), "sum")

    def prepare(self, count: int) -> None:
        super().prepare(count)
        self._check_reference()
        for what, number in (("images", count), ("reference images", self.reference.count)):
            if number is not None:
                _check_count(what, number, self.network.dimensions, self._allow_biased)

    def protocol(self) -> dict[str, Any]:
        reference = {
            "digest": self.reference.digest(),
            "count": self.reference.count,
            "source": self.reference.source,
        }
        if self._is_other:
            reference["protocol"] = self.reference.protocol
        rule = {"parts": list(extrapolation.CUTS), "least_images": self._least_images}
        return {
            **super().protocol(),
            "reference": reference,
            "accumulation": "float64",
            "extrapolation": rule if self._extrapolate else None,
        }

    def update(self, features: Features, indices: Tensor) -> None:
        vectors = features.features.double()
        self.features_sum += vectors.sum(dim=0)
        self.features_cov_sum += vectors.T @ vectors
        self.features_num_samples += len(vectors)

    def compute(self) -> dict[str, float]:
        count = int(self.features_num_samples)
        value = distance_to(self.reference, self.features_sum, self.features_cov_sum, count)
        return {self._result("fid"): value}

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        """FID with influence values, and FID of infinitely many images if there are enough.

        Two passes over the features and two symmetric eigendecompositions ``[D, D]``, one of them
        the reference's; to extrapolate, four passes and five decompositions more.
        """
        found, name = super().estimates(again), self._result("fid")
        listed = torch.cat([indices for _, indices in again]).sort().values
        count, distance = len(listed), FrechetDistance(self.reference)
        mean = self.features_sum / count
        scatter = self.features_cov_sum - count * torch.outer(mean, mean)
        tangent = distance.at(mean, scatter / (count - 1), count)
        together = torch.zeros_like(listed)
        influence = extrapolation.influence_of_all([tangent], again, listed, together)
        found[name] = replace(found[name], influence=influence)
        if self._extrapolate and count >= self._least_images:
            infinite = extrapolation.extrapolate(distance, found[name], again, listed)
            found[self._result("fid-infinity")] = infinite
        return found

    def _result(self, name: str) -> str:
        whose = self.reference.source.get("format", "other-protocol")
        return self.result(name) + (f"-vs-{whose}" if self._is_other else "")

    @property
    def _least_images(self) -> int:
        return extrapolation.needed(self.network.dimensions)

    @property
    def _is_other(self) -> bool:
        return self.reference.protocol != self.network.identity()

    def _check_reference(self) -> None:
        """The protocol is the metric's own or allowed to be another; the dimensions agree."""
        if not self._allow_other:
            way_out = "; allow_other_protocol: true scores all the same, under another name"
            theirs, ours = self.reference.protocol, self.network.identity()
            check_protocols(self.name, self._reference, theirs, ours, way_out)
        if len(self.reference.mu) != self.network.dimensions:
            raise Incompatible(
                f"fid: reference {self._reference!r} has {len(self.reference.mu)} features, wanted "
                f"{self.network.dimensions}; use the features it was made with"
            )


def distance_to(
    reference: ReferenceStatistics, features_sum: Tensor, features_cov_sum: Tensor, count: int
) -> float:
    """FID of ``count`` features to ``reference``.

    ``features_sum [D]`` is the sum of the features f, ``features_cov_sum [D, D]`` that of
    f f^T, both float64. For a bootstrap these are weighted sums: ``w @ f`` and ``f.T @ (w * f)``.
    """
    metric = FrechetInceptionDistance(_Precomputed(len(features_sum)))
    metric.orig_dtype = torch.float64  # the result's, which no update has told it
    # torchmetrics stores sums; where the number of images is unknown, any will do to make them of
    mu, sigma, n = reference.mu, reference.sigma, reference.count or 2
    metric.real_features_sum = mu * n
    metric.real_features_cov_sum = sigma * (n - 1) + n * torch.outer(mu, mu)
    metric.real_features_num_samples = torch.tensor(n)
    metric.fake_features_sum = features_sum.cpu()
    metric.fake_features_cov_sum = features_cov_sum.cpu()
    metric.fake_features_num_samples = torch.tensor(count)
    return float(FrechetInceptionDistance.compute(metric))


class _Precomputed(nn.Identity):
    """Stands where torchmetrics expects InceptionV3: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _check_count(what: str, count: int, dimensions: int, allow_biased: bool) -> None:
    if count < 2:
        raise ConfigError(f"fid: {count} {what}, a covariance needs 2 or more; use more images")
    if count < dimensions and not allow_biased:
        raise ConfigError(
            f"fid: {count} {what}, wanted {dimensions} or more, the dimensions of a feature: below "
            "that the covariance is singular and FID far too high; use more images, or set "
            "allow_biased: true to have the number all the same"
        )
