"""DDIM (Song et al. 2021, eq. 12) with the spacings of the papers' code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Draw
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.schedule import NoiseSchedule

Spacing = Literal["uniform", "even", "quad", "ldm"]
LEFT_OUT = 0.25  # share of the timesteps, the noisiest, that uniform steps may leave out at most


class DDIMOptions(BaseOptions):
    """Options of the DDIM sampler."""

    steps: int = Field(100, ge=1, description="number of sampler steps T")
    spacing: Spacing = Field(
        "uniform",
        description="uniform: every (N // T)-th of N timesteps; even: the same where T divides N, "
        "and over all of them where it does not; quad: dense near the image; ldm: uniform, one "
        "later, ending at the noise of timestep 0, as latent diffusion's code does",
    )
    eta: float = Field(0.0, ge=0, description="0 is deterministic, 1 has the noise of DDPM")
    clip_sample: bool = Field(
        False, description="clip the predicted image to [-1, 1]; refused together with IEC"
    )


class DDIM(Sampler):
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with the final abar' = 1.

    With spacing ``ldm`` the final abar' is that of timestep 0, so the last step leaves some noise.
    """

    name = "ddim"
    Options = DDIMOptions
    options: DDIMOptions

    def __init__(self, options: DDIMOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.timesteps = ddim_timesteps(options.steps, options.spacing, len(schedule))
        self.clips = options.clip_sample
        self._eta = options.eta
        last = 0 if options.spacing == "ldm" else -1
        self._abar = [schedule.abar(t) for t in (*self.timesteps, last)]
        self.levels = () if options.eta else tuple(self._abar)

    def other_steps(self, number: int) -> Mapping[str, Any]:
        """Evenly spaced ones in place of uniform ones that would leave the noisiest out.

        Raises Incompatible if its own steps leave them out.
        """
        changed = super().other_steps(number)
        own, length = self.options.steps, len(self.schedule)
        if self.options.spacing != "uniform":
            return changed
        if length % own >= length // own:
            raise Incompatible(
                f"{own} uniform steps leave out the noisiest {length % own} of {length} timesteps, "
                f"and other numbers would not; take one that divides {length}, or spacing: even"
            )
        return {**changed, "spacing": "even"} if length % number else changed

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        now, then = self._abar[index], self._abar[index + 1]
        sigma = ddim_sigma(now, then, self._eta)
        if self.clips:
            x0 = (state.sample - math.sqrt(1 - now) * prediction) / math.sqrt(now)
            direction = math.sqrt(max(1 - then - sigma**2, 0.0))
            sample = math.sqrt(then) * x0.clamp(-1, 1) + direction * prediction
        else:
            a, b = ddim_coefficients(now, then, sigma)
            sample = a * state.sample + b * prediction
        return State(sample + sigma * draw.value if sigma else sample)


def ddim_timesteps(steps: int, spacing: Spacing, train_timesteps: int) -> tuple[int, ...]:
    """Timesteps, noisiest first, as the DDIM and latent-diffusion authors' codes space them.

    ``uniform`` is i * (N // T), i < T. Where T does not divide N the authors' code goes on to N and
    takes more steps than it was asked for (167 for T = 150); here T are taken, and the noisiest
    N mod T timesteps left out. ``even``, floor(i * N / T), leaves none out; the authors have none.
    ``quad`` is floor(linspace(0, sqrt(0.8 N), T)^2), which repeats small timesteps when T is large
    (T = 100 has 96 distinct ones); ``ldm`` is uniform plus one.

    Raises ConfigError for more steps than training timesteps; with ``uniform`` for a number that
    would leave out more than a quarter of them; with ``ldm`` for one that does not divide them.
    """
    if steps > train_timesteps:
        raise ConfigError(f"ddim: {steps} steps wanted, the model has {train_timesteps} timesteps")
    if spacing == "ldm":
        return ldm_timesteps(steps, train_timesteps)
    if spacing == "uniform":
        every = train_timesteps // steps
        if steps * every < (1 - LEFT_OUT) * train_timesteps:
            raise ConfigError(
                f"ddim: {steps} uniformly spaced steps, every {every} of the model's "
                f"{train_timesteps} timesteps, would begin with pure noise at timestep "
                f"{(steps - 1) * every}, where the model expects an image in it; take "
                f"{train_timesteps // (every + 1)} or spacing: even"
            )
        rising = np.arange(steps, dtype=np.float64) * every
    elif spacing == "even":
        rising = np.arange(steps, dtype=np.float64) * train_timesteps // steps
    else:
        rising = np.linspace(0, np.sqrt(train_timesteps * 0.8), steps) ** 2
    return tuple(int(t) for t in reversed(rising))


def ldm_timesteps(steps: int, train_timesteps: int) -> tuple[int, ...]:
    """Timesteps 1 + i N / T, noisiest first.

    Raises ConfigError unless T divides N: the original code then silently takes more steps than
    it was asked for (31 for T = 30). T = N would begin after the last timestep, N - 1.
    """
    if steps >= train_timesteps:
        raise ConfigError(
            f"{steps} steps wanted; starting one timestep later than uniform, as latent "
            f"diffusion's code does, the model's {train_timesteps} timesteps allow "
            f"{train_timesteps // 2} at most"
        )
    if train_timesteps % steps:
        raise ConfigError(
            f"{steps} steps do not divide the model's {train_timesteps} timesteps, where latent "
            "diffusion's code takes more steps than asked for; take a divisor, or another spacing "
            "or sampler"
        )
    spacing = train_timesteps // steps
    return tuple(1 + i * spacing for i in reversed(range(steps)))


def ddim_coefficients(abar: float, abar_next: float, sigma: float = 0.0) -> tuple[float, float]:
    """A and B of ``x' = A x + B eps`` (IEC paper, eq. 5, with cumulative products)."""
    a = math.sqrt(abar_next / abar)
    return a, math.sqrt(max(1 - abar_next - sigma**2, 0.0)) - a * math.sqrt(1 - abar)


def ddim_sigma(abar: float, abar_next: float, eta: float) -> float:
    """Standard deviation of the step's noise (Song et al. 2021, eq. 16)."""
    return eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
