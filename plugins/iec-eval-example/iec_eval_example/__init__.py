"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) as a sampler for iec-eval."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from iec_eval.api import BaseOptions, ConfigError, Draw, NoiseSchedule, Sampler, State, hookimpl


class DPMSolverOptions(BaseOptions):
    """Options of DPM-Solver++(2M)."""

    steps: int = Field(20, ge=1, description="number of sampler steps")


class DPMSolver(Sampler):
    """Second-order multistep solver on the predicted image; the last step is first order."""

    name = "dpm-solver++"
    Options = DPMSolverOptions

    def __init__(self, options: DPMSolverOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        n, last = options.steps, len(schedule) - 1
        if n > last:
            raise ConfigError(f"{self.name}: {n} steps wanted, this model allows {last} at most")
        timesteps = tuple(round(last * (n - i) / n) for i in range(n))
        self.timesteps = timesteps
        self._abar = [schedule.abar(t) for t in (*timesteps, -1)]

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        now, then = self._abar[index], self._abar[index + 1]
        image = (state.sample - math.sqrt(1 - now) * prediction) / math.sqrt(now)
        if then == 1:
            return State(image, image)
        h = half_log_snr(then) - half_log_snr(now)
        target = image
        if index > 0:
            r = (half_log_snr(now) - half_log_snr(self._abar[index - 1])) / h
            target = image + (image - state.memory) / (2 * r)
        ratio = math.sqrt((1 - then) / (1 - now))
        sample = ratio * state.sample - math.sqrt(then) * math.expm1(-h) * target
        return State(sample, image)


def half_log_snr(abar: float) -> float:
    """lambda = log(alpha / sigma)."""
    return 0.5 * math.log(abar / (1 - abar))


@hookimpl
def iec_eval_samplers() -> list[type[Sampler]]:
    return [DPMSolver]
