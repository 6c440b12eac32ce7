"""How far a run is, told by its files alone: no study, no model is read, nothing is changed.

``rows.json``, which every start writes, says what rows there are. Chunks, claims and errors say
what is done, who makes what and what failed; what finished chunks cost says how long the rest
takes; SLURM, if it can be asked, says what its jobs do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from iec_eval.claims import Held
from iec_eval.errors import ConfigError, CorruptFile, IecEvalError, SchedulerError
from iec_eval.options import first_problem
from iec_eval.processes import Owner
from iec_eval.results import read_results
from iec_eval.runs import (
    IndexRange,
    RunFolder,
    VariantFolder,
    calibration_claim,
    finished_ranges,
    missing_ranges,
)
from iec_eval.scheduler import Task, squeue
from iec_eval.slurm import read_launches, recorded_jobs

ROWS = "rows.json"
SCHEMA = 1
MOST_NAMED = 5  # rows whose speed is not known
MEASURED = 20  # files of a row that its speed is taken from, the newest

State = Literal["done", "running", "failed", "missing"]
ResultsState = Literal["missing", "outdated", "unreadable", "current"]


@dataclass(frozen=True)
class Worker:
    """A process and what it makes at this moment; ``job`` is SLURM's id, None outside of SLURM."""

    work: str
    host: str
    pid: int
    job: str | None
    seconds_silent: float


@dataclass(frozen=True)
class RowStatus:
    """What there is of a row.

    Attributes:
        images_done: finished ones, those in unfinished chunks included.
        chunks_missing: files that are not whole yet.
        calibration_missing: names of the parts that are not calibrated.
        workers: who makes something of it.
        error: why it failed, in one line.
        seconds_per_image: of one process; None if it is not known.
        measured: whether that is of this row's own images, or from other rows' by the
            multiply-accumulates of an image.
    """

    name: str
    state: State
    images: int
    images_done: int
    chunks_missing: int
    calibration_missing: list[str]
    workers: list[Worker]
    error: str | None
    seconds_per_image: float | None = None
    measured: bool = False

    @property
    def remaining_seconds(self) -> float | None:
        """Of one process, for images alone; None if it is not known."""
        left = self.images - self.images_done
        if left == 0:
            return 0.0
        return None if self.seconds_per_image is None else left * self.seconds_per_image


@dataclass(frozen=True)
class JobStatus:
    """A submitted job; ``tasks`` is what SLURM still knows of it, None if it cannot be asked."""

    id: str
    kind: str
    launch: str
    tasks: list[Task] | None

    @property
    def ended(self) -> bool:
        """Whether SLURM says, or no longer knows, that nothing more comes of it."""
        return self.tasks is not None and all(task.ended for task in self.tasks)


@dataclass(frozen=True)
class RunStatus:
    """All of a run: its rows, its jobs, and whether ``results.json`` tells of all its images."""

    out: Path
    study: str
    images: int
    rows: list[RowStatus]
    jobs: list[JobStatus]
    silence: str | None
    results: ResultsState

    @property
    def workers(self) -> int:
        """Processes that make something at this moment."""
        return len({(worker.host, worker.pid) for row in self.rows for worker in row.workers})

    @property
    def remaining_seconds(self) -> float | None:
        """Of all images that are missing, on the processes at work, or on one if there is none."""
        each = [row.remaining_seconds for row in self.rows]
        known = [seconds for seconds in each if seconds is not None]
        return sum(known) / max(self.workers, 1) if len(known) == len(each) else None


def report(out: Path, *, as_json: bool) -> str:
    """What is done, running, missing and failed in a run folder, as text or one JSON value.

    Raises ConfigError for a folder that is no run, CorruptFile for one whose lists are damaged.
    """
    found = look(out)
    return json.dumps(_plain(found), indent=2) if as_json else "\n".join(_lines(found))


def look(out: Path) -> RunStatus:
    """What is done, running, missing and failed in a run folder; raises as :func:`report`."""
    listing = read_rows(out)
    launches = read_launches(out)
    held = RunFolder(out).claims(listing["claim_timeout"]).held()
    tasks, silence = _ask(launches, held)
    names = {task.number: task.name for task in tasks or ()}
    measured = [_measure(VariantFolder(out / row["folder"])) for row in listing["rows"]]
    rows = [_row(out, listing, row, held, names) for row in listing["rows"]]
    jobs = [
        JobStatus(job["id"], job["kind"], launch["id"], _of(job["id"], tasks))
        for launch in launches
        for job in launch["jobs"]
    ]
    newest = max((speed.newest for speed in measured), default=0.0)
    return RunStatus(
        out=out,
        study=listing["study"],
        images=listing["images"],
        rows=_with_speeds(rows, listing["rows"], measured),
        jobs=jobs,
        silence=silence,
        results=_results(out, newest),
    )


