"""How far a row's trajectory gets from that of full precision, and how it grows (figure 2).

The paper's theorem says that errors grow exponentially without its correction, and linearly with
it. Both are fitted to the measured distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from iec_eval.analysis.bench import (
    Bench,
    Subject,
    corrected,
    corrected_twin,
    full_precision_twin,
    question_of,
    uncorrected,
)
from iec_eval.analysis.pieces import Pieces
from iec_eval.analysis.question import Question
from iec_eval.errors import Incompatible
from iec_eval.planning import Plan
from iec_eval.plugins import Registry

GOOD_FIT = 0.9  # R^2 below which neither curve describes the growth
CLEAR = 2.0  # difference of AIC below which the curves are not told apart
PARAMETERS = 3  # of each curve: two, and the variance of what is left
Array = np.ndarray[Any, np.dtype[np.float64]]


def trajectories(subject: Subject, registry: Registry) -> tuple[dict[str, Plan], str | None]:
    """The runs that are compared, by what they are; and why there are none with correction."""
    plan = subject.plan
    found = {
        "row": uncorrected(plan, registry),
        "full precision": full_precision_twin(plan, registry),
    }
    try:
        found["row + correction"] = corrected(plan, registry)
        found["full precision + correction"] = corrected_twin(subject, registry)
    except Incompatible as error:
        return {key: run for key, run in found.items() if "correction" not in key}, str(error)
    return found, None


def states_file(plan: Plan, question: Question, subject: Subject) -> Pieces:
    """Where the states of a run are kept; runs that rows share are kept once, beside the rows."""
    key = question_of(plan, images=question.images)
    return Pieces(subject.folder.parent, "trajectory", key)


def obtain_states(plan: Plan, question: Question, subject: Subject, bench: Bench) -> Tensor:
    """States ``[T + 1, B, C, H, W]`` of a run, computed if they are not kept yet."""
    pieces = states_file(plan, question, subject)
    found = pieces.read_tensor("states")
    if found is None:
        found = bench.trajectory(plan, question.images)
        pieces.write_tensor("states", found)
    return found


def measure(
    subject: Subject, question: Question, bench: Bench, registry: Registry
) -> dict[str, Any]:
    """Distances of every run of a row to its twins, with the fits."""
    runs, note = trajectories(subject, registry)
    states = {key: obtain_states(plan, question, subject, bench) for key, plan in runs.items()}
    twins = [key for key in runs if key.startswith("full")]
    series = [
        _series(key, twin, states[key], states[twin])
        for key in runs
        if key.startswith("row")
        for twin in twins
    ]
    return {
        "row": subject.name,
        "fingerprint": subject.plan.fingerprint,
        "images": question.images,
        "correction": note or _correction(runs["row + correction"]),
        "series": series,
    }


def _correction(plan: Plan) -> list[dict[str, Any]]:
    return list(plan.experiment.callbacks)


def _series(run: str, versus: str, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """||delta|| of each state and image, state 0 being the noise they share."""
    apart = (ours.double() - theirs.double()).flatten(2).norm(dim=2)
    size = theirs.double().flatten(2).norm(dim=2)
    mean = apart.mean(dim=1)
    spread = apart.std(dim=1) if apart.shape[1] > 1 else apart.new_zeros(len(apart))
    fit = fit_growth(mean.tolist())
    votes = [fit_growth(image.tolist())["better"] for image in apart.T]
    return {
        "run": run,
        "versus": versus,
        "distance": apart.tolist(),
        "mean": mean.tolist(),
        "std": spread.tolist(),
        "relative": (apart / size).mean(dim=1).tolist(),
        "fit": fit,
        "fits_of_images": {kind: votes.count(kind) for kind in sorted(set(votes))},
    }


def fit_growth(distances: Sequence[float]) -> dict[str, Any]:
    """``a + b i`` and ``a exp(b i)`` by least squares to the distances after step i = 1 .. T.

    The first entry, before any step, is 0 by construction and left out. Both curves have two
    parameters and are fitted to the distances themselves, not to their logarithms, so residuals
    are on one scale and AIC = n ln(RSS / n) + 2 k compares them.

    Returns ``linear`` and ``exponential`` with their parameters, R^2 and AIC, and ``better``: one
    of them; ``not told apart``, AICs within 2; ``neither``, both R^2 below 0.9; ``no error``, all
    distances 0; ``too few steps``, fewer than 4.
    """
    y = np.asarray(distances[1:], dtype=np.float64)
    if len(y) < 4:
        return {"better": "too few steps"}
    if not y.any():
        return {"better": "no error"}
    steps = np.arange(1, len(y) + 1, dtype=np.float64)
    slope, intercept = np.polyfit(steps, y, 1)
    scale, rate = _exponential(steps, y)
    linear = _quality(y, intercept + slope * steps)
    exponential = _quality(y, scale * np.exp(rate * steps))
    return {
        "linear": {"intercept": float(intercept), "slope": float(slope), **linear},
        "exponential": {"scale": scale, "rate": rate, **exponential},
        "better": _better(linear, exponential),
    }


def _better(linear: dict[str, float], exponential: dict[str, float]) -> str:
    if max(linear["r2"], exponential["r2"]) < GOOD_FIT:
        return "neither"
    if abs(linear["aic"] - exponential["aic"]) < CLEAR:
        return "not told apart"
    return "linear" if linear["aic"] < exponential["aic"] else "exponential"


def _quality(y: Array, fitted: Array) -> dict[str, float]:
    total = float(((y - y.mean()) ** 2).sum())
    left = float(((y - fitted) ** 2).sum())
    floor = 1e-28 * float((y**2).sum())  # rounding; a perfect fit has no logarithm
    aic = len(y) * float(np.log(max(left, floor) / len(y))) + 2 * PARAMETERS
    return {"r2": 1 - left / total if total > 0 else 1.0, "aic": aic}


def _exponential(steps: Array, y: Array) -> tuple[float, float]:
    """The least-squares a and b of ``a exp(b i)``: for each b the best a is known."""
    span = float(steps[-1])

    def left(exponents: Array) -> Array:
        """RSS for each b T, up to a constant."""
        shift = (exponents > 0)[:, None]  # the curve's largest value is 1: nothing overflows
        curves = np.exp(exponents[:, None] * (steps / span - shift))
        rest: Array = -((curves @ y) ** 2) / (curves**2).sum(axis=1)
        return rest

    low, high = -40.0, 40.0
    for _ in range(12):
        grid = np.linspace(low, high, 201)
        best = int(np.argmin(left(grid)))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
    rate = (low + high) / 2 / span
    curve = np.exp(rate * steps)
    return float(curve @ y / (curve @ curve)), rate
