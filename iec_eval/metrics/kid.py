"""Kernel Inception Distance (Binkowski et al. 2018, section 4) with subsets that a seed fixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torchmetrics.image.kid import poly_mmd

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
        fake, _ = self.images_features()
        real = self.reference_features()
        # numpy promises this generator's draws never change; torch-fidelity draws the same ones
        random = np.random.RandomState(self._seed)
        distances = torch.empty(self._subsets, dtype=torch.float64)
        for position in range(self._subsets):
            some_fake = random.choice(len(fake), self._subset_size, replace=False)
            some_real = random.choice(len(real), self._subset_size, replace=False)
            distances[position] = poly_mmd(real[some_real].double(), fake[some_fake].double())
        return {
            self.result("kid"): float(distances.mean()),
            self.result("kid-std"): float(distances.std(correction=0)),
        }