def read_rows(out: Path) -> dict[str, Any]:
    """The content of ``rows.json``; raises ConfigError if there is none, CorruptFile if damaged."""
    path = out / ROWS
    try:
        listing: dict[str, Any] = json.loads(path.read_text())
        schema = listing["schema"]
        if schema == SCHEMA:
            _Listing.model_validate(listing)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{out}: no run there ({ROWS} is missing); wanted the folder of a run that has been "
            "started, by iec-eval launch, generate or calibrate"
        ) from None
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError) as error:
        problem = first_problem(error)
        raise CorruptFile(f"{path}: cannot be read ({problem}); start the study again") from None
    if schema != SCHEMA:
        raise ConfigError(f"{path}: has schema {schema!r}, this version reads {SCHEMA}")
    return listing


class _Artifact(BaseModel):
    model_config = ConfigDict(strict=True)
    part: str
    key: str


class _ListedRow(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    folder: str
    macs_per_image: float | None
    artifacts: list[_Artifact]


class _Listing(BaseModel):
    """What ``rows.json`` must hold."""

    model_config = ConfigDict(strict=True)
    study: str
    images: PositiveInt
    chunk_size: PositiveInt
    claim_timeout: float
    stand_ins: list[str] | None = None
    rows: list[_ListedRow]


# --- rows ---------------------------------------------------------------------------------------


def _finished(folder: VariantFolder, listing: Mapping[str, Any]) -> list[IndexRange]:
    """Ranges of which the study wants nothing more."""
    stand_ins = listing.get("stand_ins")
    if stand_ins is None:  # a file from before it was there: nobody knows what the study reads
        return folder.ever_finished()
    return folder.finished_or_scored(stand_ins)


def _row(
    out: Path,
    listing: Mapping[str, Any],
    row: Mapping[str, Any],
    held: Mapping[str, Held],
    names: Mapping[str, str],
) -> RowStatus:
    folder, count = VariantFolder(out / row["folder"]), int(listing["images"])
    missing = missing_ranges(_finished(folder, listing), count, int(listing["chunk_size"]))
    artifacts = out / "artifacts"  # whether they are whole is not looked at: that takes reading
    waiting = [
        one
        for one in row["artifacts"]
        if _written(artifacts / f"{one['key'][:32]}.safetensors") is None
    ]
    workers = _workers(row["folder"], waiting, held, names)
    lacking = sum(len(part) for part in missing) - _in_parts(folder, missing)
    error = folder.failure()
    state: State = "missing" if missing else "done"
    if missing and workers:
        state = "running"  # others may go on with what one process failed with
    elif error is not None:
        state = "failed"
    return RowStatus(
        name=row["name"],
        state=state,
        images=count,
        images_done=count - lacking,
        chunks_missing=len(missing),
        calibration_missing=[one["part"] for one in waiting] if missing else [],
        workers=workers,
        error=error,
    )


def _in_parts(folder: VariantFolder, missing: Iterable[IndexRange]) -> int:
    """Images of missing chunks that are kept already."""
    parts = finished_ranges(folder.parts)
    return len({i for chunk in missing for part in parts if part in chunk for i in part.indices})


def _workers(
    folder: str,
    waiting: Sequence[Mapping[str, str]],
    held: Mapping[str, Held],
    names: Mapping[str, str],
) -> list[Worker]:
    """Who holds a claim on images or features of a row, or on a calibration it waits for."""
    found = dict[str, Held]()
    for one in reversed(waiting):  # a process claims a whole chain, and is at its first
        claim = held.get(calibration_claim(one["key"]))
        if claim is not None and claim.owner is not None:
            found = {w: c for w, c in found.items() if c.owner != claim.owner}
            found[f"calibration of {one['part']}"] = claim
    for name, claim in held.items():
        if name.startswith(f"{folder}."):
            found[name.removeprefix(f"{folder}.").replace(".", " ")] = claim
    return [
        _worker(work, claim.owner, claim.age, names) for work, claim in found.items() if claim.owner
    ]


def _worker(work: str, owner: Owner, age: float, names: Mapping[str, str]) -> Worker:
    return Worker(work, owner.host, owner.pid, names.get(owner.job or "", owner.job), age)


# --- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Of a row's newest chunks: images and seconds of one process; when the last was written."""

    images: int = 0
    seconds: float = 0.0
    newest: float = 0.0


def _measure(folder: VariantFolder) -> Speed:
    files = [
        (written, part)
        for part in folder.ever_finished()
        for path in (
            folder.chunks / f"{part.stem}.safetensors",
            folder.dropped / f"{part.stem}.json",
        )
        if (written := _written(path)) is not None
    ]
    images, seconds = 0, 0.0
    newest = sorted(files, reverse=True)
    for _, part in newest[:MEASURED]:
        with suppress(CorruptFile):  # whoever needs the chunk itself makes it again
            seconds += folder.recorded_spent(part).seconds
            images += len(part)
    return Speed(images, seconds, newest[0][0] if newest else 0.0)


def _written(path: Path) -> float | None:
    """When a file was written; None if it is not there, or where this user may not look."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _with_speeds(
    rows: Sequence[RowStatus], listed: Sequence[Mapping[str, Any]], measured: Sequence[Speed]
) -> list[RowStatus]:
    """The rows with their seconds per image; one without a measurement takes the others' mean."""
    pairs = list(zip((row["macs_per_image"] for row in listed), measured, strict=True))
    work = sum(macs * speed.images for macs, speed in pairs if macs)
    spent = sum(speed.seconds for macs, speed in pairs if macs)
    made = []
    for row, (macs, speed) in zip(rows, pairs, strict=True):
        own = speed.seconds / speed.images if speed.images else None
        other = macs * spent / work if macs and work else None
        seconds = other if own is None else own
        changes = {"seconds_per_image": seconds, "measured": own is not None}
        made.append(RowStatus(**{**vars(row), **changes}))
    return made


def _results(out: Path, newest: float) -> ResultsState:
    written = _written(out / "results.json")
    if written is None:
        return "missing"
    if written < newest:
        return "outdated"
    try:
        read_results(out / "results.json")
    except IecEvalError:
        return "unreadable"
    return "current"


# --- jobs ---------------------------------------------------------------------------------------


def _ask(
    launches: Sequence[dict[str, Any]], held: Mapping[str, Held]
) -> tuple[list[Task] | None, str | None]:
    """What SLURM knows of the jobs on record and at work; None and why if it cannot be asked."""
    working = {claim.owner.job for claim in held.values() if claim.owner is not None}
    jobs = {*recorded_jobs(launches), *(job for job in working if job and job.isdecimal())}
    try:
        return squeue(jobs), None
    except SchedulerError as error:
        return None, str(error)


def _of(job: str, tasks: Sequence[Task] | None) -> list[Task] | None:
    return None if tasks is None else [task for task in tasks if task.job == job]


# --- words --------------------------------------------------------------------------------------


def _plain(found: RunStatus) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "out": str(found.out),
        "study": found.study,
        "images": found.images,
        "rows": [asdict(row) | {"remaining_seconds": row.remaining_seconds} for row in found.rows],
        "workers": found.workers,
        "remaining_seconds": found.remaining_seconds,
        "jobs": [asdict(job) for job in found.jobs],
        "jobs_unknown": found.silence,
        "results": found.results,
    }


