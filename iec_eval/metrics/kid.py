"""Kernel Inception Distance (Binkowski et al. 2018, section 4) with subsets that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from iec_eval.intervals import FEWEST, Estimate
from iec_eval.metrics.feature_sets import FeatureSetMetric, FeatureSetOptions


class KIDOptions(FeatureSetOptions):
    """Options of KID."""

    subsets: int = Field(100, ge=1, description="pairs of subsets to compare and average")
    subset_size: int = Field(1000, ge=2, description="images of either side in one comparison")


class KID(FeatureSetMetric):
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / D + 1)^3``; zero is best.

    Mean and standard deviation over pairs of random subsets of images and reference, called
    ``kid`` and ``kid-std``, for any network but InceptionV3 ``kid-<tag>`` and ``kid-std-<tag>``.
    Being unbiased, it may be a little below zero, and does not fall with the number of images as
    FID does. The deviation is that of the population (0 for one pair), as in the original code.
    """

    name = "kid"
    Options = KIDOptions
    higher_is_better = False

    def __init__(self, options: KIDOptions) -> None:
        super().__init__(options)
        self._subsets, self._subset_size = options.subsets, options.subset_size

    @property
    def needed(self) -> tuple[int, str]:
        return self._subset_size, "subset_size"

    def protocol(self) -> dict[str, Any]:
        subsets = {
            "count": self._subsets,
            "size": self._subset_size,
            "rule": "numpy RandomState(seed).choice, images sorted by index",
        }
        return {**super().protocol(), "subsets": subsets, "kernel": "(x.y / D + 1)^3"}

    def compute(self) -> dict[str, float]:
        fake, real = self.images_features()[0], self.reference_features()
        distances = torch.tensor(
            [
                float(poly_mmd(real[some_real].double(), fake[some_fake].double()))
                for some_fake, some_real in self._draws(len(fake), len(real))
            ],
            dtype=torch.float64,
        )
        return {
            self.result("kid"): float(distances.mean()),
            self.result("kid-std"): float(distances.std(correction=0)),
        }

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        fake, real = self.images_features()[0], self.reference_features()
        influence = torch.zeros(len(fake), dtype=torch.float64)
        compared = torch.zeros(len(fake), dtype=torch.bool)
        for some_fake, some_real in self._draws(len(fake), len(real)):
            compared[some_fake] = True
            influence[some_fake] += mmd_influence(
                fake[some_fake].double(), real[some_real].double()
            )
        influence *= len(fake) / (self._subset_size * self._subsets)
        found, name = super().estimates(again), self.result("kid")
        if compared.sum() < FEWEST:  # so few values are no interval, of whatever number of images
            return {**found, name: found[name].unsure()}
        return {**found, name: replace(found[name], influence=influence)}

    def _draws(self, fake: int, real: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of subsets of so many images and so many reference images."""
        # numpy promises this generator's draws never change; torch-fidelity draws the same ones
        random = np.random.RandomState(self._seed)
        for _ in range(self._subsets):
            drawn = [
                random.choice(count, self._subset_size, replace=False) for count in (fake, real)
            ]
            yield torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])


def mmd_influence(fake: Tensor, real: Tensor) -> Tensor:
    """Influence ``[N]`` of each of ``fake [N, D]`` on the squared discrepancy to ``real [M, D]``.

    The derivative of the U-statistic with respect to the weights, times N: twice the mean kernel of
    an image with the other images, less twice that with the reference, centred.
    """
    within = _kernel(fake, fake)
    others = (within.sum(dim=1) - within.diagonal()) / (len(fake) - 1)
    slope = 2 * (others - _kernel(fake, real).mean(dim=1))
    return slope - slope.mean()


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3
