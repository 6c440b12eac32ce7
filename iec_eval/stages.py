"""The stages of a run: calibrate, make images and features, score, report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import torch

from iec_eval import processes, provenance, ranks
from iec_eval.analysis.run import analyzed_folders
from iec_eval.assembly import calibrate as calibrate_plan
from iec_eval.assembly import missing_artifacts
from iec_eval.comparisons import with_comparisons
from iec_eval.cost import EvaluationCost, Uncounted, evaluation_costs
from iec_eval.errors import CorruptChunk, CorruptFile, MissingArtifact, StorageError
from iec_eval.evaluation import Scored, groups, over_seeds, protocol
from iec_eval.evaluation import score as score_row
from iec_eval.generation import generate, record_failure, use_all_threads
from iec_eval.influence import write_estimates
from iec_eval.intervals import Estimate, Estimates
from iec_eval.jobs import SHOWN, Job
from iec_eval.progress import Progress
from iec_eval.report.page import write_report
from iec_eval.results import Results, with_deltas, with_relative_costs, write_results
from iec_eval.runs import INFLUENCE, calibration_claim, covering
from iec_eval.session import Session, open_run
from iec_eval.storage import write_json
from iec_eval.study import full_precision
from iec_eval.work import Share, something_to_do, waiting

HEALINGS = 3  # rounds of making again what was found damaged while it was scored


def calibrate(session: Session, jobs: Sequence[Job]) -> None:
    """Calibrate what is not yet; a variant whose calibration fails is recorded and left out."""
    execution = session.study.execution
    use_all_threads(execution)
    device = ranks.first_device(execution)
    progress = Progress("steps")
    for job in jobs:
        missing = missing_artifacts(job.plan, session.run)
        if not missing:
            continue
        claims = session.run.claims(execution.claim_timeout, session.launch)
        with ExitStack() as held:
            held.enter_context(claims)
            # all of them, in the order of the chain: two rows share a beginning or nothing, so
            # nobody waits in a circle, and whoever comes when half is done waits for the rest
            for key in missing:
                held.enter_context(waiting(claims, calibration_claim(key)))
            _calibrate_job(session, job, device, progress)


def _calibrate_job(session: Session, job: Job, device: torch.device, progress: Progress) -> None:
    if job.folder.failure(session.launch) or not missing_artifacts(job.plan, session.run):
        return  # another process has tried or done it meanwhile
    try:
        calibrate_plan(job.plan, session.run, device=device, progress=progress)
    except (StorageError, CorruptFile):
        raise  # all variants share disk and weights
    except Exception as error:  # one variant's failure must not stop the others
        record_failure(job.folder, error, session.launch)
    finally:
        progress.close()


def make(session: Session, share: Share, *, alone: bool = False) -> None:
    """Make missing files, on all processes or, if ``alone``, on this one."""
    if not alone:
        open_run(session, retry=share.images)
    execution = session.study.execution
    several = (processes.count() > 1 or execution.num_nodes > 1) and not alone
    # several processes must all go on: those that have begun wait for the others
    if not several and not something_to_do(session.jobs, execution.chunk_size, share):
        return
    if share.images and share.shard == (0, 1) and not several:
        unfinished = [job for job in session.jobs if job.missing(execution.chunk_size)]
        calibrate(session, unfinished)
    progress = Progress("images and features" if share.features else "images")
    claims = session.run.claims(execution.claim_timeout, session.launch)
    try:
        generate(
            session.jobs,
            execution,
            session.run,
            claims,
            progress=progress,
            share=share,
            alone=alone,
        )
    finally:
        progress.close()


def score(session: Session, *, heal: bool) -> Results:
    """Score every variant; what is found damaged is made again if ``heal``, and else missing."""
    there = _missing(session)
    results, estimates = _scored(session)
    for _ in range(HEALINGS if heal else 1):
        if _missing(session) == there:
            break
        if heal:
            make(session, Share(), alone=True)
        results, estimates = _scored(session)  # a row that was scored before is not whole now
    write_estimates(session.run.path, results, estimates)
    write_results(session.run.path / "results.json", results)
    return results


def _missing(session: Session) -> int:
    """Images that are missing in rows that have not failed."""
    healthy = [job for job in session.jobs if job.folder.failure() is None]
    size = session.study.execution.chunk_size
    return sum(len(part) for job in healthy for part in job.missing(size))


def _check_shown(session: Session) -> None:
    """Read the gallery's images, so that damage is known before anything is reported.

    Scores come from features, which would hide it. Other images are checked when they are read.
    """
    for job in session.jobs:
        for part in job.folder.finished():
            if part.start < SHOWN:
                try:
                    job.folder.read_chunk(part)
                except CorruptChunk as error:
                    processes.say(str(error))


def _scored(session: Session) -> tuple[Results, Estimates]:
    _check_shown(session)
    for job in session.jobs:
        # somebody may have done since what failed once; only then is everything looked for
        if job.folder.failure() is not None and job.whole():
            job.folder.forget_failure()
    progress = Progress("features")
    progress.start(len(session.jobs) * session.study.images.count * groups(session.metrics))
    costs = evaluation_costs([job.plan for job in session.firsts])
    bases = _full_precision_jobs(session)
    rows, directions = [], dict[str, bool]()
    estimates, apart = dict[str, Mapping[str, Estimate]](), dict[str, frozenset[str]]()
    for jobs, cost in zip(session.rows, costs, strict=True):
        scored = _scored_row(session, jobs, bases, cost, progress)
        name = scored.row.name
        rows.append(scored.row.model_copy(update=session.study.remarks(name)))
        estimates[name], apart[name] = scored.estimates, scored.apart
        directions |= scored.directions
    progress.close()
    results = Results(
        study=session.study.study,
        images=session.study.images.count,
        seeds=session.study.images.seeds,
        protocol=protocol(session.metrics),
        directions=directions,
        controls=list(session.study.wanted_controls()),
        variants=rows,
    )
    results = with_deltas(with_relative_costs(results), apart=apart)
    compared = {
        row: {name: one for name, one in numbers.items() if name not in apart[row]}
        for row, numbers in estimates.items()
    }
    return with_comparisons(results, compared), estimates


def _full_precision_jobs(session: Session) -> list[Job]:
    """Those of the full-precision row, one for each seed; none without such a row."""
    base = full_precision(job.plan.experiment for job in session.firsts)
    return next((jobs for jobs in session.rows if jobs[0].plan.experiment is base), [])


def _scored_row(
    session: Session,
    jobs: Sequence[Job],
    bases: Sequence[Job],
    cost: EvaluationCost | Uncounted,
    progress: Progress,
) -> Scored:
    """A row, each seed against the full-precision row of the same seed."""
    scored = {}
    for job, of_base in zip_longest(jobs, bases):
        progress.describe(f"scoring {job.name}")
        scored[job.name] = score_row(job, session.metrics, cost, progress, of_base)
    return scored[jobs[0].name] if session.study.images.seeds is None else over_seeds(scored)


def report(session: Session, results: Results, *, scored: bool = False) -> list[Path]:
    """Write everything that shows the results; all files of the run's results.

    Where they have just been ``scored`` the manifest is new; else it stays that of who scored them,
    unless that one came no further than the results.
    """
    folder = session.run.path
    made = None if scored else provenance.recorded(folder / "manifest.json")
    fingerprints = {job.name: job.plan.fingerprint for job in session.jobs}
    if made is None or made.get("fingerprints") != fingerprints:
        made = provenance.manifest(
            session.study, session.jobs, results.protocol, session.registry.distributions
        )
        write_json(folder / "manifest.json", made)
    rows = [row for job in session.firsts if (row := _gallery_row(job)) is not None]
    paths = write_report(
        folder,
        results,
        rows,
        made,
        columns=SHOWN,
        current=analyzed_folders(session.firsts, session.run, session.registry),
        scored=scored,
    )
    influence = [file for file in [folder / INFLUENCE] if file.is_file()]
    return [folder / "results.json", *influence, *paths, folder / "manifest.json"]


def _gallery_row(job: Job) -> tuple[str, torch.Tensor] | None:
    try:
        parts = covering(job.folder.finished(), min(SHOWN, job.count))
        images = [job.folder.read_chunk(part).images[rows] for part, rows in parts]
    except MissingArtifact:
        return None
    except CorruptFile as error:
        print(f"iec-eval: {error}", file=sys.stderr)
        return None
    return job.plan.experiment.name, torch.cat(images)
