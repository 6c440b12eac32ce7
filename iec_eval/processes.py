"""Which process this is: alone, or one of several that torchrun, srun or Lightning started.

Read from the environment alone, so that it is known before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

LAUNCH = "IEC_EVAL_LAUNCH"


@dataclass(frozen=True)
class Owner:
    """A process, in words that other machines understand.

    Attributes:
        machine: host, boot and process namespace: where ``pid`` means something.
        pid: number of the process there.
        started: when it started, in clock ticks since boot; "" where that cannot be known.
        rank: its rank in its job.
        job: SLURM's job id, None outside of SLURM.
        restart: how often SLURM has requeued that job before.
        launch: what all processes of one launch share.
    """

    machine: str
    pid: int
    started: str
    rank: int
    job: str | None
    restart: int
    launch: str

    @property
    def host(self) -> str:
        """Name of the machine."""
        return self.machine.partition("/")[0]

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def gone(self, observer: Owner) -> bool:
        """Whether ``observer`` can tell that this process has ended; False if it cannot tell."""
        if self.job is not None and self.job == observer.job and self.restart < observer.restart:
            return True  # SLURM requeues a job after all of it has ended
        here = self.machine == observer.machine and self.started != ""
        return here and _started(self.pid) != self.started

    def beside(self, other: Owner) -> bool:
        """Whether both belong to one job: they end together."""
        return (self.launch, self.job) == (other.launch, other.job)


def this_process(launch: str | None = None) -> Owner:
    """This process, as one of a launch."""
    return Owner(
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        rank=rank(),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        launch=launch or launch_id(),
    )


def started_by_slurm() -> bool:
    """Whether srun started this process as one of several tasks of a job step.

    A single task may be an interactive shell: what is started there is a process like any other.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, which srun may have started
        return False
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank() -> int:
    """Number of this process among those of its job, 0 for one that is alone."""
    if started_by_slurm():
        return int(os.environ["SLURM_PROCID"])
    if "RANK" in os.environ:  # torchrun
        return int(os.environ["RANK"])
    # Lightning on one node, or started by hand on several: there it names two processes alike, of
    # which neither leads
    return int(os.environ.get("NODE_RANK", "0")) + int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes something outside (srun, torchrun, Lightning) has started, at least 1."""
    if started_by_slurm():
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process speaks for its job."""
    return rank() == 0


def name() -> str:
    """How messages call this process: nothing if it leads."""
    return "" if leads() else f" (process {rank()})"


def say(message: str) -> None:
    """A line to the user, who may read those of many processes."""
    print(f"iec-eval{name()}: {message}", file=sys.stderr, flush=True)


def position() -> tuple[int, int]:
    """Place among all processes of a launch, and how many they are, job array included."""
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", first)) - first
    return task * count() + rank(), tasks * count()


def launch_id() -> str:
    """What all processes of one launch share: given by the environment, or made up now."""
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_ARRAY_JOB_ID']}"
    if started_by_slurm():  # an allocation may see many launches, a step is one
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    if "RANK" in os.environ:  # the one torchrun that all of a node's processes come from
        return f"torchrun-{os.getppid()}-{_started(os.getppid())}"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def tag() -> str:
    """This process in a few letters, for names of temporary files."""
    return f"{_machine_tag()}-{os.getpid()}"


def tag_is_gone(found: str) -> bool:
    """Whether a tag is that of a process of this machine that has ended."""
    machine, dash, pid = found.rpartition("-")
    return bool(dash) and machine == _machine_tag() and pid.isdecimal() and not _lives(int(pid))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@cache
def _machine_tag() -> str:
    return hashlib.sha256(_machine().encode()).hexdigest()[:8]


@cache
def _machine() -> str:
    """Host, boot and process namespace: containers may share a host's name, but not these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, space = "", ""
    return f"{socket.gethostname()}/{boot}/{space}"


def _started(pid: int) -> str:
    """Start of a process in clock ticks since boot; "" if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
