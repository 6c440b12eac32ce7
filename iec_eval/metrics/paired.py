"""PSNR and SSIM: how far a row's images are from the full-precision ones of the same noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from iec_eval.errors import Incompatible
from iec_eval.metrics.base import PairedMetric, Pairs, PerImageMetric

if TYPE_CHECKING:
    from iec_eval.models.base import DiffusionModel

DATA_RANGE = 255.0  # of uint8 images
WINDOW, SIGMA = 11, 1.5
TOGETHER = 16  # pairs: SSIM in float64 takes 120 bytes for each value of each


class MeanOverPairs(PerImageMetric, PairedMetric):
    """The mean over images of a number that each pair has."""

    @abstractmethod
    def compare(self, pairs: Pairs) -> Tensor:
        """The number ``[B]`` of each pair, from its two images alone."""

    def update(self, pairs: Pairs, indices: Tensor) -> None:
        images, reference = pairs.images, pairs.reference
        parts = zip(images.split(TOGETHER), reference.split(TOGETHER), strict=True)
        self.keep(torch.cat([self.compare(Pairs(*part)) for part in parts]), indices)


class PSNR(MeanOverPairs):
    """Peak signal-to-noise ratio to full precision, ``10 log10(255^2 / MSE)`` dB, mean of images.

    The mean squared error is over all values of an image (channels and pixels). Of equal images,
    where the ratio is infinite, one value counts as off by one level, the smallest difference there
    is: so they score the best that an image of their size can, and rows stay averages of the same
    images.
    """

    name = "psnr"
    higher_is_better = True

    def protocol(self) -> dict[str, Any]:
        equal = "equal images count as if one value were off by one level"
        return {**super().protocol(), "data_range": DATA_RANGE, "equal": equal}

    def compare(self, pairs: Pairs) -> Tensor:
        found = peak_signal_noise_ratio(
            pairs.images.double(),
            pairs.reference.double(),
            data_range=DATA_RANGE,
            reduction="none",
            dim=(1, 2, 3),
        )
        return found.clamp(max=best_psnr(pairs.images.shape[1:]))


def best_psnr(shape: Sequence[int]) -> float:
    """PSNR of two uint8 images of ``shape`` that differ by one level in one value, in dB."""
    return 10 * math.log10(DATA_RANGE**2 * math.prod(shape))


class SSIM(MeanOverPairs):
    """Structural similarity to full precision (Wang et al. 2004), mean of images; 1 is equal.

    As torchmetrics defines it by default: Gaussian window of 11x11 pixels with a deviation of 1.5,
    K1 = 0.01, K2 = 0.03, data range 255; each channel by itself, images mirrored at their border.
    (Where the border is left out instead, as in the authors' code, values differ in the second
    or third digit for small images.)
    """

    name = "ssim"
    higher_is_better = True

    def bind(self, model: DiffusionModel) -> None:
        shape = tuple(model.image_shape)
        if min(shape[-2:]) < WINDOW:
            raise Incompatible(
                f"ssim: its window is {WINDOW}x{WINDOW} pixels, the images are only "
                f"{shape[-2]}x{shape[-1]}; remove ssim, psnr works at any size"
            )

    def protocol(self) -> dict[str, Any]:
        window = f"gaussian {WINDOW}x{WINDOW}, deviation {SIGMA}, images mirrored at the border"
        return {**super().protocol(), "data_range": DATA_RANGE, "window": window}

    def compare(self, pairs: Pairs) -> Tensor:
        found = structural_similarity_index_measure(
            pairs.images.double(),
            pairs.reference.double(),
            sigma=SIGMA,
            kernel_size=WINDOW,
            data_range=DATA_RANGE,
            reduction="none",
        )
        assert isinstance(found, Tensor)  # it can return pairs, where asked for more
        return found.reshape(-1)
