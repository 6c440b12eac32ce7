"""Calibration in stages: each part is calibrated on the network with the earlier parts applied.

A part's result, its artifact, is kept under a key that covers everything it depends on: the
model, the sampler, the calibration settings and the parts before it. So a changed option makes
that part and the later ones anew, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, denoise
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.samplers.base import Sampler
from iec_eval.study import digest


class ArtifactStore(Protocol):
    """Where artifacts are kept between runs."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The artifact under ``key``, or None if it is not there (or was damaged)."""

    def save(self, key: str, artifact: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
        """Keep an artifact, atomically."""


@dataclass(frozen=True)
class Bench:
    """What a method may use to calibrate: the network as it is so far, and trajectories on it."""

    network: nn.Module
    clock: Clock
    model: DiffusionModel
    sampler: Sampler
    seed: int
    images: int

    def run(self, callbacks: Sequence[DenoisingCallback], *, batch_size: int = 64) -> None:
        """Denoise the calibration images; ``callbacks`` observe every step of every batch."""
        for start in range(0, self.images, batch_size):
            indices = range(start, min(start + batch_size, self.images))
            denoiser = Denoiser(self.network, self.model.condition(indices), self.clock)
            noise = Noise(self.seed, indices, self.model.shape)
            with torch.inference_mode():
                denoise(self.sampler, denoiser, noise, callbacks)


def root_key(
    model: Mapping[str, object], sampler: Mapping[str, object], calibration: Mapping[str, object]
) -> str:
    """The key before any part: model with its hashes, sampler and calibration settings."""
    return digest(
        {"model": dict(model), "sampler": dict(sampler), "calibration": dict(calibration)}
    )


def next_key(key: str, part: EfficiencyMethod) -> str:
    """The key of a part's artifact, from the key before it."""
    return digest([key, part.name, part.options.model_dump(mode="json"), part.version])


def obtain(part: EfficiencyMethod, key: str, bench: Bench, store: ArtifactStore | None) -> Artifact:
    """The part's artifact: from the store, or calibrated now and stored."""
    found = store.load(key) if store is not None else None
    if found is not None:
        return found
    made = part.calibrate(bench)
    if store is not None and made:
        store.save(key, made, {"part": part.name, "options": part.options.model_dump(mode="json")})
    return made
