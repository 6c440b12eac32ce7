"""DDIM (Song et al. 2021, eq. 12) with the spacings of the papers' code."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from iec_eval.errors import ConfigError
from iec_eval.noise import Draw
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.schedule import NoiseSchedule


class DDIMOptions(BaseOptions):
    """Options of the DDIM sampler."""

    steps: int = Field(100, ge=1, description="number of sampler steps T")
    spacing: Literal["uniform", "quad"] = Field(
        "uniform", description="uniform: every N/T-th timestep; quad: dense near the image"
    )
    eta: float = Field(0.0, ge=0, description="0 is deterministic, 1 has the noise of DDPM")
    clip_sample: bool = Field(
        False, description="clip the predicted image to [-1, 1]; refused together with IEC"
    )


class DDIM(Sampler):
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with the final abar' = 1."""

    name = "ddim"
    Options = DDIMOptions

    def __init__(self, options: DDIMOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.timesteps = ddim_timesteps(options.steps, options.spacing, len(schedule))
        self.clips = options.clip_sample
        self._eta = options.eta
        self._abar = [schedule.abar(t) for t in (*self.timesteps, -1)]

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


def ddim_timesteps(steps: int, spacing: str, train_timesteps: int) -> tuple[int, ...]:
    """Timesteps, noisiest first, as the DDIM authors' code spaces them.

    ``uniform`` is i * (N // T); ``quad`` is floor(linspace(0, sqrt(0.8 N), T)^2), which repeats
    small timesteps when T is large (T = 100 has 96 distinct ones).

    Raises ConfigError for more steps than training timesteps.
    """
    if steps > train_timesteps:
        raise ConfigError(f"ddim: {steps} steps wanted, the model has {train_timesteps} timesteps")
    if spacing == "uniform":
        rising = np.arange(steps, dtype=np.float64) * (train_timesteps // steps)
    else:
        rising = np.linspace(0, np.sqrt(train_timesteps * 0.8), steps) ** 2
    return tuple(int(t) for t in reversed(rising))


def ddim_coefficients(abar: float, abar_next: float, sigma: float = 0.0) -> tuple[float, float]:
    """A and B of ``x' = A x + B eps`` (IEC paper, eq. 5, with cumulative products)."""
    a = math.sqrt(abar_next / abar)
    return a, math.sqrt(max(1 - abar_next - sigma**2, 0.0)) - a * math.sqrt(1 - abar)


def ddim_sigma(abar: float, abar_next: float, eta: float) -> float:
    """Standard deviation of the step's noise (Song et al. 2021, eq. 16)."""
    return eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
