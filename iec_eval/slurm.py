"""Submits a study as chained SLURM jobs: calibrate, then generate, then evaluate.

The jobs run the scripts of the folder ``slurm/`` as they are. Only sbatch's options, which override
the scripts' own, and the arguments after the script's name, which it hands on to iec-eval, differ
between launches. A job follows the one before it however that ended (``afterany``): rows that
failed must not keep the others from being generated and scored, and the table says what is
missing. Such a dependency can always be met, so no job is left in the queue for ever.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from iec_eval.errors import ConfigError, CorruptFile, SchedulerError, StorageError
from iec_eval.options import first_problem
from iec_eval.runs import RunFolder
from iec_eval.scheduler import Task, sbatch, scancel, squeue
from iec_eval.storage import write_json, write_text
from iec_eval.study import ExecutionSpec, Study

PACKAGED = Path(__file__).parent / "slurm_scripts"
CHECKOUT = Path(__file__).parents[1] / "slurm"
SCRIPTS = ("calibrate", "generate-array", "generate-nodes", "evaluate")
NOT_PASSED_THROUGH = {
    "--array": "give it before the --, it is for the generate job only",
    "--nodes": "give it before the --, it is for the generate job only",
    "--chdir": "the study's relative paths are relative to where the launch is submitted",
    "--export": "set the variables where the launch is submitted, the jobs inherit them",
    "--test-only": "use --dry-run",
    "--wrap": "the jobs are scripts, use --scripts for others",
}
ABBREVIATED = len("--ar")  # sbatch takes the start of a name that no other option shares
SHORT = {"-a": "--array", "-N": "--nodes", "-D": "--chdir"}


@dataclass(frozen=True)
class Options:
    """How a launch is submitted; ``extra`` are options of sbatch for all of its jobs.

    Raises ConfigError for options that exclude each other.
    """

    array: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()
    scripts: Path | None = None
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.array is not None and self.nodes is not None:
            raise ConfigError(
                "--array and --nodes exclude each other: an array is single tasks, --nodes one "
                "job of many; leave one out"
            )
        if self.extra and not self.extra[0].startswith("-"):
            raise ConfigError(f"{self.extra[0]!r} is no option of sbatch; those follow after --")
        for word in self.extra:
            name = _refused(word)
            if name is not None:
                raise ConfigError(
                    f"{word}: cannot be passed through to sbatch: {NOT_PASSED_THROUGH[name]}"
                )

    def shared(self) -> list[str]:
        """sbatch's options for all jobs."""
        given = {"partition": self.partition, "time": self.time, "account": self.account}
        named = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [*named, *self.extra]

    def record(self) -> dict[str, Any]:
        """As JSON values, what was not given left out."""
        plain = asdict(self) | {"scripts": str(self.scripts) if self.scripts else None}
        return {key: value for key, value in plain.items() if value}


def _refused(word: str) -> str | None:
    """Which option that is not passed through ``word`` gives: in full, short or abbreviated."""
    name = SHORT.get(word[:2], word.partition("=")[0])
    if len(name) < ABBREVIATED or not name.startswith("--"):
        return None
    return next((option for option in NOT_PASSED_THROUGH if option.startswith(name)), None)


@dataclass(frozen=True)
class Missing:
    """What a study lacks: artifacts of calibrations, and chunks of images."""

    artifacts: int
    chunks: int


@dataclass(frozen=True)
class JobRequest:
    """One job to submit: which verb of iec-eval, which script, its own options of sbatch.

    ``tasks`` is the number of its processes, None if only the script says it.
    """

    kind: str
    script: str
    options: tuple[str, ...]
    tasks: int | None
    log: str = "%x-%j.out"


@dataclass(frozen=True)
class Launch:
    """One launch: where its study and its logs are, what it submits."""

    id: str
    out: Path
    options: Options
    jobs: list[JobRequest]

    @property
    def folder(self) -> Path:
        """For the study as it was submitted, and the logs."""
        return self.out / "slurm"

    @property
    def study(self) -> Path:
        return self.folder / f"{self.id}.yaml"

    def command(self, job: JobRequest, after: str | None) -> list[str]:
        """The command line of ``job``, to start when the job with the id ``after`` has ended."""
        logs = str(self.folder).replace("%", "%%")
        words = ["sbatch", "--parsable", f"--export=ALL,IEC_EVAL_LAUNCH={self.id}"]
        words += [f"--output={logs}/{job.log}", *job.options, *self.options.shared()]
        # after the user's own options: the first job may have to wait for one of theirs
        words += [f"--dependency=afterany:{after}"] if after else []
        script = scripts_folder(self.options.scripts) / f"{job.script}.sbatch"
        return [*words, str(script), str(self.study), "-o", str(self.out)]


