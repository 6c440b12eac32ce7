"""Whole trajectories, and what must hold of those of every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, Step, denoise
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler
from iec_eval.testing.checks import IMAGES, SEED, difference, ensure, ensure_same

OTHERS = (7, 8)


@dataclass(frozen=True)
class Run:
    """Everything a trajectory needs but its callbacks and images."""

    sampler: Sampler
    network: nn.Module
    clock: Clock
    model: DiffusionModel

    def latents(
        self, callbacks: Sequence[DenoisingCallback] = (), images: Sequence[int] = IMAGES
    ) -> Tensor:
        """Final latents ``[B, C, H, W]`` of ``images``."""
        denoiser = Denoiser(self.network, self.model.condition(images), self.clock)
        with torch.inference_mode():
            return denoise(self.sampler, denoiser, Noise(SEED, images, self.model.shape), callbacks)


def ensure_latents(latents: Tensor, model: DiffusionModel) -> None:
    """Final latents have the model's shape and are finite."""
    wanted = (len(IMAGES), *model.shape)
    ensure(latents.shape == wanted, f"the result has shape {tuple(latents.shape)}, not {wanted}")
    ensure(bool(latents.isfinite().all()), "the result is not finite")


def ensure_repeats(run: Run, callbacks: Sequence[DenoisingCallback] = ()) -> None:
    """A second trajectory, after one of other images, equals the first bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = run.latents(callbacks)
        run.latents(callbacks, OTHERS)
        again = run.latents(callbacks)
    ensure_same(
        again,
        first,
        "the same images again, after others, came out different: something is remembered, "
        "or random beside Noise",
    )


def ensure_untouched_by_evaluations(run: Run) -> None:
    """Evaluations that store nothing and are not used leave no trace."""
    ensure_same(
        run.latents([_NeedlessEvaluations(BaseOptions())]),
        run.latents(),
        "evaluations with store=False changed later steps: mind Clock.store and Clock.evaluation, "
        "and count no calls",
    )


def ensure_batch_free(
    run: Run,
    callbacks: Sequence[DenoisingCallback],
    tolerance: float,
    positions: Sequence[int] = range(len(IMAGES)),
) -> None:
    """The images at these positions come out alone as they do in their batch."""
    together = run.latents(callbacks)
    alone = torch.cat([run.latents(callbacks, [IMAGES[position]]) for position in positions])
    off = difference(alone, together[list(positions)])
    ensure(
        off <= tolerance,
        f"five images together differ from each alone by {off:.2g} of the largest value, wanted "
        f"at most {tolerance:.2g}: nothing may be reduced over the batch",
    )


class _NeedlessEvaluations(DenoisingCallback):
    """Evaluates the network in every way it may, stores nothing and uses nothing."""

    name = "needless-evaluations"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        rows = torch.tensor([0, 2])
        step.predict(-step.sample, store=False)
        step.predict(2 * step.sample[rows], rows=rows, store=False)
        step.predict(0.5 * step.sample, full=True, store=False)
        step.predict(0.5 * step.sample, full=False, store=False)
        step.predict(step.preview(step.sample), level="next", store=False)
        if not step.last:
            step.predict(step.sample, timestep="next", store=False)
        return prediction
