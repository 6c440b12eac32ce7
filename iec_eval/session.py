"""A study with everything checked and built but the weights, and its run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from iec_eval import inspection, processes, status
from iec_eval import study as studies
from iec_eval.controls import plan_with_controls
from iec_eval.errors import Incompatible
from iec_eval.evaluation import networks, protocol
from iec_eval.jobs import Job, by_row
from iec_eval.metrics.base import Metric
from iec_eval.planning import fingerprint_in_results, plans_of_seeds
from iec_eval.plugins import Registry, load_registry
from iec_eval.results import Results, differing
from iec_eval.runs import RunFolder
from iec_eval.storage import write_json, write_text
from iec_eval.study import Study
from iec_eval.study_plans import plan_metrics


@dataclass(frozen=True)
class Session:
    """A study with everything checked and built but the weights.

    ``jobs`` are those of each row in turn, one for each seed. ``launch`` is what all processes
    that work on it together share.
    """

    study: Study
    registry: Registry
    run: RunFolder
    jobs: list[Job]
    metrics: list[Metric]
    launch: str

    @property
    def rows(self) -> list[list[Job]]:
        """The jobs of each row, one for each seed."""
        return by_row(self.jobs)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each row, by name, the fingerprint that it has in results."""
        of_rows = [[job.plan for job in jobs] for jobs in self.rows]
        return {plans[0].experiment.name: fingerprint_in_results(plans) for plans in of_rows}

    def what_differs(self, results: Results) -> str:
        """In what results are not of this study, or nothing.

        Numbers of one configuration must not stand under another.
        """
        scored = {row.name: row.fingerprint for row in results.variants}
        wanted = self.fingerprints
        changed = [name for name in wanted if scored.get(name, wanted[name]) != wanted[name]]
        rows = {
            "made otherwise": changed,
            "not scored": [name for name in wanted if name not in scored],
            "scored, but not in it": [name for name in scored if name not in wanted],
        }
        told = [f"{what}: {_some(names)}" for what, names in rows.items() if names]
        if any(
            job.plan.depends_on_batch for job in self.firsts if job.plan.experiment.name in changed
        ):
            told.append("batch_size and chunk_size decide some of their images")
        count = self.study.images.count
        if results.images != count:
            told.append(f"{results.images:,} images a row instead of {count:,}")
        now = json.loads(json.dumps(protocol(self.metrics)))  # as it is read
        keys = differing(results.protocol, now)
        told += [f"{key} was {there}, is {here}" for key, (there, here) in keys.items()]
        return "; ".join(told)

    @property
    def firsts(self) -> list[Job]:
        """Of each row the job of its first seed, for what does not differ between seeds."""
        return [jobs[0] for jobs in self.rows]


def prepare(
    source: str, overrides: Sequence[str], out: Path | None, lacking: list[str] | None = None
) -> Session:
    """Read a study and check all of it: names, options, files, numbers.

    With a list ``lacking``, files that are not there are noted in it; the study can be shown.

    Raises ConfigError and its kin for anything wrong, before anything expensive.
    """
    study = studies.load(source, overrides)
    _compute_exactly()
    registry = load_registry()
    _tell_broken(registry)
    plans = plan_with_controls(study, registry, lacking)
    of_seeds = [one for plan in plans for one in plans_of_seeds(plan, registry)]
    metrics = plan_metrics(study, registry, plans, lacking)
    run = RunFolder(out if out is not None else Path("runs") / study.study)
    run.check()
    keep = study.execution.keep_images
    wanted = [] if lacking else networks(metrics)  # which must have their weights
    readers = [metric.name for metric in metrics if metric.network is None]
    if readers and not keep:
        raise Incompatible(
            f"execution.keep_images: false deletes images once their features are there, but "
            f"{', '.join(readers)} reads images; keep them or leave the metric out"
        )
    folders = [run.variant(plan.experiment.name, plan.fingerprint) for plan in of_seeds]
    jobs = [
        Job(plan, folder, wanted, keep, bool(readers))
        for plan, folder in zip(of_seeds, folders, strict=True)
    ]
    return Session(study, registry, run, jobs, metrics, processes.launch_id())


def _compute_exactly() -> None:
    """Single precision is single precision: an image must not depend on which GPU makes it."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def open_run(session: Session, *, retry: bool = True) -> None:
    """Make the run folder ready to be written to; one process of a job does it.

    With ``retry`` the failures of earlier launches are forgotten.
    """
    session.run.open()
    if not processes.leads():
        return
    resolved = session.study.model_dump(mode="json", exclude_defaults=True)
    write_text(session.run.path / "study.yaml", yaml.safe_dump(resolved, sort_keys=False))
    list_rows(session)
    session.run.tidy()
    with session.run.claims(session.study.execution.claim_timeout, session.launch) as claims:
        claims.tidy()
    for row in (job.plan.experiment for job in session.firsts):
        for lack in row.lacks:
            print(f"iec-eval: {row.name} lacks {lack}", file=sys.stderr)
    for job in session.jobs:
        if retry:
            job.folder.forget_failure(session.launch)
        job.folder.tidy()
        for complaint in job.folder.set_aside_corrupt():
            print(f"iec-eval: {complaint}", file=sys.stderr)
        job.drop_read()


def list_rows(session: Session) -> None:
    """For ``status``: what rows there are."""
    rows = inspection.rows_listing(session.jobs, session.study, session.run)
    write_json(session.run.path / status.ROWS, rows)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _tell_broken(registry: Registry) -> None:
    for found in registry.distributions:
        if found.error is not None:
            print(
                f"iec-eval: plugin {found.distribution} is broken and was not loaded; see "
                "iec-eval plugins",
                file=sys.stderr,
            )