def launch(study: Study, out: Path, missing: Missing, options: Options) -> str:
    """Submit what is missing as a chain of jobs; says what was done, or would be with a dry run.

    Raises SchedulerError if jobs of an earlier launch are still there or SLURM refuses a job; none
    of this launch is in the queue then.
    """
    made = Launch(new_id(), out, options, requests(missing, options, study.execution))
    if options.dry_run:
        return "\n".join(shlex.join(command) for command in _preview(made))
    with RunFolder(out).claims() as claims:
        if not claims.take("submission"):
            raise SchedulerError(
                f"another process is submitting jobs for {out} at this moment; nothing was "
                f"submitted, see iec-eval status {shlex.quote(str(out))}"
            )
        if not options.force:
            _refuse_while_queued(out)
        content = study.model_copy(update={"execution": _of_a_job(study, options)}).model_dump(
            mode="json", exclude_defaults=True
        )
        write_text(made.study, yaml.safe_dump(content, sort_keys=False))
        return _as_text(made, _submit(made))


def _of_a_job(study: Study, options: Options) -> ExecutionSpec:
    """The study's settings within one job: what there is of nodes and GPUs is sbatch's affair.

    A job of one task, such as the last one, could start processes neither on several nodes nor on
    GPUs that it has not got.
    """
    own = {"devices": "auto"} if options.gpus_per_node else {}
    return study.execution.model_copy(update={"num_nodes": 1, **own})


def requests(missing: Missing, options: Options, execution: ExecutionSpec) -> list[JobRequest]:
    """The jobs of a chain, in order."""
    alone = ("--gpus-per-node=1",) if options.gpus_per_node else ()
    jobs = [JobRequest("evaluate", "evaluate", alone, 1)]
    if missing.chunks:
        jobs.insert(0, _generate(missing, options, execution))
    if missing.artifacts:
        jobs.insert(0, JobRequest("calibrate", "calibrate", alone, 1))
    return jobs


