"""Which steps to correct, as rows of a study: figure 3 and table 5 of the IEC paper.

Scores take images, so the rows are a study file that ``iec-eval launch`` runs like any other. What
each costs beside the uncorrected row is predicted here, and read from its results once there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iec_eval.analysis.bench import Subject, correctors, uncorrected
from iec_eval.callbacks.iec import Ends, corrected_steps
from iec_eval.cost import EvaluationCost, Uncounted, expected_evaluations
from iec_eval.planning import Plan, fingerprint_in_results, plan_like, plans_of_seeds
from iec_eval.plugins import Registry
from iec_eval.report.wording import quality_metric
from iec_eval.results import Variant, read_results
from iec_eval.storage import write_text
from iec_eval.study import Study

SHARES = ("1/4", "1/8", "1/10", "1/20")


@dataclass(frozen=True)
class Choice:
    """A row of the ablation: where it corrects (None: nowhere), and its plan.

    ``fingerprint`` is that of its row in results, over all seeds if the study has several.
    """

    name: str
    label: str
    where: Any
    plan: Plan
    fingerprint: str


def choices(subject: Subject, registry: Registry) -> list[Choice]:
    """The row without correction, with it everywhere, at both ends, first and last.

    Of choices that come down to the same steps (two shares of a short run, say) the first is kept.
    """
    plan, full = subject.plan, subject.full_steps

    def choice(label: str, where: Any, changed: Plan) -> Choice:
        fingerprint = fingerprint_in_results(plans_of_seeds(changed, registry))
        return Choice(f"{subject.name}, {label}", label, where, changed, fingerprint)

    made = [choice("none", None, uncorrected(plan, registry))]
    seen: set[frozenset[int]] = {frozenset()}
    for label, where in _places(full):
        steps = _steps(where, full, subject.total)
        if steps not in seen:
            seen.add(steps)
            changed = plan_like(plan, registry, callbacks=_callbacks(plan, where))
            made.append(choice(label, where, changed))
    return made


def _places(full: frozenset[int]) -> list[tuple[str, Any]]:
    ends = [(f"ends {share}", {"ends": share}) for share in SHARES]
    return [("every full step", "full"), *ends, ("first", "first"), ("last", [max(full)])]


def _steps(where: Any, full: frozenset[int], total: int) -> frozenset[int]:
    place = Ends(**where) if isinstance(where, dict) else where
    return corrected_steps(place, total, full)


def _callbacks(plan: Plan, where: Any) -> list[dict[str, Any]]:
    """The row's callbacks, its correctors told where to correct."""
    told = {i for i, _ in correctors(plan)}
    parts = plan.experiment.callbacks
    return [{**part, "where": where} if i in told else part for i, part in enumerate(parts)]


def study_of(study: Study, chosen: Sequence[Choice]) -> dict[str, Any]:
    """The study with these rows, in place of its own rows and controls.

    Of the controls full precision remains: each choice is judged by the row without correction, and
    rivals of every choice would be several times as many rows.
    """
    shared = study.model_dump(
        mode="json", exclude_defaults=True, exclude={"variants", "controls", "paper", "doubtful"}
    )
    rows = [_variant(study, choice) for choice in chosen]
    plain = any(not choice.plan.methods and not choice.plan.callbacks for choice in chosen)
    controls = [] if plain else ["full-precision"]
    name = f"{study.study}-ablation"
    content = {**shared, "study": name, "controls": controls, "variants": rows}
    whole: dict[str, Any] = json.loads(json.dumps(content))  # nothing shared: YAML without anchors
    return whole


def _variant(study: Study, choice: Choice) -> dict[str, Any]:
    row = choice.plan.experiment
    own = row.sampler  # whole if it is another: only the steps would be taken over
    if own["name"] == study.sampler["name"]:
        own = {key: value for key, value in own.items() if study.sampler.get(key) != value}
    parts = {"sampler": own, "efficiency": row.efficiency, "callbacks": row.callbacks}
    return {"name": choice.name, **{key: value for key, value in parts.items() if value}}


def write_study(path: Path, study: dict[str, Any]) -> None:
    """The study as a file."""
    write_text(path, yaml.safe_dump(study, sort_keys=False))


def overheads(
    subject: Subject, chosen: Sequence[Choice], cost: EvaluationCost | Uncounted, results: Path
) -> dict[str, Any]:
    """Predicted overhead of each choice over the uncorrected row, and what was measured of it.

    ``results`` may hold other rows as well, or not be there. Without a count of the row's work
    nothing is predicted.
    """
    measured = read_results(results) if results.is_file() else None
    done = [row for row in (measured.variants if measured else []) if row.status == "done"]
    none = _result(chosen[0], done)
    plain = _macs(chosen[0].plan, subject, cost)
    rows = []
    for choice in chosen:
        counts = expected_evaluations(choice.plan, subject.full_steps)
        macs = cost.macs(counts.full, counts.cached)
        rows.append(
            {
                "name": choice.name,
                "label": choice.label,
                "where": choice.where,
                "evaluations_full": counts.full,
                "evaluations_cached": counts.cached,
                "predicted_overhead": _excess(macs, plain),
                "measured": _measured(_result(choice, done), none),
            }
        )
    return {
        "row": subject.name,
        "fingerprint": subject.plan.fingerprint,
        "images": measured.images if measured else None,
        "quality": quality_metric(measured) if measured else None,
        "choices": rows,
    }


def judgements(found: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Of what :func:`overheads` gave, the choices by the judgement on the metric of quality.

    Against no correction: ``better``, ``worse`` or ``not distinguishable``. Empty before the study
    has run, or without an ablation.
    """
    by: dict[str, list[str]] = {}
    for choice in found["choices"][1:] if found else []:
        differences = (choice["measured"] or {}).get("differences", {})
        said = differences.get(found["quality"], {}).get("judgement") if found else None
        if said is not None:
            by.setdefault(said, []).append(choice["label"])
    return by


def _result(choice: Choice, done: Sequence[Variant]) -> Variant | None:
    """The choice's row in results, under whatever name its images were made.

    What a run's batching decides too has a fingerprint of that run: there the name must do.
    """
    by_name = choice.plan.depends_on_batch
    wanted = choice.name if by_name else choice.fingerprint
    found = {row.name if by_name else row.fingerprint: row for row in done}
    return found.get(wanted)


def _macs(plan: Plan, subject: Subject, cost: EvaluationCost | Uncounted) -> float | None:
    counts = expected_evaluations(plan, subject.full_steps)
    return cost.macs(counts.full, counts.cached)


def _measured(row: Variant | None, none: Variant | None) -> dict[str, Any] | None:
    """Overheads in work and time, the scores, and their differences to the uncorrected row's.

    A difference is there where the results compare the two. None before the study has run.
    """
    if row is None or none is None:
        return None
    return {
        "overhead": _excess(row.cost.macs_per_image, none.cost.macs_per_image),
        "overhead_seconds": _excess(row.cost.seconds_per_image, none.cost.seconds_per_image),
        "metrics": {name: metric.value for name, metric in row.metrics.items()},
        "differences": {
            one.metric: one.model_dump(include={"value", "ci95", "judgement"})
            for one in row.comparisons
            if one.versus == none.name
        },
    }


def _excess(value: float | None, base: float | None) -> float | None:
    return value / base - 1 if value is not None and base else None
