"""A and B of a sampler's step, ``x' = A x + B e``, found by trying the step itself.

x is the sample as the network is shown it. Most samplers show it their own; those that scale it
(Euler's method as diffusers writes it keeps x / sqrt(abar)) are so described in the coordinates of
the others, and Euler's A and B are DDIM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step, denoise
from iec_eval.errors import Incompatible
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.planning import Plan

TOLERANCE = 1e-4  # of what a step makes of a displacement; some samplers compute in float32


@dataclass(frozen=True)
class AffineStep:
    """``x' = a x + b e``, up to what does not depend on sample x and prediction e.

    ``evaluations`` is how many of them the sampler takes for its prediction, ``scale`` what it
    multiplies its sample by before the step to show it to the network.
    """

    a: float
    b: float
    evaluations: int
    scale: float = 1.0


def affine_steps(plan: Plan) -> list[AffineStep]:
    """A and B of every step of a row's sampler; no network is needed.

    A trajectory is run with a stand-in for the network. At each step sample and prediction are
    displaced, one by one and together, a little and far, with the solver's memory held.

    Raises Incompatible for a sampler that clips, whose step turns out not to be affine with the
    same A and B for every pixel, or that shows the network something else than its sample scaled.
    """
    name, sampler = plan.experiment.name, plan.sampler
    if sampler.clips:
        raise Incompatible(
            f"{name}: sampler {sampler.name!r} clips the predicted image, so its step is not "
            "affine and has no A and B; switch clipping off to analyze the row"
        )
    clock = Clock(len(sampler.timesteps), plan.planned_full_steps())
    probe = _Probe(name, clock)
    noise = Noise(0, [0, 1], plan.model.shape)
    with torch.no_grad():
        denoise(sampler, Denoiser(_StandIn(), Condition(), clock), noise, [probe])
    return probe.found


class _StandIn(nn.Module):
    """A prediction that looks like noise, in double precision."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(sample.double())


class _Probe(DenoisingCallback):
    """Displaces sample and prediction of every step, and notes what becomes of it."""

    name = "affine-probe"

    def __init__(self, row: str, clock: Clock) -> None:
        super().__init__(BaseOptions())
        self._row, self._clock, self._counted = row, clock, 0
        self.found: list[AffineStep] = []

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        count = self._clock.evaluations.full + self._clock.evaluations.cached
        a, b = self._coefficients(step, prediction.double())
        now, then = self._scale(step, "same"), self._scale(step, "next")
        evaluations = (count - self._counted) // len(prediction)
        self.found.append(AffineStep(a * then / now, b * then, evaluations, now))
        self._counted = count
        return prediction

    def _coefficients(self, step: Step, prediction: Tensor) -> tuple[float, float]:
        sample = step.sample.double()
        random = torch.Generator().manual_seed(step.index)
        u = torch.randn(sample.shape, generator=random, dtype=sample.dtype) * sample.std()
        v = torch.randn(sample.shape, generator=random, dtype=sample.dtype)
        start = step.move(sample, prediction)

        def shift(p: float, q: float) -> Tensor:
            return step.move(sample + p * u, prediction + q * v) - start

        a, b = _share(shift(1, 0), u), _share(shift(0, 1), v)
        for p, q in ((1, 0), (0, 1), (1, 1), (4, 0), (0, 4), (-4, 4)):
            error = shift(p, q) - (p * a * u + q * b * v)
            size = abs(p * a) * u.norm() + abs(q * b) * v.norm() + u.norm()
            if float(error.norm()) > TOLERANCE * float(size):
                raise self._refusal(step, float(error.norm() / size))
        return a, b

    def _scale(self, step: Step, level: Literal["same", "next"]) -> float:
        """What the network is shown of a sample, as a multiple of it."""
        sample = step.sample.double()
        shown = step.shown(sample, level=level)
        scale = _share(shown, sample)
        error = float((shown - scale * sample).norm() / sample.norm())
        if error > TOLERANCE or scale <= 0:
            raise Incompatible(
                f"{self._row}: at step {step.index} the sampler shows the network something else "
                "than a multiple of its sample, so A and B cannot be said in what the network "
                "sees; analyze rows of another sampler"
            )
        return scale

    def _refusal(self, step: Step, share: float) -> Incompatible:
        return Incompatible(
            f"{self._row}: step {step.index} of the sampler is not affine in sample and "
            f"prediction (a displacement comes out {share:.1e} of its size from A x + B e, wanted "
            f"{TOLERANCE:.0e}), so it has no A and B; analyze rows of another sampler"
        )


def _share(response: Tensor, direction: Tensor) -> float:
    """The c for which ``c direction`` is nearest to ``response``."""
    return float((response * direction).sum() / (direction * direction).sum())
