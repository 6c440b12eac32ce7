"""A corrector that costs no evaluation: the deployed network, taught by its own finer steps.

The teacher is the deployed network itself, each step cut into M, with no step cached. The student
is the run as it is, but each step takes a combination of the newest predictions,

    e'_i = c_i0 e_i + c_i1 e_(i-1) + ... + c_ih e_(i-h),

whose few numbers are fitted once: one after the other, each c_i brings the student's sample after
step i as near as it can, in least squares over the calibration images, to the teacher's. So they
undo at once what a cache leaves behind and what the solver loses by its long steps (there they
come out near Adams and Bashforth's 3/2, -1/2). No other network and no image of a data set takes
part: the teacher of a quantized network is quantized, that of a cached one is what it caches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler

if TYPE_CHECKING:
    from iec_eval.calibration import Bench

LEAST = 4  # calibration images: three to fit, one to judge
GAIN = 0.01  # share of the squared distance that a fit must take away on images it has not seen
NEAR = 0.02  # of the finished samples' size: a run so near to its teacher is left alone
ROUNDING = 1e-5  # of a sample's size: smaller distances to the teacher are none
RIDGE = 1e-8  # of the mean squared size of the predictions' effects, towards no correction


class SelfConsistentOptions(BaseOptions):
    """Options of the self-consistent corrector."""

    substeps: int = Field(4, ge=1, description="the teacher's steps for each step of the run")
    history: int = Field(
        1, ge=0, description="earlier predictions that are combined with the newest one"
    )
    images: int = Field(
        64,
        ge=LEAST,
        description="calibration images, at most; they are denoised as one batch, and a quarter "
        "of them judges",
    )


class SelfConsistent(DenoisingCallback):
    """Combine the newest predictions so that a step goes where finer, uncached steps would.

    A step's combination is kept only if it takes 1 % or more off the squared distance to the
    teacher on calibration images that did not fit it, and all of them only if on those images the
    finished samples end nearer to the teacher's than without, and without are 2 % of their size or
    more away from it; else the prediction stays as it is, to the bit. What finer steps change less
    than that is no reason to follow the network's own errors. Works with samplers that follow the
    deterministic path of the forward process and say so (``Sampler.levels``: ddim with eta 0,
    plms).
    """

    name = "self-consistent"
    # 1: knew no distance that is too small; 2: behind a cache, layers that the teacher runs at a
    # cached step were quantized for step 0
    version = 3
    Options = SelfConsistentOptions
    options: SelfConsistentOptions

    def __init__(self, options: SelfConsistentOptions) -> None:
        super().__init__(options)
        self._table: list[list[float]] | None = None
        self._recent = _Recent(options.history)

    def check(self, sampler: Sampler, clock: Clock) -> None:
        """Raise Incompatible for a sampler whose steps cannot be cut finer."""
        as_it_is = type(sampler).network_input is Sampler.network_input
        noise = sampler.predictions == {"epsilon"}
        if not (sampler.levels and as_it_is and noise) or sampler.clips:
            raise Incompatible(
                f"self-consistent: sampler {sampler.name} with these options does not follow the "
                "deterministic path that finer steps approach, with predicted noise; take plms, or "
                "ddim with eta 0 and no clipping"
            )

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """``coefficients [T, 1 + history]``, float64, newest prediction first.

        Takes M T full evaluations of each image for the teacher and two trajectories of the run.

        Raises ConfigError for fewer than four calibration images.
        """
        images = min(self.options.images, bench.images)
        if images < LEAST:
            raise ConfigError(
                f"self-consistent: {images} calibration images, wanted {LEAST} or more"
            )
        grid = finer_grid(bench.sampler, self.options.substeps)
        judges = images // 4
        fit, plain = _Fit(grid, self.options.history, judges), _Final()
        for observer in (fit, plain):
            bench.run([observer], batch_size=images, images=images)
        if not _worthwhile(fit, plain.final):
            fit.table = [_nothing(self.options.history) for _ in fit.table]
        return {"coefficients": torch.tensor(fit.table, dtype=torch.float64)}

    def use(self, artifact: Mapping[str, Tensor]) -> None:
        self._table = artifact["coefficients"].tolist()

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if self._table is None:
            return prediction
        return combined(self._recent.add(step, prediction), self._table[step.index])


def _worthwhile(fit: _Fit, plain: Tensor) -> bool:
    """Whether there is a distance to the teacher to speak of, and the student has less of it."""
    without = fit.distance(plain)
    return fit.distance(fit.final) < without and without >= NEAR**2 * fit.size()


class _Recent:
    """The newest predictions of the current trajectory, newest first, one more than ``history``."""

    def __init__(self, history: int) -> None:
        self._history = history
        self._kept: list[Tensor] = []

    def add(self, step: Step, prediction: Tensor) -> list[Tensor]:
        earlier = [] if step.index == 0 else self._kept[: self._history]
        self._kept = [prediction, *earlier]
        return self._kept


def _nothing(history: int) -> list[float]:
    """The coefficients that leave the prediction alone."""
    return [1.0] + [0.0] * history


def combined(predictions: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The sum of ``coefficients`` times predictions, newest first; of those that there are."""
    newest = predictions[0]
    if list(coefficients) == _nothing(len(coefficients) - 1):
        return newest
    terms = zip(coefficients[1:], predictions[1:], strict=False)
    return sum((c * e for c, e in terms), start=coefficients[0] * newest)


