"""What is there and what it would cost: nothing here runs or changes anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from iec_eval.cost import evaluation_cost, expected_evaluations
from iec_eval.generation import Job
from iec_eval.plugins import BASES, Registry
from iec_eval.report.wording import quantity
from iec_eval.study import Study


def study_rows(jobs: Sequence[Job], study: Study) -> list[dict[str, Any]]:
    """What each row would do, need and still lacks."""
    return [_row(job, study) for job in jobs]


def study_as_text(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The resolved configuration and a line per row."""
    config = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    return "\n".join([config, *map(_row_as_text, rows)])


def distribution_as_text(item: dict[str, Any]) -> str:
    """A distribution with the names it registers, or why it was not loaded."""
    head = f"{item['distribution']} {item['version']}"
    if item["error"]:
        return f"{head}: BROKEN, not loaded: {item['error']}"
    names = [f"  {kind}: {', '.join(found)}" for kind, found in item["names"].items()]
    return "\n".join([head, *names])


def registered_parts(registry: Registry) -> list[dict[str, Any]]:
    """Every registered part with its options, as JSON values."""
    return [
        {
            "kind": kind,
            "name": name,
            "distribution": one.owner,
            "summary": (one.cls.__doc__ or "").strip().split("\n")[0],
            "options": _options(one.cls),
        }
        for kind in BASES
        for name, one in registry.items(kind)
    ]


def part_as_text(part: dict[str, Any]) -> str:
    """A part with one line for each option."""
    lines = [f"{part['kind']} {part['name']} ({part['distribution']}): {part['summary']}"]
    for option in part["options"]:
        default = "" if option["required"] else f" [{json.dumps(option['default'])}]"
        lines.append(f"    {option['name']}{default}: {option['description']}")
    return "\n".join(lines)


def _row(job: Job, study: Study) -> dict[str, Any]:
    cost, expected = evaluation_cost(job.plan), expected_evaluations(job.plan)
    channels, height, width = job.plan.model.image_shape
    count = study.images.count
    return {
        "name": job.plan.experiment.name,
        "fingerprint": job.plan.fingerprint,
        "control": job.plan.experiment.control,
        "parts": [part.name for part in job.plan.parts()],
        "callbacks": [callback.name for callback in job.plan.callbacks],
        "steps": len(job.plan.sampler.timesteps),
        "evaluations_full": expected.full,
        "evaluations_cached": expected.cached,
        "macs_per_image": cost.macs(expected.full, expected.cached),
        "weight_bytes": cost.weight_bytes,
        "images": count,
        "missing": sum(len(part) for part in job.missing(study.execution.chunk_size)),
        "disk_bytes": count * channels * height * width,
    }


def _row_as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}: {row['steps']} steps, {row['evaluations_full']} full + "
        f"{row['evaluations_cached']} cached evaluations, "
        f"{quantity(row['macs_per_image'], 'MAC')} an image; {row['missing']} of {row['images']} "
        f"images missing, {quantity(row['disk_bytes'], 'B')} on disk"
    )


def _options(cls: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "required": field.is_required(),
            "default": None
            if field.is_required()
            else _plain(field.get_default(call_default_factory=True)),
            "description": field.description or "",
        }
        for name, field in cls.Options.model_fields.items()
    ]


def _plain(value: Any) -> Any:
    """A default as a JSON value."""
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