def _generate(missing: Missing, options: Options, execution: ExecutionSpec) -> JobRequest:
    """One process for each GPU, else as many a node as the study says, else as the script says."""
    devices = execution.devices if isinstance(execution.devices, int) else None
    each = options.gpus_per_node or devices
    own = [f"--ntasks-per-node={each}"] if each else []
    own += [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    if options.nodes:
        own.insert(0, f"--nodes={options.nodes}")
        tasks = options.nodes * each if each else None
        return JobRequest("generate", "generate-nodes", tuple(own), tasks)
    size = min(options.array or 1, missing.chunks)
    own.insert(0, f"--array=0-{size - 1}")
    return JobRequest("generate", "generate-array", tuple(own), size, "%x-%A_%a.out")


def scripts_folder(given: Path | None) -> Path:
    """Where the scripts are: as given, in the package, or beside it in a checkout.

    Raises ConfigError if one of them is not there.
    """
    folder = given or (PACKAGED if PACKAGED.is_dir() else CHECKOUT)
    lacking = [f"{name}.sbatch" for name in SCRIPTS if not (folder / f"{name}.sbatch").is_file()]
    if lacking:
        raise ConfigError(
            f"SLURM scripts: no {', '.join(lacking)} in {folder}; with --scripts DIR, DIR holds "
            "all four"
        )
    return folder


def new_id() -> str:
    """A name for a launch: its time (UTC), so that names sort, and a random part."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def _preview(made: Launch) -> list[list[str]]:
    """The command lines; an id that only sbatch could give is the job's kind in capitals."""
    before: list[str | None] = [None, *(f"{job.kind.upper()}_ID" for job in made.jobs)]
    return [made.command(job, after) for job, after in zip(made.jobs, before, strict=False)]


def _submit(made: Launch) -> list[str]:
    """Submit the jobs one after the other; their ids. Should one be refused, none stays."""
    ids: list[str] = []
    try:
        for job in made.jobs:
            ids.append(sbatch(made.command(job, ids[-1] if ids else None), job.kind))
            _record(made, ids)
    except BaseException as error:  # an interrupted chain must not run without its end
        _withdraw(made, ids, error)
        raise
    return ids


def _withdraw(made: Launch, ids: Sequence[str], error: BaseException) -> None:
    """Cancel what was submitted; ``error`` tells. What cannot be cancelled stays on record."""
    if not ids:
        made.study.unlink(missing_ok=True)
        return
    try:
        scancel(ids)
        ending = "were cancelled"
        with suppress(StorageError):  # which is why it failed, perhaps
            _record(made, [])
    except SchedulerError as failure:
        ending = f"are still there: {failure}"
    error.args = (f"{error}; the jobs submitted before it ({', '.join(ids)}) {ending}",)


# --- what was submitted -------------------------------------------------------------------------


def read_launches(out: Path) -> list[dict[str, Any]]:
    """Every launch on record, oldest first: id, when, options, jobs (each id, kind, tasks).

    Raises CorruptFile if the record cannot be read.
    """
    path = out / "slurm" / "launches.json"
    try:
        launches: list[dict[str, Any]] = json.loads(path.read_text())
        _LAUNCHES.validate_python(launches)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise CorruptFile(
            f"{path}: cannot be read ({first_problem(error)}); remove it once none of its jobs is "
            "in the queue"
        ) from None
    return launches


class _RecordedJob(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str = Field(pattern="^[0-9]+$")
    kind: str


class _RecordedLaunch(BaseModel):
    """What an entry of ``launches.json`` must hold."""

    model_config = ConfigDict(strict=True)
    id: str
    jobs: list[_RecordedJob]


_LAUNCHES = TypeAdapter(list[_RecordedLaunch])


def recorded_jobs(launches: Sequence[dict[str, Any]]) -> list[str]:
    """Ids of all jobs of the launches."""
    return [job["id"] for launch in launches for job in launch["jobs"]]


def _record(made: Launch, ids: Sequence[str]) -> None:
    """Put the launch on record with the jobs it has so far; off the record if it has none."""
    kept = [launch for launch in read_launches(made.out) if launch["id"] != made.id]
    jobs = [
        {"id": job, "kind": request.kind, "tasks": request.tasks}
        for job, request in zip(ids, made.jobs, strict=False)
    ]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"id": made.id, "when": when, "options": made.options.record(), "jobs": jobs}
    write_json(made.folder / "launches.json", [*kept, *([entry] if jobs else [])])


def _refuse_while_queued(out: Path) -> None:
    jobs = recorded_jobs(read_launches(out))
    if not jobs:
        return
    try:
        queued = [task for task in squeue(jobs) if not task.ended]
    except SchedulerError as error:
        raise SchedulerError(
            f"{error}; jobs {', '.join(jobs)} of an earlier launch into {out} may still be there; "
            "nothing was submitted, --force submits all the same"
        ) from None
    if queued:
        raise SchedulerError(
            f"an earlier launch into {out} is still in the queue: {_listed(queued)}; nothing was "
            "submitted. Wait for it, cancel it, or submit more with --force"
        )


def _listed(tasks: Sequence[Task]) -> str:
    """At most ten tasks with their states."""
    shown = ", ".join(f"{task.name} {task.state}" for task in tasks[:10])
    return f"{shown} and {len(tasks) - 10} more" if len(tasks) > 10 else shown


def _as_text(made: Launch, ids: Sequence[str]) -> str:
    lines = [f"Submitted launch {made.id}:"]
    after = ""
    for job, request in zip(ids, made.jobs, strict=True):
        lines.append(f"  {request.kind:<9} job {job}{_size(request)}{after}")
        after = f", after {job}"
    return "\n".join(
        [
            *lines,
            f"Follow it with:  iec-eval status {shlex.quote(str(made.out))}",
            f"                 squeue --jobs={','.join(ids)}",
            f"Its logs are in  {made.folder}",
            f"Cancel it with:  scancel {' '.join(ids)}",
        ]
    )


def _size(request: JobRequest) -> str:
    many = request.tasks is not None and request.tasks > 1
    return f", {request.tasks} tasks" if many else ""
