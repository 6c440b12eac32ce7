"""The scalar in IEC: what is left of it when the second evaluation is not paid.

IEC replaces a prediction e by an average ebar. Its projection on e is ``s e`` with
``s = <ebar, e> / <e, e>``: the part of the correction that only makes e longer or shorter. This
callback measures s for each step once and from then on scales, at no evaluation. Where it scores
like IEC itself, IEC's second evaluation has bought a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import IEC, IECOptions
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler

if TYPE_CHECKING:
    from iec_eval.calibration import Bench


class ScaleMatchedOptions(BaseOptions):
    """Options of the matched scalar."""

    of: IECOptions | list[IECOptions] = Field(
        IECOptions(),
        description="the IEC whose scalar is matched, with its options as in a study, or several",
    )

    @field_validator("of", mode="before")
    @classmethod
    def _without_name(cls, given: Any) -> Any:
        """A whole part of a study, ``{name: iec, ...}``, is as good as its options."""
        if isinstance(given, list):
            return [cls._without_name(one) for one in given]
        if isinstance(given, dict) and given.get("name") == IEC.name:
            return {key: value for key, value in given.items() if key != "name"}
        return given


class ScaleMatched(DenoisingCallback):
    """Scale each step's prediction by the mean of ``<ebar, e> / <e, e>`` that IEC has there.

    The mean is over the calibration images, each with the same weight, on trajectories of the
    deployed network that take IEC's prediction at every step (and its cache refreshes). 1 at
    steps that this IEC does not correct.
    """

    name = "scale-matched"
    Options = ScaleMatchedOptions
    options: ScaleMatchedOptions

    def __init__(self, options: ScaleMatchedOptions) -> None:
        super().__init__(options)
        several = options.of if isinstance(options.of, list) else [options.of]
        self._iec = [IEC(one) for one in several]
        self._scales: list[float] | None = None

    def check(self, sampler: Sampler, clock: Clock) -> None:
        for iec in self._iec:
            iec.check(sampler, clock)

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """``scales [T]``, float64."""
        observer = _Projections(self._iec, bench.clock.total)
        bench.run([observer])
        return {"scales": observer.sums / bench.images}

    def use(self, artifact: Mapping[str, Tensor]) -> None:
        self._scales = artifact["scales"].tolist()

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if self._scales is None or self._scales[step.index] == 1:
            return prediction
        return self._scales[step.index] * prediction


class _Projections(DenoisingCallback):
    """Takes IEC's prediction and sums its projection on the plain one over the images."""

    name = "projections"

    def __init__(self, iec: Sequence[IEC], total: int) -> None:
        super().__init__(BaseOptions())
        self._iec, self.sums = iec, torch.zeros(total, dtype=torch.float64)

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        refined = prediction
        for iec in self._iec:
            refined = iec.refine(step, refined)
        self.sums[step.index] += projection(refined, prediction).sum().cpu()
        return refined


def projection(refined: Tensor, plain: Tensor) -> Tensor:
    """``<refined, plain> / <plain, plain>`` of each image, ``[B]``, float64."""
    along, onto = refined.double().flatten(1), plain.double().flatten(1)
    return (along * onto).sum(dim=1) / (onto * onto).sum(dim=1)
