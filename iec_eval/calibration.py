"""Calibration in stages: each part is calibrated on the network with the earlier parts applied.

A part's result, its artifact, is kept under a key that covers everything it depends on: the
model, the sampler, the calibration settings and the parts before it. So a changed option makes
that part and the later ones anew, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, denoise
from iec_eval.efficiency.base import Artifact
from iec_eval.errors import MissingArtifact
from iec_eval.fingerprints import Identified, digest, identity
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.progress import Progress
from iec_eval.samplers.base import Sampler
from iec_eval.study import CALIBRATION_BATCH

CPU = torch.device("cpu")
ARTIFACTS = 2  # what calibration makes; 1: layers behind a cache had the grids of step 0 throughout


class Calibrated(Identified, Protocol):
    """What can be calibrated: an efficiency method, a denoising callback."""

    @property
    def needs_calibration(self) -> bool: ...

    def calibrate(self, bench: Bench) -> dict[str, Tensor]: ...


class ArtifactStore(Protocol):
    """Where artifacts are kept between runs."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The artifact under ``key``, or None if it is not there (or was damaged)."""

    def save(self, key: str, artifact: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
        """Keep an artifact, atomically."""

    def discard(self, key: str) -> None:
        """Remove an artifact, if it is there."""


@dataclass(frozen=True)
class Draft:
    """Unfinished work of one calibration: what it saves here survives an interruption."""

    store: ArtifactStore | None = None
    key: str = ""

    def load(self) -> dict[str, Tensor]:
        """What was saved last; nothing at the first attempt."""
        return (self.store.load(self.key) or {}) if self.store is not None else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved before."""
        if self.store is not None:
            self.store.save(self.key, tensors, {"part": "unfinished"})

    def discard(self) -> None:
        """Forget it: the work is finished."""
        if self.store is not None:
            self.store.discard(self.key)


@dataclass(frozen=True)
class Bench:
    """What a method may use to calibrate: the network as it is so far, and trajectories on it.

    Attributes:
        network: with the earlier parts applied, on ``device``.
        clock: the one that the network's parts read.
        model: to load the original network, say.
        sampler: the run's own.
        seed: of the calibration noise, and of every other random choice.
        images: number of calibration images.
        device: where the network is.
        progress: to be told about long work: ``start``, ``advance``.
        draft: keeps unfinished work.
        callbacks: those that take part in every trajectory, before the observers.
    """

    network: nn.Module
    clock: Clock
    model: DiffusionModel
    sampler: Sampler
    seed: int
    images: int
    device: torch.device = CPU
    batch_size: int = CALIBRATION_BATCH
    progress: Progress = field(default_factory=lambda: Progress("steps", visible=False))
    draft: Draft = Draft()
    callbacks: Sequence[DenoisingCallback] = ()

    def run(
        self,
        callbacks: Sequence[DenoisingCallback],
        *,
        batch_size: int | None = None,
        images: int | None = None,
    ) -> None:
        """Denoise the calibration images; ``callbacks`` observe every step of every batch.

        Args:
            callbacks: as in sampling; one that only observes returns the prediction unchanged.
            batch_size: images denoised together, if not as many as is usual.
            images: only the first so many.
        """
        count, size = min(self.images, images or self.images), batch_size or self.batch_size
        batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
        self.progress.start(len(batches) * len(self.sampler.timesteps))
        for indices in batches:
            condition = self.model.calibration_condition(indices).to(self.device)
            denoiser = Denoiser(self.network, condition, self.clock)
            noise = Noise(self.seed, indices, self.model.shape, self.device, calibration=True)
            with torch.inference_mode():
                denoise(
                    self.sampler,
                    denoiser,
                    noise,
                    [*self.callbacks, *callbacks],
                    between_steps=self._tell,
                )

    @contextmanager
    def every_step_full(self) -> Iterator[None]:
        """Within the block no step is cached: trajectories of the network without its cache."""
        kept, self.clock.full_steps = self.clock.full_steps, frozenset(range(self.clock.total))
        try:
            yield
        finally:
            self.clock.full_steps = kept

    def _tell(self, done: int) -> None:
        self.progress.advance(1)


def root_key(model: Mapping[str, Any], sampler: Identified, calibration: Mapping[str, Any]) -> str:
    """The key before any part: model with its hashes, sampler and calibration settings."""
    known = {"model": dict(model), "sampler": identity(sampler), "calibration": dict(calibration)}
    return digest({**known, "artifacts": ARTIFACTS})


def next_key(key: str, part: Calibrated) -> str:
    """The key of a part's artifact, from the key before it."""
    return digest([key, identity(part)])


def draft_key(key: str) -> str:
    """Where the unfinished work on the artifact ``key`` is kept."""
    return digest([key, "draft"])


def obtain(
    part: Calibrated, key: str, bench: Bench | None, store: ArtifactStore | None
) -> Artifact:
    """The part's artifact: from the store, or calibrated on ``bench`` now and stored.

    Raises MissingArtifact if it is not stored and there is no bench.
    """
    if not part.needs_calibration:
        return {}
    found = store.load(key) if store is not None else None
    if found is not None:
        return found
    if bench is None:
        raise MissingArtifact(
            f"{part.name} is not calibrated yet (artifact {key[:32]}); run iec-eval calibrate with "
            "the same study and run folder first, in one process"
        )
    made = part.calibrate(bench)
    if store is not None:
        store.save(key, made, {"part": part.name, "options": part.options.model_dump(mode="json")})
        bench.draft.discard()
    return made
