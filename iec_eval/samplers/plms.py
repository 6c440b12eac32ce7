"""PLMS (Liu et al., ICLR 2022): the multistep sampler that Stable Diffusion was released with."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from iec_eval.denoising import Step
from iec_eval.noise import Draw
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.samplers.ddim import ddim_coefficients, ldm_timesteps
from iec_eval.schedule import NoiseSchedule

# Adams-Bashforth: weights of the newest prediction and of those before it (eq. 12)
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class PLMSOptions(BaseOptions):
    """Options of PLMS."""

    steps: int = Field(
        50, ge=1, description="number of sampler steps T; it takes T + 1 evaluations"
    )


class PLMS(Sampler):
    """DDIM steps with the predictions of up to four steps combined (Adams-Bashforth).

    Timesteps and final abar' are those of DDIM's spacing ``ldm``. The first step has no history:
    its prediction is e' = (e_0 + e_1) / 2 with e_1 at the next timestep, at the sample that e_0
    leads to; T steps take T + 1 evaluations. Where the run caches, the one for e_1 is a cached one,
    and it never replaces what the cache holds.

    IEC at the first step refines e', ebar = (1 - lambda) e' + lambda eps(x^(0), tau_0) with
    x^(0) the sample that e' leads to, and e_0 itself enters the history (no release combines IEC
    with PLMS; this definition is ours). At later steps it refines the newest prediction, which
    enters the history refined.
    """

    name = "plms"
    Options = PLMSOptions

    def __init__(self, options: PLMSOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.timesteps = ldm_timesteps(options.steps, len(schedule))
        self._abar = [schedule.abar(t) for t in (*self.timesteps, 0)]
        self.levels = tuple(self._abar)

    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        first = step.evaluate()
        if step.index > 0:
            return state, first
        second = step.predict(
            self._move(state.sample, 0, first),
            timestep="same" if step.last else "next",
            level="next",
            full=False if step.caches else None,
            store=False,
        )
        return State(state.sample, (first,)), (first + second) / 2

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        history: tuple[Tensor, ...] = state.memory
        if index == 0:
            return State(self._move(state.sample, 0, prediction), history)
        latest = (prediction, *history)
        weights = WEIGHTS[len(latest) - 1]
        combined = sum(w * e for w, e in zip(weights[1:], history, strict=True))
        sample = self._move(state.sample, index, weights[0] * prediction + combined)
        return State(sample, latest[: len(WEIGHTS) - 1])

    def _move(self, sample: Tensor, index: int, prediction: Tensor) -> Tensor:
        """A deterministic DDIM step."""
        a, b = ddim_coefficients(self._abar[index], self._abar[index + 1])
        return a * sample + b * prediction