# --- the teacher ------------------------------------------------------------------------------

Substep = tuple[int, float, float]  # timestep, abar before, abar after


def finer_grid(sampler: Sampler, substeps: int) -> list[list[Substep]]:
    """For each step the substeps that the teacher takes.

    Their timesteps are evenly spaced between the step's own and the next one's, whole, and each
    once: a step shorter than M timesteps has fewer than M.
    """
    ends = [*(int(t) for t in sampler.timesteps), -1]
    grid = []
    for index, (own, following) in enumerate(itertools.pairwise(ends)):
        share = (own - following) / substeps
        inner = {round(own - k * share) for k in range(1, substeps)} - {own, following}
        inner = {t for t in inner if following < t < own}
        timesteps = [own, *sorted(inner, reverse=True)]
        between = [sampler.schedule.abar(t) for t in timesteps[1:]]
        levels = [sampler.levels[index], *between, sampler.levels[index + 1]]
        grid.append(list(zip(timesteps, levels[:-1], levels[1:], strict=True)))
    return grid


def advanced(step: Step, sample: Tensor, substeps: Sequence[Substep]) -> Tensor:
    """``sample`` after DDIM substeps (Song et al. 2021, eq. 12) with full evaluations.

    They leave the cache alone; quantizers use what they have for ``step``.
    """
    for timestep, now, then in substeps:
        when = torch.full((len(sample),), timestep, device=sample.device)
        noise = step.predict(sample, timestep=when, full=True, store=False)
        image = (sample - math.sqrt(1 - now) * noise) / math.sqrt(now)
        sample = math.sqrt(then) * image + math.sqrt(1 - then) * noise
    return sample


# --- the fit ----------------------------------------------------------------------------------


class _Final(DenoisingCallback):
    """Keeps the finished samples."""

    name = "final"
    final: Tensor

    def __init__(self) -> None:
        super().__init__(BaseOptions())

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        self.final = step.preview(prediction)
        return prediction


class _Fit(DenoisingCallback):
    """Fits step after step, on the trajectory that takes what it has fitted so far.

    Attributes:
        table: the coefficients of the steps so far, newest prediction first.
        final: the student's samples after the step.
    """

    name = "fit"
    final: Tensor

    def __init__(self, grid: list[list[Substep]], history: int, judges: int) -> None:
        super().__init__(BaseOptions())
        self._grid, self._history, self._judges = grid, history, judges
        self._recent = _Recent(history)
        self.table: list[list[float]] = []
        self._teacher: Tensor

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        before = step.sample if step.index == 0 else self._teacher
        self._teacher = advanced(step, before, self._grid[step.index])
        predictions = self._recent.add(step, prediction)
        self.table.append(self._fitted(step, predictions))
        refined = combined(predictions, self.table[-1])
        self.final = step.preview(refined)
        return refined

    def distance(self, samples: Tensor) -> float:
        """Squared distance of samples to the teacher's, on the images that judge."""
        apart = (samples - self._teacher)[-self._judges :]
        return float(apart.double().square().sum())

    def size(self) -> float:
        """Squared size of the teacher's samples, on the images that judge."""
        return float(self._teacher[-self._judges :].double().square().sum())

    def _fitted(self, step: Step, predictions: list[Tensor]) -> list[float]:
        """The best coefficients, or those that change nothing."""
        origin = step.preview(torch.zeros_like(predictions[0]))
        effects = torch.stack([(step.preview(e) - origin).double() for e in predictions], dim=-1)
        missing = self._teacher.double() - step.preview(predictions[0]).double()
        change = least_squares(effects[: -self._judges], missing[: -self._judges])
        judged, effect = missing[-self._judges :], effects[-self._judges :] @ change
        floor = ROUNDING * float(self._teacher[-self._judges :].norm())
        before, after = float(judged.norm()), float((judged - effect).norm())
        plain = _nothing(self._history)
        if before <= floor or after**2 > (1 - GAIN) * before**2:
            return plain
        padded = [*change.tolist(), *[0.0] * (1 + self._history - len(change))]
        return [c + w for c, w in zip(plain, padded, strict=True)]


def least_squares(effects: Tensor, target: Tensor) -> Tensor:
    """The weights ``[k]`` that bring ``effects [..., k] @ weights`` nearest to ``target [...]``.

    With a small ridge, so that effects which are all but parallel, or nothing, give no large ones.
    """
    columns = effects.flatten(0, -2)
    gram = columns.T @ columns
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram + ridge * eye, columns.T @ target.flatten())
    return weights
