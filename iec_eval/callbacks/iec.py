"""Iterative Error Correction (Zhong et al., ICLR 2026, eq. 10).

The paper corrects the sample, ``x^(k+1) = x^(k) + lambda (A x_t + B eps(x^(k), t) - x^(k))``.
Since every x^(k) is ``A x_t + B ebar^(k)`` for some prediction ebar^(k), the same iteration is

    ebar^(k+1) = (1 - lambda_k) ebar^(k) + lambda_k eps(x^(k), t),     ebar^(0) = eps(x_t, t),

which needs nothing of the sampler but its own step, and is what this file does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import MixedDraw
from iec_eval.options import NOT_DECISIVE, BaseOptions
from iec_eval.samplers.base import Sampler

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # the text of the paper, section 3.2: K = 1, lambda = 0.5, threshold 1e-5 on the applied change
    "paper": {"weights": [0.5], "tolerance": 1e-5, "tolerance_mode": "absolute"},
    # the CIFAR-10 sampler as released
    "official_ddim": {
        "weights": [0.5],
        "tolerance": 1e-3,
        "tolerance_mode": "relative",
        "tolerance_scope": "batch",
        "apply_on_converge": False,
        "noise": "fresh",
    },
    # the latent-diffusion sampler as released: the original prediction drops out
    "official_ldm": {
        "weights": [1.0, 0.5],
        "tolerance": 1e-6,
        "tolerance_mode": "relative",
        "tolerance_scope": "batch",
        "apply_on_converge": False,
        "noise": "fresh",
    },
    # not IEC: Heun's method, the same cost with the second evaluation at the next timestep
    "heun": {"weights": [0.5], "tolerance": None, "timestep": "next"},
}


class Ends(BaseOptions):
    """The first and the last steps: the paper's "+-A" (figure 3, table 5)."""

    ends: str | float = Field(description="share of the steps at each end, such as 1/10")

    @field_validator("ends")
    @classmethod
    def _is_share(cls, value: str | float) -> str | float:
        try:
            share = Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            raise ValueError("wanted a fraction such as 1/10") from None
        if not 0 <= share <= 1:
            raise ValueError("wanted a share between 0 and 1")
        return str(share)

    @property
    def share(self) -> Fraction:
        """Exactly as written: 0.1 is one tenth, not the float nearest to it."""
        return Fraction(str(self.ends))


