"""The three programs of SLURM that are used: sbatch, squeue and scancel.

They are run as processes, with lists of arguments; nothing of SLURM is imported, and nothing
happens where it is not installed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from iec_eval.errors import SchedulerError

TIMEOUT = 120  # seconds; SLURM's own programs give up sooner when the controller is silent
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REVOKED",
        "TIMEOUT",
    }
)
FIELDS = "%F|%i|%A|%T|%r"  # those of Task, in its order


@dataclass(frozen=True)
class Task:
    """A job, or one task of an array, as squeue lists it.

    Attributes:
        job: id of the job; of an array, that of all of it.
        name: id with the number of the task: ``12_3``; ``12`` where there is no array.
        number: what the task itself finds in SLURM_JOB_ID.
        state: SLURM's word for it: PENDING, RUNNING, ...
        reason: why it waits or ended, as SLURM words it.
    """

    job: str
    name: str
    number: str
    state: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED


def sbatch(command: Sequence[str], what: str) -> str:
    """Submit; the job's id. What sbatch says besides goes to stderr.

    Args:
        command: with ``--parsable``.
        what: names the job in messages.

    Raises SchedulerError with sbatch's own words.
    """
    done = _run(command, "on a login node of the cluster; --dry-run shows what would be submitted")
    if done.returncode:
        raise SchedulerError(f"the {what} job was refused: {_words(done)}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    job = done.stdout.strip().partition(";")[0]  # the name of the cluster may follow
    if not job.isdecimal():
        raise SchedulerError(f"the {what} job: wanted its id from sbatch, got {done.stdout!r}")
    return job


def squeue(jobs: Iterable[str]) -> list[Task]:
    """What SLURM still knows of these jobs, ended ones included for as long as it keeps them.

    Raises SchedulerError if it cannot be asked.
    """
    wanted = ",".join(sorted(set(jobs), key=int))
    if not wanted:
        return []
    listing = ["squeue", "--noheader", "--array", "--states=all", f"--format={FIELDS}"]
    done = _run([*listing, f"--jobs={wanted}"], "where the cluster can be asked")
    if done.returncode and "Invalid job id" in done.stderr:
        return []  # said of a single job that is forgotten
    if done.returncode:
        raise SchedulerError(f"the queue cannot be read: {_words(done)}")
    lines = [line.split("|", 4) for line in done.stdout.splitlines() if line.count("|") >= 4]
    return [Task(*(field.strip() for field in fields)) for fields in lines]


def scancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue.

    Raises SchedulerError with scancel's own words.
    """
    done = _run(["scancel", *jobs], "where the cluster can be asked")
    if done.returncode:
        raise SchedulerError(f"cannot cancel {', '.join(jobs)}: {_words(done)}")


def _run(command: Sequence[str], where: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise SchedulerError(
            f"{command[0]} was not found: wanted SLURM's programs on the PATH; run this {where}"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} did not answer for {TIMEOUT} seconds") from None
    except OSError as error:
        raise SchedulerError(f"{command[0]} cannot be run: {error.strerror or error}") from error


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said, in one line."""
    said = " ".join((done.stderr or done.stdout).split())
    return said or f"{done.args[0]} ended with status {done.returncode}"
