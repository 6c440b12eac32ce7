"""How a step stretches errors: norms of A I + B J and of grad G = (1 - lambda) I + lambda B J.

J is the Jacobian of the step's prediction with respect to the sample, as the network is shown it,
at the one that the step starts from. A step maps a small error delta to (A I + B J) delta, so its
norm bounds what a step can make of an error (figure 1 of the IEC paper); the corrector's iteration
contracts every error if the norm of grad G is below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec_eval.analysis.affine import AffineStep
from iec_eval.analysis.bench import Bench, Subject, question_of
from iec_eval.analysis.jacobian import Jacobian
from iec_eval.analysis.lanczos import TOLERANCE, Product, largest_singular_values
from iec_eval.analysis.pieces import Pieces, step_name
from iec_eval.analysis.question import Question
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.denoising import Step
from iec_eval.options import BaseOptions

ROUNDING = 10.0  # units in the last place that a product of a network is wrong by


@dataclass(frozen=True)
class Operator:
    """``identity I + jacobian J``, one for each step, with the name it has in the results.

    Here J is with respect to the sampler's own sample, the network's J times the step's scale.
    """

    name: str
    identity: float
    jacobian: float


def operators(affine: AffineStep, lambdas: Sequence[float]) -> list[Operator]:
    """A I + B J, J itself, and grad G for each lambda."""
    own, b = 1 / affine.scale, affine.b / affine.scale
    relaxed = [Operator(f"{value:g}", 1 - value, value * b) for value in lambdas]
    return [Operator("step", affine.a, b), Operator("jacobian", 0.0, own), *relaxed]


def norms_at(
    step: Step, chosen: Sequence[Operator], *, iterations: int, at_once: int
) -> dict[str, Any]:
    """Spectral norms of operators at a step's sample, for each of its images.

    As many operators as fit into ``at_once`` rows share a batch, and so one linearisation; each
    operator on each image has a search of its own.

    Returns ``norms``: by operator, a list with value, residual, iterations and converged of each
    image; ``products`` that were made; ``adjoint_error``: the largest relative difference found
    between <J v, u> and <v, J^T u>, which are equal unless a layer's derivatives are not what
    they say.
    """
    images = len(step.sample)
    group = max(1, at_once // images)
    norms: dict[str, list[dict[str, Any]]] = {}
    products, adjoint = 0, 0.0
    for start in range(0, len(chosen), group):
        some = chosen[start : start + group]
        found, spent, error = _norms(step, some, iterations)
        for number, operator in enumerate(some):
            norms[operator.name] = found[number * images : (number + 1) * images]
        products, adjoint = products + spent, max(adjoint, error)
    return {"norms": norms, "products": products, "adjoint_error": adjoint}


def _norms(
    step: Step, chosen: Sequence[Operator], iterations: int
) -> tuple[list[dict[str, Any]], int, float]:
    """For operators in order, each with all images; the products; the adjoint error."""
    device, images = step.sample.device, len(step.sample)
    rows = torch.arange(images, device=device).repeat(len(chosen))
    point = step.sample[rows]
    table = torch.tensor([[o.identity, o.jacobian] for o in chosen], dtype=torch.float64)
    identity, jacobian = table.to(device).repeat_interleave(images, dim=0)[:, :, None].unbind(1)
    random = torch.Generator().manual_seed(step.index)
    start = torch.randn(len(rows), point[0].numel(), generator=random, dtype=torch.float64)
    start = start.to(device)

    def combined(product: Product) -> Product:
        return lambda v: identity * v + jacobian * product(v)

    with Jacobian(lambda x: step.predict(x, rows=rows, store=False), point) as at:
        error = _adjoint_error(at, start)
        found = largest_singular_values(
            combined(at.forward),
            combined(at.transpose),
            start,
            max_iterations=iterations,
            rounding=ROUNDING * torch.finfo(point.dtype).eps,
        )
    listed = zip(
        found.value.tolist(),
        found.residual.tolist(),
        found.iterations.tolist(),
        found.converged.tolist(),
        strict=True,
    )
    names = ("value", "residual", "iterations", "converged")
    spent = 2 * len(rows) * (int(found.iterations.max()) + 1)
    return [dict(zip(names, values, strict=True)) for values in listed], spent, error


def _adjoint_error(at: Jacobian, vectors: Tensor) -> float:
    other = vectors.flip(1)
    forward, back = at.forward(vectors), at.transpose(other)
    size = (forward.norm(dim=1) * other.norm(dim=1)).clamp(min=torch.finfo(vectors.dtype).tiny)
    difference = (forward * other).sum(dim=1) - (vectors * back).sum(dim=1)
    return float((difference.abs() / size).max())


class SpectralProbe(DenoisingCallback):
    """Measures wanted steps as the trajectory comes by them, and keeps each at once."""

    name = "spectral-probe"

    def __init__(
        self,
        wanted: Sequence[int],
        affine: Sequence[AffineStep],
        question: Question,
        pieces: Pieces,
        bench: Bench,
        at_once: int,
    ) -> None:
        super().__init__(BaseOptions())
        self._wanted, self._affine, self._question = wanted, affine, question
        self._pieces, self._progress, self._at_once = pieces, bench.progress, at_once

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if step.index in self._wanted:
            affine = self._affine[step.index]
            found = norms_at(
                step,
                operators(affine, self._question.lambdas),
                iterations=self._question.iterations,
                at_once=self._at_once,
            )
            about = {"step": step.index, "timestep": step.timestep, "full": step.full}
            coefficients = {"a": affine.a, "b": affine.b}
            self._pieces.write(step_name(step.index), {**about, **coefficients, **found})
            self._progress.advance(1)
        return prediction


def pieces_of(subject: Subject, question: Question) -> Pieces:
    """Where the norms of a row are kept; which steps were asked for does not matter."""
    key = question_of(
        subject.plan,
        images=question.spectral_images,
        lambdas=list(question.lambdas),
        iterations=question.iterations,
        tolerance=TOLERANCE,
    )
    return Pieces(subject.folder, "spectral", key)


def measurable(subject: Subject, affine: Sequence[AffineStep], steps: Sequence[int]) -> list[int]:
    """Steps whose prediction is one evaluation, of which J is the network's Jacobian.

    None of a sampler whose steps go in pairs: there an error passes through the solver's memory.
    """
    if subject.plan.sampler.uncorrectable:
        return []
    return [step for step in steps if affine[step].evaluations == 1]


def summary(
    subject: Subject, found: Sequence[dict[str, Any]], question: Question
) -> dict[str, Any]:
    """The part's result: every step, and what they show together."""
    total = sum(piece["products"] for piece in found)
    searches = [one for piece in found for norms in piece["norms"].values() for one in norms]
    return {
        "row": subject.name,
        "fingerprint": subject.plan.fingerprint,
        "images": question.spectral_images,
        "lambdas": list(question.lambdas),
        "derivative_of_rounding": "straight through",
        "tolerance": f"{TOLERANCE:g} of the spread of the singular values",
        "products": total,
        "searches": len(searches),
        "not_converged": sum(not one["converged"] for one in searches),
        "largest_adjoint_error": max((piece["adjoint_error"] for piece in found), default=0.0),
        "steps": [_step_summary(piece, question.lambdas) for piece in found],
    }


def _step_summary(piece: dict[str, Any], lambdas: Sequence[float]) -> dict[str, Any]:
    worst = {name: max(one["value"] for one in norms) for name, norms in piece["norms"].items()}
    relaxed = {value: worst[f"{value:g}"] for value in lambdas}
    best = min(relaxed, key=lambda value: relaxed[value])
    contracting = [value for value in lambdas if relaxed[value] < 1]
    step = [one["value"] for one in piece["norms"]["step"]]
    telling = {
        "norm_step_mean": sum(step) / len(step),
        "norm_step_max": worst["step"],
        "images_above_one": sum(value > 1 for value in step),
        "norm_jacobian_max": worst["jacobian"],
        "norm_grad_g_max": {f"{value:g}": relaxed[value] for value in lambdas},
        "lambda_of_least_norm": best,
        "contracting_lambdas": contracting,
    }
    return {**piece, **telling}
