"""Whether the corrector converges: its residual, before and after, per step and image.

One iteration maps x to G(x) = x + lambda (A x_t + B eps(x, t) - x). The residual is that of
lambda = 1, d(x) = A x_t + B eps(x, t) - x, of which G(x) - x is lambda times; it is zero at the
corrector's fixed point. That point is an implicit step at the old timestep, not the state that
an exact network would give: a smaller residual says that the corrector does its work, not that
images get better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iec_eval.analysis.bench import Bench, Subject, correctors, question_of
from iec_eval.analysis.pieces import Pieces, step_name
from iec_eval.analysis.question import Question
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.denoising import Step
from iec_eval.options import BaseOptions

EVALUATIONS = 5  # a step and image, at most
PAPER_LAMBDA = 0.5
LARGEST_LAMBDA = 1.5


@dataclass
class Corrections:
    """What the row's own corrector told of the step, and the prediction before it."""

    prediction: Tensor | None = None
    told: list[dict[str, Any]] = field(default_factory=list)

    def take(self, step: Step, correction: Any) -> None:
        """What a corrector calls with each of its corrections."""
        self.told.append(
            {
                "residual": correction.residual.tolist(),
                "converged": correction.converged.tolist(),
                "applied": correction.applied.tolist(),
            }
        )


class BeforeCorrection(DenoisingCallback):
    """Stands before the row's callbacks: keeps the sampler's own prediction."""

    name = "before-correction"

    def __init__(self, notes: Corrections) -> None:
        super().__init__(BaseOptions())
        self._notes = notes

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        self._notes.prediction, self._notes.told = prediction, []
        return prediction


class ResidualProbe(DenoisingCallback):
    """Stands after the row's callbacks: measures residuals, leaves the trajectory as it is."""

    name = "residual-probe"

    def __init__(
        self, wanted: Sequence[int], notes: Corrections, pieces: Pieces, bench: Bench
    ) -> None:
        super().__init__(BaseOptions())
        self._wanted, self._notes = wanted, notes
        self._pieces, self._progress = pieces, bench.progress

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if step.index in self._wanted:
            assert self._notes.prediction is not None
            plain = self._notes.prediction
            # what other callbacks change is no correction towards the residual's fixed point
            refined = prediction if self._notes.told else plain
            found = residuals_at(step, plain, refined)
            self._pieces.write(step_name(step.index), {**found, "corrections": self._notes.told})
            self._progress.advance(1)
        return prediction


def residuals_at(step: Step, plain: Tensor, refined: Tensor) -> dict[str, Any]:
    """Residual norms of each image at a step, without correction, after one, after the row's own.

    With d0 the residual at x0, the sample that the plain prediction leads to, and d1 that of
    lambda = 1, a correction by lambda leaves d0 + lambda (d1 - d0) to first order. The lambda
    with the least sum of squares over the images is <d0, d0 - d1> / ||d0 - d1||^2: of all images
    and pixels together, so that one number serves the step. It is then measured, not trusted.
    """
    start = step.preview(plain)
    target = _target(step, start)
    before = target - start
    at_one = _target(step, target) - target
    relaxation = best_lambda(before, at_one)
    own = None
    if not torch.equal(refined, plain):
        state = step.preview(refined)
        own = _norms(_target(step, state) - state)
    return {
        "step": step.index,
        "timestep": step.timestep,
        "full": step.full,
        "size": _norms(start),
        "before": _norms(before),
        "after_one": _norms(at_one),
        "after_half": _after(step, start, before, PAPER_LAMBDA),
        "lambda": relaxation,
        "after_lambda": _after(step, start, before, relaxation),
        "after_own": own,
    }


def best_lambda(before: Tensor, at_one: Tensor) -> float:
    """The lambda of least residual, of those from 0 to 1.5; 0 where nothing is to be corrected."""
    change = (before - at_one).double()
    square = float((change * change).sum())
    if square == 0:
        return 0.0
    return min(max(float((before.double() * change).sum()) / square, 0.0), LARGEST_LAMBDA)


def _target(step: Step, sample: Tensor) -> Tensor:
    """A x_t + B eps(x, t): the sample the sampler takes with the prediction at ``sample``."""
    return step.preview(step.predict(sample, level="next", store=False))


def _after(step: Step, start: Tensor, before: Tensor, relaxation: float) -> list[float]:
    sample = start + relaxation * before
    return _norms(_target(step, sample) - sample)


def _norms(residual: Tensor) -> list[float]:
    found: list[float] = residual.double().flatten(1).norm(dim=1).tolist()
    return found


def run(
    subject: Subject, wanted: Sequence[int], question: Question, pieces: Pieces, bench: Bench
) -> None:
    """Measure the wanted steps along the row's own trajectory."""
    notes = Corrections()
    plan = bench.assembly(subject.plan).plan
    watched = [callback for _, callback in correctors(plan)]

    for callback in watched:
        callback.on_correction = notes.take
    try:
        probe = ResidualProbe(wanted, notes, pieces, bench)
        bench.run(subject.plan, question.images, [probe], [BeforeCorrection(notes)])
    finally:
        for callback in watched:
            del callback.on_correction


def pieces_of(subject: Subject, question: Question) -> Pieces:
    """Where the residuals of a row are kept; which steps were asked for does not matter."""
    key = question_of(subject.plan, images=question.images)
    return Pieces(subject.folder, "residuals", key)


def summary(
    subject: Subject,
    found: Sequence[dict[str, Any]],
    question: Question,
    refused: str | None = None,
) -> dict[str, Any]:
    """The part's result: every step, and the shares of (image, step) that contract.

    ``refused`` is why there are none: the row can have no correction.
    """
    own = [piece for piece in found if piece["after_own"] is not None]
    return {
        "row": subject.name,
        "fingerprint": subject.plan.fingerprint,
        "images": question.images,
        "refused": refused,
        "contracts_own": share_below(own, "after_own"),
        "contracts_half": share_below(found, "after_half"),
        "contracts_lambda": share_below(found, "after_lambda"),
        "corrected_steps": len(own),
        "steps": list(found),
    }


def share_below(found: Sequence[dict[str, Any]], after: str) -> dict[str, Any] | None:
    """In how many (image, step) pairs the residual is smaller than before; None without pairs.

    Steps that the prediction does not enter (B = 0) have no residual and are left out.
    """
    pairs = [
        (old, new)
        for piece in found
        for old, new in zip(piece["before"], piece[after], strict=True)
        if old > 0
    ]
    if not pairs:
        return None
    count = sum(new < old for old, new in pairs)
    return {"share": count / len(pairs), "pairs": len(pairs)}
