"""The Fréchet distance as a function of the weights of the images: its value and its derivative."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from iec_eval.metrics.statistics import ReferenceStatistics


class FrechetDistance:
    """``|mu - mu_r|^2 + tr(sigma + sigma_r - 2 (sigma sigma_r)^(1/2))`` to a reference.

    With S = sigma_r^(1/2) the last trace is that of A^(1/2), A = S sigma S, which is symmetric:
    one symmetric eigendecomposition gives the value and the derivative.
    """

    def __init__(self, reference: ReferenceStatistics) -> None:
        self._mu, self._sigma = reference.mu, reference.sigma

    @cached_property
    def _root(self) -> Tensor:
        """S, ``[D, D]``."""
        values, vectors = torch.linalg.eigh(self._sigma)
        root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return root

    def at(self, mean: Tensor, covariance: Tensor, count: int) -> FrechetTangent:
        """The distance of ``count`` features with this ``mean [D]`` and unbiased ``covariance``."""
        root = self._root
        values, vectors = torch.linalg.eigh(root @ covariance @ root)
        values = values.clamp(min=0)
        gap, traces = mean - self._mu, covariance.trace() + self._sigma.trace()
        distance = float(gap @ gap + traces - 2 * values.sqrt().sum())
        # A singular A has no inverse root. Other weights never lead out of the span of the images
        # at hand, so its pseudo-inverse is the derivative there; below this limit eigenvalues are
        # rounding.
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        factor = (vectors[:, kept] * values[kept] ** -0.25).T @ root
        offset = float(covariance.trace() - values[kept].sqrt().sum())
        return FrechetTangent(distance, count, mean, gap, factor, offset)


@dataclass(frozen=True)
class FrechetTangent:
    """The distance at one set of N images, and its derivative with respect to their weights.

    Of mu and sigma with the weights w_i (1/N each), x_i = f_i - mu and c = N / (N - 1):

        d mu / d w_i = x_i,    d sigma / d w_i = c x_i x_i^T - sigma.

    The derivative of tr A^(1/2) is tr(A^(-1/2) dA) / 2 = tr(M d sigma) / 2 with
    M = S A^(-1/2) S, the map of optimal transport from the images' Gaussian to the reference's. So

        IF_i = 2 (mu - mu_r) . x_i + c x_i^T (I - M) x_i - tr((I - M) sigma),

    whose mean is zero. ``factor [K, D]`` is B with B^T B = M, ``offset`` the last trace; K is the
    rank of A.
    """

    distance: float
    count: int
    mean: Tensor
    gap: Tensor
    factor: Tensor
    offset: float

    def influence(self, features: Tensor) -> Tensor:
        """IF ``[B]`` of some of the images' features ``[B, D]``."""
        centred = features.double() - self.mean
        quadratic = (centred**2).sum(dim=1) - ((centred @ self.factor.T) ** 2).sum(dim=1)
        scale = self.count / (self.count - 1)
        return 2 * centred @ self.gap + scale * quadratic - self.offset
