"""What is there and what it would cost: nothing here runs or changes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from iec_eval import status
from iec_eval.assembly import artifact_keys, missing_artifacts
from iec_eval.cost import (
    EvaluationCost,
    Uncounted,
    evaluation_costs,
    expected_evaluations,
    if_counted,
)
from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.jobs import Job, by_row
from iec_eval.plugins import BASES, Registry
from iec_eval.report.wording import quantity
from iec_eval.runs import RunFolder
from iec_eval.slurm import Missing
from iec_eval.study import ROLES, Lack, Relation, Study


def assumed_tflops(study: Study, *, here: bool) -> float:
    """10^12 operations a second that one process is taken to sustain, if nobody says.

    15 is within reach of an A100 in single precision, which has 19.5 at most; 0.1 is about one
    thread of a CPU (0.09 was measured with the packaged model at full precision), which is what
    ``accelerator: auto`` means where no GPU is found, if it is to run ``here``, on no cluster.
    """
    accelerator = study.execution.accelerator
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and here and not found)
    return 0.1 if on_cpu else 15.0


def study_rows(
    jobs: Sequence[Job], study: Study, run: RunFolder, tflops: float
) -> list[dict[str, Any]]:
    """What each row would do, need and still lacks, and its hours at ``tflops`` 10^12 FLOP/s."""
    rows = by_row(jobs)
    costs = evaluation_costs([of_seeds[0].plan for of_seeds in rows])
    return [_row(row, cost, study, run, tflops) for row, cost in zip(rows, costs, strict=True)]


def rows_listing(jobs: Sequence[Job], study: Study, run: RunFolder) -> dict[str, Any]:
    """What ``iec-eval status`` has to know of the rows of a study, for the run's ``rows.json``.

    ``macs_per_image`` is null where it is not known. What the run has on record of the same rows is
    not counted again.
    """
    rows = [_listed(job) for job in jobs]
    known = _known_macs(run)
    if not all(row["folder"] in known for row in rows):
        known = _macs(jobs)
    return {
        "schema": status.SCHEMA,
        "study": study.study,
        "images": study.images.count,
        "chunk_size": study.execution.chunk_size,
        "claim_timeout": study.execution.claim_timeout,
        "stand_ins": jobs[0].stand_ins(),
        "rows": [{**row, "macs_per_image": known.get(row["folder"])} for row in rows],
    }


def _listed(job: Job) -> dict[str, Any]:
    keys = [{"part": part.name, "key": key} for part, key in artifact_keys(job.plan)]
    return {"name": job.name, "folder": job.folder.path.name, "artifacts": keys}


def _known_macs(run: RunFolder) -> dict[str, float | None]:
    """By the row's folder, whose name tells the row's fingerprint."""
    try:
        rows = status.read_rows(run.path)["rows"]
        return {row["folder"]: row["macs_per_image"] for row in rows}
    except (ConfigError, CorruptFile):
        return {}


def _macs(jobs: Sequence[Job]) -> dict[str, float | None]:
    """Multiply-accumulates of an image by the row's folder; a row is left out if nobody knows.

    Callbacks of others may take their time, or note what they are shown: they are not run here.
    """
    own = [job for job in jobs if all(map(_is_own, job.plan.callbacks))]
    try:
        costs = evaluation_costs([job.plan for job in own])
        expected = [expected_evaluations(job.plan) for job in own]
    except Exception:  # a part that cannot be counted can still be run
        return {}
    return {
        job.folder.path.name: cost.macs(counts.full, counts.cached)
        for job, cost, counts in zip(own, costs, expected, strict=True)
    }


def _is_own(part: object) -> bool:
    return type(part).__module__.partition(".")[0] == __name__.partition(".")[0]


def missing(jobs: Sequence[Job], study: Study, run: RunFolder) -> Missing:
    """What is to be calibrated and generated."""
    size = study.execution.chunk_size
    unfinished = [job for job in jobs if job.missing(size)]
    keys = {key for job in unfinished for key in missing_artifacts(job.plan, run)}
    return Missing(len(keys), sum(len(job.missing(size)) for job in unfinished))


def study_as_text(
    study: Study, rows: Sequence[dict[str, Any]], lacking: Sequence[str], tflops: float
) -> str:
    """The resolved configuration, a line per row, the sum, and what must be had first."""
    config = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    lines = [config, *map(_row_as_text, rows), _total_as_text(rows, tflops)]
    if lacking:
        lines += ["", "Before it can run:", *(f"- {line}" for line in lacking)]
    return "\n".join(lines)


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


def calibration_as_text(job: Job, run: RunFolder) -> str:
    """A line per row: which of its parts are calibrated, or why not."""
    name = job.name
    if job.folder.error_file.is_file():
        return f"{name}: failed, {job.folder.error_file.read_text().splitlines()[0]}"
    states = [f"{a['part']} {a['artifact'][:8]} {a['state']}" for a in _artifacts(job, run)]
    return f"{name}: {', '.join(states) or 'nothing to calibrate'}"


def _artifacts(job: Job, run: RunFolder) -> list[dict[str, str]]:
    """What calibration makes for this row, and whether it is there."""
    return [
        {"part": part.name, "artifact": key[:32], "state": "ready" if run.has(key) else "missing"}
        for part, key in artifact_keys(job.plan)
    ]


def _row(
    jobs: Sequence[Job],
    cost: EvaluationCost | Uncounted,
    study: Study,
    run: RunFolder,
    tflops: float,
) -> dict[str, Any]:
    job, size = jobs[0], study.execution.chunk_size
    expected = if_counted(expected_evaluations, job.plan)
    full = cached = macs = bits = None
    if not isinstance(expected, Uncounted):
        full, cached = expected.full, expected.cached
        macs, bits = cost.macs(full, cached), cost.bit_operations(full, cached)
    channels, height, width = job.plan.model.image_shape
    count = study.images.count * len(jobs)
    return {
        "name": job.plan.experiment.name,
        "fingerprint": job.plan.fingerprint if job.plan.identity else None,
        "control": job.plan.experiment.control,
        "judge_of": job.plan.experiment.judge_of,
        "lacks": [lack.model_dump() for lack in job.plan.experiment.lacks],
        "parts": [part.name for part in job.plan.parts()],
        "artifacts": _artifacts(job, run),
        "simulated": job.plan.simulated,
        "callbacks": [callback.name for callback in job.plan.callbacks],
        "steps": len(job.plan.sampler.timesteps),
        "evaluations_full": full,
        "evaluations_cached": cached,
        "macs_per_image": macs,
        "bit_operations_per_image": bits,
        "weight_bytes": cost.weight_bytes,
        "images": count,
        "seeds": study.images.seeds,
        "missing": sum(len(part) for one in jobs for part in one.missing(size)),
        "disk_bytes": count * channels * height * width,
        "hours": None if macs is None else 2 * macs * count / (tflops * 1e12) / 3600,
        "not_counted": next((x.reason for x in (cost, expected) if isinstance(x, Uncounted)), None),
    }


def _row_as_text(row: dict[str, Any]) -> str:
    waiting = [artifact["part"] for artifact in row["artifacts"] if artifact["state"] == "missing"]
    calibration = f"; to calibrate: {', '.join(waiting)}" if waiting else ""
    lacks = "".join(f"\n    lacks {Lack(**lack)}" for lack in row["lacks"])
    evaluations = "evaluations not known"
    if row["evaluations_full"] is not None:
        cached = row["evaluations_cached"]
        evaluations = f"{row['evaluations_full']} full + {cached} cached evaluations"
    uncounted = f"\n    MACs not counted, {row['not_counted']}" if row["not_counted"] else ""
    return (
        f"{row['name']}: {row['steps']} steps, {evaluations}, "
        f"{quantity(row['macs_per_image'], 'MAC')} an image; {row['missing']} of {row['images']} "
        f"images{_seeds(row['seeds'])} missing, {quantity(row['disk_bytes'], 'B')} on disk, "
        f"{_hours(row['hours'])}{calibration}{_judge_of_as_text(row['judge_of'])}{lacks}"
        f"{uncounted}"
    )


def _seeds(seeds: Sequence[int] | None) -> str:
    return f" of {len(seeds)} seeds" if seeds else ""


def _judge_of_as_text(judge_of: Mapping[str, Relation]) -> str:
    """A line for each relation that a row has to others, with their names."""
    named: dict[str, list[str]] = {}
    for name, relation in judge_of.items():
        named.setdefault(f"{ROLES[relation]} of", []).append(name)
    return "".join(f"\n    {words} {', '.join(names)}" for words, names in named.items())


def _total_as_text(rows: Sequence[dict[str, Any]], tflops: float) -> str:
    """The sum over rows; hours are of multiply-accumulates alone, two operations each."""
    disk, hours = sum(row["disk_bytes"] for row in rows), sum(row["hours"] or 0 for row in rows)
    uncounted = "".join(f", nor {row['name']}" for row in rows if row["hours"] is None)
    return (
        f"In all {len(rows)} rows, {quantity(disk, 'B')} on disk, {_hours(hours)} of one process: "
        f"estimated from the U-Net's multiply-accumulates at {tflops:g} TFLOP/s (about "
        "15 on an A100, 0.1 on a thread of a CPU; say what yours has with --tflops); calibration, "
        f"decoding, scoring and the extra work of simulated bits are not in it{uncounted}"
    )


def _hours(hours: float | None) -> str:
    if hours is None:
        return "hours not known"
    return f"{hours:.1f} hours" if hours >= 0.1 else f"{3600 * hours:.0f} seconds"


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
    """A default as a JSON value; options in options stand for their own defaults."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