class IECOptions(BaseOptions):
    """Options of IEC; ``preset`` fills in what is not given."""

    preset: Annotated[Literal["paper", "official_ddim", "official_ldm", "heun"], NOT_DECISIVE] = (
        Field("paper", description="the settings to start from")
    )
    weights: list[float] = Field(
        [0.5],
        description="lambda of each correction; the length is K, [] corrects nothing. In short: "
        "corrections: K, relaxation: lambda, relaxation_schedule: constant, geometric_from_half or "
        "geometric_from_one",
    )
    tolerance: float | None = Field(
        1e-5, ge=0, description="stop correcting an image whose change is below this; null: never"
    )
    tolerance_mode: Literal["absolute", "relative"] = Field(
        "absolute",
        description="absolute: norm of the applied change; relative: norm of the change at "
        "lambda = 1 over the norm of the sample",
    )
    tolerance_scope: Literal["sample", "batch"] = Field(
        "sample",
        description="judge each image, or the batch as one (makes images depend on the batch)",
    )
    apply_on_converge: bool = Field(
        True, description="keep the correction that showed convergence, or throw it away"
    )
    where: Literal["full", "all", "first"] | Ends | list[int] = Field(
        "full", description="steps to correct: full ones, all, the first, {ends: 1/10}, or a list"
    )
    timestep: Literal["same", "next"] = Field(
        "same", description="timestep of the extra evaluations; next makes it Heun's method"
    )
    noise: Literal["shared", "fresh"] = Field(
        "shared", description="with eta > 0: one draw for all evaluations, or a new one for each"
    )
    refresh_cache: bool = Field(
        True, description="whether a full correction evaluation refreshes what a cache holds"
    )
    correct: bool = Field(
        True,
        description="false: the corrections are made and refresh the cache, but the step is taken "
        "with the plain prediction",
    )
    allow_clipping: bool = Field(
        False, description="run on a sampler that clips, where the two forms of IEC differ"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """Presets, then K and lambda in the short form, then what is spelled out."""
        if not isinstance(given, dict):
            return given
        rest = {key: value for key, value in given.items() if key not in _SHORT_FORM}
        weights = _weights_from_short_form(given)
        return {**PRESETS.get(given.get("preset", "paper"), {}), **weights, **rest}

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> Self:
        if not self.correct and not self.refresh_cache:
            raise ValueError(
                "correct: false and refresh_cache: false leave nothing that the evaluations are "
                "for; switch one of them on"
            )
        return self


class IEC(DenoisingCallback):
    """Refine the prediction with K extra evaluations at the sample it leads to."""

    name = "iec"
    Options = IECOptions
    options: IECOptions

    @property
    def depends_on_batch(self) -> bool:
        return self.options.tolerance is not None and self.options.tolerance_scope == "batch"

    def check(self, sampler: Sampler, clock: Clock) -> None:
        if sampler.clips and not self.options.allow_clipping:
            raise Incompatible(
                "iec: the sampler clips the predicted image, which breaks the correction's "
                "mathematics; switch clipping off or set allow_clipping: true"
            )
        other = sampler.predictions - PREDICTIONS
        if other and self.options.weights:
            raise Incompatible(
                f"iec: averages the predicted noise (paper, eq. 10); this run predicts "
                f"{', '.join(sorted(other))}, whose average is not that of the noise it stands for"
            )
        if sampler.uncorrectable and self.options.weights:
            raise Incompatible(f"iec: sampler {sampler.name}: {sampler.uncorrectable}")
        corrected_steps(self.options.where, clock.total, clock.full_steps)

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if not self._corrects(step):
            return prediction
        plain, draw = prediction, step.draw
        active = torch.ones(len(prediction), dtype=torch.bool, device=prediction.device)
        for weight in self.options.weights:
            prediction, active = self._correct(step, prediction, weight, active)
            if not active.any():
                break
        if self.options.correct:
            return prediction
        step.draw = draw
        return plain

    def on_correction(self, step: Step, correction: Correction) -> None:
        """Called after each correction; for analysis, does nothing here."""

    def _corrects(self, step: Step) -> bool:
        if self.options.timestep == "next" and step.last:
            return False
        where = self.options.where
        if where == "full":
            return step.full
        full = {step.index} if step.full else set()
        return step.index in corrected_steps(where, step.total, full, check=False)

    def _correct(
        self, step: Step, prediction: Tensor, weight: float, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One iteration; returns the new prediction and which images go on."""
        estimate = step.preview(prediction)
        fresh = self._evaluate(step, prediction, estimate, active)
        old_draw = step.draw
        new_draw = step.fresh_draw() if self.options.noise == "fresh" else old_draw
        step.draw = new_draw
        residual = self._residual(step.preview(fresh), estimate, weight)
        converged = residual < (self.options.tolerance or 0.0)
        applied = active if self.options.apply_on_converge else active & ~converged
        share = (weight * applied.to(prediction.dtype)).view(-1, 1, 1, 1)
        step.draw = old_draw if new_draw is old_draw else MixedDraw(old_draw, new_draw, share)
        self.on_correction(step, Correction(residual, converged, applied))
        return torch.lerp(prediction, fresh, share), active & ~converged

    def _evaluate(self, step: Step, prediction: Tensor, estimate: Tensor, active: Tensor) -> Tensor:
        """eps(x^(k), t) for the images still active; the others keep their prediction."""
        rows = None if active.all() else active.nonzero().flatten()
        fresh = step.predict(
            estimate if rows is None else estimate[rows],
            rows=rows,
            timestep=self.options.timestep,
            level="next",
            store=self.options.refresh_cache,
        )
        if rows is None:
            return fresh
        merged: Tensor = prediction.index_copy(0, rows, fresh)
        return merged

    def _residual(self, target: Tensor, estimate: Tensor, weight: float) -> Tensor:
        """The quantity the tolerance is compared with, one number per image."""
        change, size = (target - estimate).flatten(1), estimate.flatten(1)
        if self.options.tolerance_scope == "batch":
            change, size = change.reshape(1, -1), size.reshape(1, -1)
        residual: Tensor = torch.linalg.vector_norm(change, dim=1)
        if self.options.tolerance_mode == "absolute":
            residual = abs(weight) * residual
        else:
            residual = residual / (torch.linalg.vector_norm(size, dim=1) + 1e-6)
        return residual.expand(len(estimate))


@dataclass(frozen=True)
class Correction:
    """What one correction did: per image the residual, whether below tolerance, whether kept."""

    residual: Tensor
    converged: Tensor
    applied: Tensor


def corrected_steps(
    where: str | Ends | list[int], total: int, full_steps: Collection[int], *, check: bool = True
) -> frozenset[int]:
    """The steps that ``where`` selects; "ends" are those full steps within A T of either end.

    Raises ConfigError for a listed step outside the run.
    """
    if isinstance(where, list):
        outside = [step for step in where if not 0 <= step < total]
        if check and outside:
            raise ConfigError(f"iec: where lists steps {outside}, the run has 0..{total - 1}")
        return frozenset(where)
    if isinstance(where, Ends):
        reach = where.share * total
        return frozenset(i for i in full_steps if i < reach or i >= total - reach)
    chosen = {"full": full_steps, "all": range(total), "first": [0]}
    return frozenset(chosen[where])


# of flow matching the prediction is the velocity itself, which the solver integrates
PREDICTIONS = frozenset({"epsilon", "flow"})
_SHORT_FORM = ("corrections", "relaxation", "relaxation_schedule")


def _weights_from_short_form(given: Mapping[str, Any]) -> dict[str, list[float]]:
    """``corrections`` K, ``relaxation`` lambda and its schedule as a list of weights."""
    short = {key: given[key] for key in _SHORT_FORM if key in given}
    if not short:
        return {}
    if "weights" in given:
        raise ValueError(f"weights and {', '.join(short)} say the same thing; give one of them")
    count, start = short.get("corrections", 1), short.get("relaxation", 0.5)
    kind = short.get("relaxation_schedule", "constant")
    if type(count) is not int or count < 0:
        raise ValueError(f"corrections: wanted a whole number from 0, got {count!r}")
    if type(start) not in (int, float):
        raise ValueError(f"relaxation: wanted a number, got {start!r}")
    powers = {
        "constant": [float(start)] * count,
        "geometric_from_half": [0.5 ** (k + 1) for k in range(count)],
        "geometric_from_one": [0.5**k for k in range(count)],
    }
    if kind not in powers:
        raise ValueError(f"relaxation_schedule: wanted one of {', '.join(powers)}, got {kind!r}")
    return {"weights": powers[kind]}
