"""Epsilon scaling (Ning et al., ICLR 2024, "Elucidating the exposure bias in diffusion models")."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler


class EpsilonScalingOptions(BaseOptions):
    """Options of epsilon scaling: ``lambda_t = slope t + factor``."""

    factor: float = Field(
        1.005,
        description="the paper's b; the default is of the size published for unconditional "
        "CIFAR-10, it is not tuned for any model here",
    )
    slope: float = Field(
        0.0,
        description="the paper's k, for each step that is left: t is T at the first step, 1 at "
        "the last; 0 is its uniform schedule",
    )


class EpsilonScaling(DenoisingCallback):
    """Divide the predicted noise by ``lambda_t``: what is too long in it, at no evaluation."""

    name = "epsilon-scaling"
    Options = EpsilonScalingOptions
    options: EpsilonScalingOptions

    def check(self, sampler: Sampler, clock: Clock) -> None:
        """Raise Incompatible where no noise is predicted, ConfigError unless lambda_t > 0."""
        if sampler.predictions != {"epsilon"}:
            raise Incompatible(
                "epsilon-scaling: scales the predicted noise; this run predicts "
                f"{', '.join(sorted(sampler.predictions))}"
            )
        least = min(self.divisor(1), self.divisor(clock.total))
        if least <= 0:
            raise ConfigError(
                f"epsilon-scaling: slope * t + factor falls to {least:.4g} in {clock.total} steps; "
                "wanted more than 0 at every step"
            )

    def divisor(self, left: int) -> float:
        """lambda_t where ``left`` steps are left, this one included."""
        return self.options.slope * left + self.options.factor

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction / self.divisor(step.total - step.index)
