"""How far a row's trajectory gets from that of full precision, and how it grows (figure 2).

The paper says that errors grow exponentially without its correction, and linearly with it. Both,
and growth that slackens, are fitted to the measured distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

GOOD_FIT = 0.9  # R^2 below which no curve describes the growth
CLEAR = 2.0  # AIC by which a bent curve has to be better than the straight line
PARAMETERS = 3  # of each curve: two, and the variance of what is left
BENDS = (1e-3, 40.0)  # least and largest |b T| of a bent curve; with less it is a line
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
    """Three curves by least squares to the distances after step i = 1 .. T.

    ``exponential``, ``a (exp(b i) - 1)``, is what the paper's recursion (equations 8 and 9) comes
    to where every step multiplies the error by exp(b) and adds as much as the others, from none at
    the start. ``linear`` is ``a + b i``, and ``flattening``, ``a (1 - exp(-b i))``, the same
    recursion with steps that shrink the error; b > 0 in both bent curves. The first entry, before
    any step, is 0 by construction and left out. All have two parameters and are fitted to the
    distances themselves, not to their logarithms, so residuals are on one scale and
    AIC = n ln(RSS / n) + 2 k compares them.

    Returns the curves with their parameters, R^2 and AIC, and ``better``: one of them, the line
    unless a bent one is better by more than 2; ``none``, all R^2 below 0.9; ``no error``, all
    distances 0; ``too few steps``, fewer than 4.
    """
    y = np.asarray(distances[1:], dtype=np.float64)
    if len(y) < 4:
        return {"better": "too few steps"}
    if not y.any():
        return {"better": "no error"}
    found = {
        "linear": _line(y),
        "exponential": _bent(y, BENDS),
        "flattening": _bent(y, (-BENDS[1], -BENDS[0])),
    }
    return {**found, "better": _better(found)}


def _better(curves: Mapping[str, Mapping[str, float]]) -> str:
    if max(curve["r2"] for curve in curves.values()) < GOOD_FIT:
        return "none"
    best = min(curves, key=lambda name: curves[name]["aic"])
    return best if curves[best]["aic"] < curves["linear"]["aic"] - CLEAR else "linear"


def _quality(y: Array, fitted: Array) -> dict[str, float]:
    total = float(((y - y.mean()) ** 2).sum())
    left = float(((y - fitted) ** 2).sum())
    floor = 1e-28 * float((y**2).sum())  # rounding; a perfect fit has no logarithm
    aic = len(y) * float(np.log(max(left, floor) / len(y))) + 2 * PARAMETERS
    return {"r2": 1 - left / total if total > 0 else 1.0, "aic": aic}


def fitted(curve: str, found: Mapping[str, float], steps: Array) -> Array:
    """A curve of :func:`fit_growth` after each of the ``steps``."""
    if curve == "linear":
        return found["intercept"] + found["slope"] * steps
    sign = 1 if curve == "exponential" else -1
    return sign * found["scale"] * np.expm1(sign * found["rate"] * steps)


def _line(y: Array) -> dict[str, float]:
    steps = _steps(y)
    slope, intercept = map(float, np.polyfit(steps, y, 1))
    return {"intercept": intercept, "slope": slope, **_quality(y, intercept + slope * steps)}


def _bent(y: Array, exponents: tuple[float, float]) -> dict[str, float]:
    """The least-squares ``a (exp(b i) - 1)``, b T in that range: for each b the best a is known.

    Scale and rate are given without the sign that both have where b < 0.
    """
    steps = _steps(y)
    span = float(steps[-1])

    def shapes(exponents: Array) -> Array:
        """The curves, each 1 at the last step."""
        return np.expm1(np.multiply.outer(exponents, steps / span)) / np.expm1(exponents)[:, None]

    def left(exponents: Array) -> Array:
        """RSS for each b T, up to a constant."""
        curves = shapes(exponents)
        rest: Array = -((curves @ y) ** 2) / (curves**2).sum(axis=1)
        return rest

    low, high = exponents
    for _ in range(12):
        grid = np.linspace(low, high, 201)
        best = int(np.argmin(left(grid)))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
    exponent = (low + high) / 2
    shape = shapes(np.array([exponent]))[0]
    height = float(shape @ y / (shape @ shape))
    scale = abs(height / float(np.expm1(exponent)))
    return {"scale": scale, "rate": abs(exponent) / span, **_quality(y, height * shape)}


def _steps(y: Array) -> Array:
    return np.arange(1, len(y) + 1, dtype=np.float64)