def _lines(found: RunStatus) -> Iterable[str]:
    yield f"{found.study}: {len(found.rows)} rows of {found.images} images in {found.out}"
    for row in found.rows:
        yield _row_as_text(row)
        yield from (_worker_as_text(worker) for worker in row.workers)
    last = found.jobs[-1].launch if found.jobs else None
    for job in found.jobs:
        if job.launch == last or (job.tasks and not job.ended):
            yield _job_as_text(job)
    if found.silence is not None:
        yield f"The states of the jobs are unknown: {found.silence}"
    yield _rest_as_text(found)
    yield RESULTS[found.results]


RESULTS = {
    "missing": "results.json: not there yet",
    "outdated": "results.json: older than the newest images, evaluate again",
    "unreadable": "results.json: cannot be read, evaluate again",
    "current": "results.json: there, of all the images that there are",
}


def _row_as_text(row: RowStatus) -> str:
    words = [f"{row.name}: {row.state}, {row.images_done} of {row.images} images"]
    if row.chunks_missing:
        words.append(f"{row.chunks_missing} chunks missing")
    if row.calibration_missing:
        words.append(f"to calibrate: {', '.join(row.calibration_missing)}")
    if row.seconds_per_image is not None:
        guess = "" if row.measured else ", estimated from other rows"
        words.append(f"{row.seconds_per_image:.3g} s an image{guess}")
    return "; ".join(words) + (f"; {row.error}" if row.error else "")


def _worker_as_text(worker: Worker) -> str:
    job = "" if worker.job is None else f", job {worker.job}"
    silent = f"{worker.seconds_silent:.0f} s ago"
    return f"    {worker.work}: {worker.host}, process {worker.pid}{job}, sign of life {silent}"


def _job_as_text(job: JobStatus) -> str:
    head = f"{job.kind} job {job.id}"
    if job.tasks is None:
        return f"{head}: state unknown"
    if not job.tasks:
        return f"{head}: no longer in the queue"
    states = Counter(f"{t.state} ({t.reason})" if _telling(t) else t.state for t in job.tasks)
    many = len(job.tasks) > 1
    return f"{head}: " + ", ".join(f"{n} {s}" if many else s for s, n in states.items())


def _telling(task: Task) -> bool:
    return task.state not in ("RUNNING", "COMPLETED") and task.reason not in ("", "None")


def _rest_as_text(found: RunStatus) -> str:
    if all(row.images_done == row.images for row in found.rows):
        return "No images are missing"
    workers = found.workers
    who = f"on the {workers} processes at work" if workers > 1 else "on one process"
    who = who if workers else "on one process, but none is at work"
    if found.remaining_seconds is None:
        unknown = [row.name for row in found.rows if row.remaining_seconds is None]
        named = ", ".join(unknown) if len(unknown) <= MOST_NAMED else f"{len(unknown)} rows"
        return f"Time left is unknown: nothing is measured yet of {named}"
    return f"About {_duration(found.remaining_seconds)} left for images, {who}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
