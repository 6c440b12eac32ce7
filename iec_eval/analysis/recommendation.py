"""Lambda for each step and the steps worth correcting under a budget, from measured residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from iec_eval.analysis.bench import Subject, correctors, other_callbacks, uncorrected
from iec_eval.cost import EvaluationCost, expected_evaluations
from iec_eval.plugins import Registry

CRITERION = (
    "residual that one correction with the step's lambda removes, as a share of the sample's norm, "
    "mean over images, per multiply-accumulate of the step's evaluation"
)
KEPT = ("allow_clipping", "refresh_cache")
DIGITS = 1  # of a recommended lambda: the minimum is flat, and steps with one lambda share a line


def recommend(
    subject: Subject,
    found: Sequence[Mapping[str, Any]],
    cost: EvaluationCost,
    budget: float,
    macs: float,
) -> dict[str, Any]:
    """Lambda for each measured step, and which to correct for at most ``budget macs`` more.

    Args:
        subject: the row.
        found: what :func:`residuals.residuals_at` gave for each measured step.
        cost: of the row's evaluations.
        budget: share of ``macs``.
        macs: multiply-accumulates of an image without correction.
    """
    steps = [_step(piece, cost) for piece in found]
    ranked = sorted(
        (step for step in steps if step["gain"] > 0 and step["lambda"] > 0),
        key=lambda step: (-step["gain"] / max(step["macs"], 1), step["step"]),
    )
    chosen, spent = list[dict[str, Any]](), 0.0
    for step in ranked:
        if spent + step["macs"] <= budget * macs * (1 + 1e-9):
            chosen.append(step)
            spent += step["macs"]
    return {
        "row": subject.name,
        "criterion": CRITERION,
        "budget": budget,
        "extra_macs": spent / macs if macs else None,
        "measured_steps": len(steps),
        "steps_of_run": subject.total,
        "ranking": [step["step"] for step in ranked],
        "chosen": sorted(step["step"] for step in chosen),
        "steps": steps,
        "callbacks": [*other_callbacks(subject.plan), *callbacks_for(chosen, _kept(subject))],
    }


def _step(piece: Mapping[str, Any], cost: EvaluationCost) -> dict[str, Any]:
    removed = [
        (before - after) / size if size else 0.0
        for before, after, size in zip(
            piece["before"], piece["after_lambda"], piece["size"], strict=True
        )
    ]
    relaxation = round(piece["lambda"], DIGITS)
    return {
        "step": piece["step"],
        "lambda": relaxation,
        "lambda_measured": piece["lambda"],
        "gain": sum(removed) / len(removed),
        "macs": cost.full.macs if piece["full"] else cost.cached.macs,
    }


def _kept(subject: Subject) -> dict[str, Any]:
    """What the row's own IEC says of the run it is in, which a recommended one has to say too."""
    parts = [subject.plan.experiment.callbacks[i] for i, _ in correctors(subject.plan)]
    return {key: part[key] for part in parts for key in KEPT if key in part}


def callbacks_for(
    chosen: Sequence[Mapping[str, Any]], kept: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The study's ``callbacks``: one IEC for each lambda, at its steps, each with what is kept."""
    ordered = sorted(chosen, key=lambda step: (step["lambda"], step["step"]))
    groups = groupby(ordered, key=lambda step: step["lambda"])
    return [
        {
            "name": "iec",
            "weights": [value],
            "where": [step["step"] for step in steps],
            **(kept or {}),
        }
        for value, steps in groups
    ]


def uncorrected_macs(subject: Subject, cost: EvaluationCost, registry: Registry) -> float:
    """Multiply-accumulates of an image of the row without its corrector."""
    counts = expected_evaluations(uncorrected(subject.plan, registry))
    return cost.macs(counts.full, counts.cached)
