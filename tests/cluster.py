"""A virtual SLURM cluster: two nodes on this machine, on loopback, in a folder of its own.

Everything is real but the machines: slurmctld, two slurmd and munged, stopped with the process
that started them, however it ends. Several clusters can run side by side.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import sample

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
PACKAGES = "slurmctld slurmd slurm-client munge"
REQUIRED = "IEC_EVAL_REQUIRE_SLURM"
NODES = ("n1", "n2")
FAILURES = ["BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"]
ENDED = frozenset(["COMPLETED", *FAILURES])

# cred_expire: a requeued job waits for its old credential to expire, two minutes by default.
# MinJobAge: there is no accounting; the controller itself must remember the jobs of a test run.
SETTINGS = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
FirstJobId={first}
KillWait=5
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = """\
NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=16000 \
Gres=gpu:2 State=UNKNOWN
"""


@dataclass(frozen=True)
class Ports:
    """Four ports of loopback that this process alone uses while ``held`` is open.

    Job ids of clusters side by side differ too: Lightning makes the port of a job's main rank
    (15000 and more) from the last four digits of its id.
    """

    held: socket.socket
    control: int
    nodes: tuple[int, int]
    first_job: int

    @classmethod
    def find(cls) -> Ports:
        """Below the ports that the kernel gives to connections, above those of Lightning."""
        for block in sample(range(90), 90):
            lowest = 25000 + 10 * block
            held = _bound(lowest)
            if held is None:
                continue
            if all(map(_free, range(lowest + 1, lowest + 4))):
                return cls(held, lowest + 1, (lowest + 2, lowest + 3), 1 + 100 * block)
            held.close()
        raise RuntimeError("no four free ports on 127.0.0.1 between 25000 and 25900")


def _bound(port: int) -> socket.socket | None:
    opened = socket.socket()
    try:
        opened.bind(("127.0.0.1", port))
        opened.listen()
    except OSError:
        opened.close()
        return None
    return opened


def _free(port: int) -> bool:
    opened = _bound(port)
    if opened is not None:
        opened.close()
    return opened is not None


@dataclass(eq=False)
class Cluster:
    """A running virtual cluster; every method that waits does so for a bounded time."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For every command that shall talk to this cluster and to no other."""
        kept = {name: value for name, value in os.environ.items() if not _of_a_job(name)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, *command: object, timeout: float = 60, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Any command to its end; ``more`` is added to its environment."""
        words = list(map(str, command))
        done = subprocess.run(
            words,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            text = f"{' '.join(words)}\nstatus {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(f"{text}\n{self.logs()}")
        return done

    def script(self, *lines: str) -> Path:
        """A batch script of these lines (bash)."""
        path = self.folder / "scripts" / f"{secrets.token_hex(4)}.sbatch"
        path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        return path

    def submit(
        self, script: Path, *arguments: object, options: Sequence[object] = (), **more: str
    ) -> str:
        """The job's id. ``options`` are sbatch's; ``more`` is added to the job's environment."""
        place = f"--output={self.folder}/jobs/%j.out"
        found = self.run("sbatch", "--parsable", place, *options, script, *arguments, **more)
        return found.stdout.strip().split(";")[0]

    def tasks(self, job: str) -> dict[str, dict[str, str]]:
        """What scontrol shows of a job, by job id: several for an array whose tasks started."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines() if line]
        return {row["JobId"]: row for row in rows}

    def state(self, job: str) -> str:
        """As squeue says it; the different states of an array's tasks are joined with commas."""
        return ",".join(sorted({row["JobState"] for row in self.tasks(job).values()}))

    def restarts(self, job: str) -> int:
        """How often the job (of an array: all tasks together) was requeued."""
        return sum(int(row["Restarts"]) for row in self.tasks(job).values())

    def wait(
        self, jobs: str | Iterable[str], timeout: float, states: Iterable[str] = ENDED
    ) -> dict[str, str]:
        """Wait until each job (all tasks of an array) is in one of ``states``: job -> state."""
        jobs = [jobs] if isinstance(jobs, str) else list(jobs)
        wanted, seen = set(states), dict[str, str]()

        def reached() -> bool:
            seen.update({job: self.state(job) for job in jobs})
            return all(set(state.split(",")) <= wanted for state in seen.values())

        self.until(reached, timeout, f"jobs {', '.join(jobs)}: {'/'.join(sorted(wanted))}")
        return seen

    def until(self, reached: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait for ``reached()``; after ``timeout`` seconds fail with all logs."""
        end = time.monotonic() + timeout
        while not reached():
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout:g} s: {what}\n{self.logs()}")
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise AssertionError(f"{name} ended: {daemon.returncode}\n{self.logs()}")
            time.sleep(0.1)

    def queue(self) -> dict[str, str]:
        """Jobs that are not over: id (``<array>_<task>`` in an array) -> state."""
        rows = self.run("squeue", "--noheader", "--array", "--format=%i %T").stdout.split("\n")
        return dict(row.split() for row in rows if row)

    def cancel(self, *jobs: str, timeout: float = 30) -> None:
        """Cancel these jobs, or all there are, and wait until they are gone."""
        chosen = jobs or tuple({job.split("_")[0] for job in self.queue()})
        if chosen:
            self.run("scancel", *chosen, check=False)
            self.wait(chosen, timeout)

    def log(self, job: str) -> str:
        """What the job (all tasks of an array) wrote, if its output was not sent elsewhere."""
        ids = [job] if not self.tasks(job) else sorted(self.tasks(job), key=int)
        paths = [self.folder / "jobs" / f"{name}.out" for name in ids]
        return "".join(path.read_text() for path in paths if path.exists())

    def logs(self) -> str:
        """The queue and the end of every log, for a message."""
        queue = subprocess.run(
            ["squeue"], env=self.environment, capture_output=True, text=True, timeout=20
        )
        found = [f"--- squeue\n{queue.stdout}{queue.stderr}"]
        for path in sorted([*self.folder.glob("log/*"), *self.folder.glob("jobs/*.out")]):
            tail = path.read_text(errors="replace").splitlines()[-60:]
            found.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(found)

    def start(self, ports: Ports, *, cpus: int, grace: int) -> None:
        """Write the settings and start all daemons; return when both nodes are idle."""
        self._prepare(ports, cpus, grace)
        munge, conf = self.folder / "munge", self.folder / "slurm.conf"
        files = [
            f"--{kind}-file={munge}/{place}"
            for kind, place in (("key", "key"), ("pid", "pid"), ("seed", "seed"))
        ]
        log = f"--log-file={self.folder}/log/munged.log"
        self._start("munged", "--foreground", "--force", f"--socket={munge}/socket", log, *files)
        self.until((munge / "socket").exists, 20, "the socket of munged")
        self._start("slurmctld", "-D", "-c", "-f", conf)
        for name in NODES:
            self._start("slurmd", "-D", "-N", name, "-f", conf, called=f"slurmd {name}")
        self.until(self._is_idle, 30, "two idle nodes")

    def _prepare(self, ports: Ports, cpus: int, grace: int) -> None:
        for name in ("munge", "state", "log", "jobs", "scripts", *(f"spool/{n}" for n in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        text = SETTINGS.format(
            folder=self.folder,
            host=host,
            control=ports.control,
            user=getpass.getuser(),
            first=ports.first_job,
            grace=grace,
        )
        for name, port in zip(NODES, ports.nodes, strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=cpus)
        (self.folder / "slurm.conf").write_text(text)
        for index in range(2):  # SLURM wants devices; it never opens them
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        gpus = f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(gpus)

    def _start(self, *command: object, called: str = "") -> None:
        words = list(map(str, command))
        with (self.folder / "log" / "daemons.log").open("ab") as output:
            self.daemons[called or words[0]] = subprocess.Popen(
                [str(program(words[0])), *words[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the tests alone, which then stop it
            )

    def _is_idle(self) -> bool:
        shown = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False)
        return shown.stdout.strip() == str(len(NODES))

    def stop(self) -> None:
        """End all jobs and daemons and remove the folder."""
        with suppress(Exception):  # what cannot be cancelled is killed below
            self.cancel(timeout=10)
        for name in ("slurmd n1", "slurmd n2", "slurmctld", "munged"):
            if name in self.daemons:
                _end(self.daemons[name])
        kill_all(self.folder)


def _of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SCONTROL_", "SQUEUE_", "MASTER_"))


def processes(folder: Path) -> list[int]:
    """What runs with this cluster in its environment: daemons, steps, and what jobs started."""
    mine = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mine in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def kill_all(folder: Path) -> None:
    """Kill what runs of a cluster, remove its folder."""
    for _ in range(20):
        alive = processes(folder)
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            break
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(10)


def program(name: str) -> str | None:
    """Where a program is; Debian's daemons are in folders outside an ordinary user's PATH."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which(name, path=places)


def require_slurm() -> None:
    """Skip the test where SLURM is not installed; fail it where SLURM must be."""
    missing = [name for name in PROGRAMS if program(name) is None]
    if not missing:
        return
    message = f"no {', '.join(missing)} here: as root, apt-get install -y {PACKAGES}"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{message} ({REQUIRED}=1 asks for these tests)")
    pytest.skip(message)


@contextmanager
def virtual_cluster(*, cpus: int = 8, grace: int = 15) -> Iterator[Cluster]:
    """Two idle nodes with ``cpus`` processors and two make-believe GPUs each.

    Jobs in partition ``high`` preempt those in ``main``, which are requeued; they have ``grace``
    seconds between SIGTERM and their end.
    """
    ports = Ports.find()
    # not pytest's folder: a path of a Unix socket has at most 108 bytes
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
    with ports.held, _watched(cluster.folder):
        try:
            cluster.start(ports, cpus=cpus, grace=grace)
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """A process that ends the cluster should this one be killed: its stdin closes then."""
    watchdog = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        watchdog.communicate(timeout=30)


if __name__ == "__main__":
    sys.stdin.read()
    kill_all(Path(sys.argv[1]))
