"""Gaussian noise as a pure function of (seed, image, step).

Every image has its own counter-based random stream (Philox, Salmon et al. 2011), so its noise
depends on nothing but the seed, its index and the step: not on the batch, the rank, the order of
the images or a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_INITIAL = 0
_SCORED, _CALIBRATION = 0, 1


class Noise:
    """The noise of a batch of images.

    Args:
        seed: of the experiment, 0 or more.
        images: indices of the images in the batch.
        shape: of one image's latent, ``(C, H, W)``.
        device: where the results go; drawing always happens on the CPU.
        calibration: whether it is for calibration, whose noise is never that of scored images,
            whatever the two seeds.
    """

    def __init__(
        self,
        seed: int,
        images: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        calibration: bool = False,
    ) -> None:
        self.seed, self.images, self.shape = seed, tuple(images), tuple(shape)
        self.device = torch.device(device)
        self._purpose = _CALIBRATION if calibration else _SCORED

    def initial(self) -> Tensor:
        """The starting point x_T, standard normal ``[B, C, H, W]``."""
        return self._normal(stream=_INITIAL, evaluation=0)

    def draw(self, step: int, evaluation: int = 0) -> Draw:
        """The noise that sampler step ``step`` adds; nothing is drawn until it is asked for."""
        return Draw(self, step, evaluation)

    def _normal(self, *, stream: int, evaluation: int) -> Tensor:
        rows = [self._row(image, stream, evaluation) for image in self.images]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _row(self, image: int, stream: int, evaluation: int) -> np.ndarray:
        bits = np.random.Philox(
            key=[self.seed, image], counter=[0, self._purpose, evaluation, stream]
        )
        return np.random.Generator(bits).standard_normal(self.shape, dtype=np.float32)


class Draw:
    """One step's noise, drawn when first asked for and the same ever after."""

    def __init__(self, noise: Noise, step: int, evaluation: int) -> None:
        self._noise, self._step, self._evaluation = noise, step, evaluation

    @cached_property
    def value(self) -> Tensor:
        """Standard normal ``[B, C, H, W]``."""
        return self._noise._normal(stream=self._step + 1, evaluation=self._evaluation)


class MixedDraw(Draw):
    """A weighted sum of draws, for correctors that renew the noise at each evaluation.

    ``weight`` broadcasts to ``[B, C, H, W]``, for instance one number per image.
    """

    def __init__(self, old: Draw, new: Draw, weight: Tensor) -> None:
        self._old, self._new, self._weight = old, new, weight

    @cached_property
    def value(self) -> Tensor:
        """``(1 - weight) * old + weight * new``."""
        return torch.lerp(self._old.value, self._new.value, self._weight)
