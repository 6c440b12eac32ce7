"""Shifted time steps (Li et al., ICLR 2024, "Alleviating exposure bias in diffusion models ...").

A sample that has drifted looks noisier, or less noisy, than its step says. The paper measures the
variance of its pixels and asks the network at the timestep whose noise has that variance.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.errors import Incompatible
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler
from iec_eval.schedule import NoiseSchedule


class TimeShiftOptions(BaseOptions):
    """Options of shifted time steps; the defaults are middling values, tuned for no model."""

    window: int = Field(
        40, ge=0, description="timesteps looked at, half of them on either side of the step's own"
    )
    cutoff: int = Field(
        200,
        ge=0,
        description="steps at this timestep and below are not shifted: there the image itself "
        "makes up much of the variance",
    )


class TimeShift(DenoisingCallback):
    """Evaluate each image at the timestep that its own variance speaks for (algorithm 2).

    ``argmin |var(x) - (1 - abar_tau)|`` over the timesteps tau in a window around the step's own.
    The sampler's coefficients stay those of the step, and the first step, pure noise, is not
    shifted. It costs no evaluation.
    """

    name = "time-shift"
    Options = TimeShiftOptions
    options: TimeShiftOptions

    def check(self, sampler: Sampler, clock: Clock) -> None:
        """Raise Incompatible where the sampler shows the network something else than its sample."""
        if type(sampler).network_input is not Sampler.network_input:
            raise Incompatible(
                f"time-shift: sampler {sampler.name} may rescale what the network sees, so that a "
                "sample's variance names no timestep; take ddim or plms"
            )

    def evaluate(self, step: Step) -> Tensor | None:
        if step.index == 0 or step.timestep <= self.options.cutoff:
            return None
        timesteps = shifted(step.sample, step.timestep, self.options.window, step.schedule)
        return step.predict(step.sample, timestep=timesteps)

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction


def shifted(sample: Tensor, timestep: float, window: int, schedule: NoiseSchedule) -> Tensor:
    """The timestep ``[B]`` within half a window of ``timestep`` that fits each image best."""
    own = int(timestep)
    first = max(own - window // 2, 0)
    noise = 1 - schedule.alphas_cumprod[first : own + window // 2 + 1].to(sample.device)
    variance = sample.double().flatten(1).var(dim=1)
    nearest: Tensor = torch.argmin((variance[:, None] - noise).abs(), dim=1)
    return first + nearest
