"""How Lightning starts the processes of a run, and what happens if one of them dies.

The processes greet each other at the start and never wait for each other again: they meet in the
files. So after the greeting a process that dies is a message, not the end of the others.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from iec_eval import processes
from iec_eval.errors import ConfigError, ProcessesError
from iec_eval.study import ExecutionSpec

GREETING = timedelta(minutes=10)  # a process that has not come by then will not
FAREWELL_SECONDS = 60.0  # for a process that has nothing more to do
EXPECTED = (0, 75, 130, 143)  # statuses of processes that end as they should
MISFIT = (MisconfigurationException, ImportError, ValueError, RuntimeError, TypeError)
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Slurm(SLURMEnvironment):
    """Tasks that srun has started; SLURM, not Lightning, requeues the job."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass  # they are SLURM's own, see asked_for

    @staticmethod
    def _validate_srun_variables() -> None:
        pass  # tasks may have been asked for in any way

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """Address of the first node; SLURM is asked where its name means nothing to the system."""
        node = SLURMEnvironment.resolve_root_node_address(nodes)
        try:
            socket.getaddrinfo(node, None)
        except OSError:
            return _node_address(node)
        return node


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine, and says so when one dies.

    Lightning's own would kill all the others without a word.
    """

    def __init__(self, environment: ClusterEnvironment, processes_here: int, nodes: int) -> None:
        super().__init__(environment, processes_here, nodes)
        self.met = threading.Event()
        self._told: set[int] = set()
        self._killing = False

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        before = {name: os.environ.get(name) for name in RANK_VARIABLES}
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="ranks").start()
        elif isinstance(self.cluster_environment, LightningEnvironment):
            watch = threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True)
            watch.start()
        try:
            return function(*args, **kwargs)
        except BaseException as error:  # the others would wait for this process, and long
            self.kill(signal.SIGKILL if not self.met.is_set() else signal.SIGTERM)
            if isinstance(error, torch.distributed.DistError):
                raise ProcessesError(
                    f"the processes of this run could not meet: {str(error).splitlines()[0]}"
                ) from error
            raise
        finally:
            if self.procs:  # what is started next must not take itself for one of these
                _restore(before)

    def _watch_parent(self, parent: int) -> None:
        """Say when the process that started this one has died, of which nobody else knows."""
        while os.getppid() == parent:
            time.sleep(0.5)
        if self._killing:  # both were asked to stop
            return
        if not self.met.is_set():
            os._exit(1)  # the main thread waits for a greeting and hears nothing else
        _say(
            f"the first process has died; process {processes.rank()} goes on with its work. Run "
            "the same command again for the table"
        )

    def kill(self, signum: Any) -> None:
        self._killing = True
        super().kill(signum)

    def join(self, seconds: float = FAREWELL_SECONDS) -> None:
        """Wait for the processes that were started here; those that do not end are killed."""
        ends = time.monotonic() + seconds
        for number, process in enumerate(self.procs, start=1):
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"process {number} does not end and is killed; nothing waits for its work")
                process.kill()
                process.wait()
        self._tell()

    def _watch(self) -> None:
        while any(process.poll() is None for process in self.procs):
            time.sleep(0.5)
            self._tell()
            if self._told and not self.met.is_set():
                _say("the processes had not met yet, so none of them can begin; run it again")
                self.kill(signal.SIGKILL)
                os._exit(1)  # the main thread waits for a greeting and hears nothing else

    def _tell(self) -> None:
        for number, process in enumerate(self.procs, start=1) if not self._killing else []:
            status = process.poll()
            if status is not None and status not in EXPECTED and number not in self._told:
                self._told.add(number)
                how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
                _say(f"process {number} of {self.num_processes} {how}; the others do its work")


class Ranks(DDPStrategy):
    """Lightning's DDP strategy, of which only the start of the processes is used."""

    def __init__(self, backend: str | None = "gloo") -> None:
        super().__init__(process_group_backend=backend, timeout=GREETING)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def trainer(execution: ExecutionSpec, callbacks: list[Any], *, alone: bool = False) -> Trainer:
    """A Trainer for the processes that ``execution`` asks for, or that SLURM has given.

    ``alone`` is for this process only. Raises ConfigError for settings that Lightning or the
    machine does not have.
    """
    devices, nodes = (1, 1) if alone else asked_for(execution)
    here = _all_devices(execution) if devices == "auto" else int(devices)
    strategy = _strategy(execution.strategy, several=here * nodes > 1 and not alone)
    try:
        return Trainer(
            accelerator=_accelerator(execution),
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            plugins=[LightningEnvironment()] if alone else _environment(),
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MISFIT as error:
        raise _misfit(error) from error


def first_device(execution: ExecutionSpec) -> torch.device:
    """The first device that a run would use.

    Raises ConfigError for an accelerator that Lightning or the machine does not have.
    """
    try:
        with quiet_lightning():
            return Fabric(accelerator=_accelerator(execution), devices=1, num_nodes=1).device
    except MISFIT as error:
        raise _misfit(error) from error


def _accelerator(execution: ExecutionSpec) -> str:
    """What Lightning is asked for: of its own accord it would take a Mac's GPU.

    Raises ConfigError for that one, which has no float64; calibration and some samplers need it.
    """
    named = execution.accelerator
    if not torch.backends.mps.is_available() or torch.cuda.is_available():
        return named
    if named in ("gpu", "mps"):
        raise ConfigError(
            f"execution.accelerator: {named!r} is a Mac's GPU here, which has no float64; "
            "wanted cpu"
        )
    return "cpu" if named == "auto" else named


def _misfit(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"execution: Lightning cannot start such processes here: {reason}")


def _strategy(name: str, *, several: bool) -> Any:
    """``auto`` greets by gloo on any device, as nothing else is exchanged; ``ddp`` as Lightning
    chooses, by nccl on GPUs."""
    if any(word in name for word in ("spawn", "fork", "notebook")):
        raise ConfigError(
            f"execution.strategy: {name!r} copies this process with its open files and threads; "
            "wanted auto or ddp, which start new ones"
        )
    if not name.startswith("ddp") and name != "auto":
        return name
    if not several:
        return "auto"
    return Ranks() if name == "auto" else Ranks(backend=None)


@contextmanager
def named(launch: str) -> Iterator[None]:
    """Processes that are started in the block know which launch they belong to."""
    before = {processes.LAUNCH: os.environ.get(processes.LAUNCH)}
    os.environ[processes.LAUNCH] = launch
    try:
        yield
    finally:
        _restore(before)


def _environment() -> list[Any]:
    """Who starts the processes; not left to Lightning, which takes any shell on a cluster's node
    for a task of srun's."""
    if processes.started_by_slurm():
        return [Slurm()]
    return [
        TorchElasticEnvironment() if "TORCHELASTIC_RUN_ID" in os.environ else LightningEnvironment()
    ]


def _all_devices(execution: ExecutionSpec) -> int:
    cuda = execution.accelerator in ("auto", "gpu", "cuda")
    return max(torch.cuda.device_count(), 1) if cuda else 1


def asked_for(execution: ExecutionSpec) -> tuple[int | str, int]:
    """Processes on each node, and nodes: those of the SLURM job step if it has several tasks."""
    if not processes.started_by_slurm():
        by_hand = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys()
        if execution.num_nodes > 1 and not by_hand and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise ConfigError(
                f"execution.num_nodes: {execution.num_nodes} nodes need something that starts a "
                "process on each, and nothing has; wanted srun, torchrun, or MASTER_ADDR, "
                "MASTER_PORT and NODE_RANK set on each node, or -s execution.num_nodes=1"
            )
        return execution.devices, execution.num_nodes
    tasks, nodes = processes.count(), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks % nodes:
        raise ConfigError(
            f"SLURM started {tasks} tasks on {nodes} nodes; wanted as many on each node: use "
            "--ntasks-per-node"
        )
    return tasks // nodes, nodes


def _node_address(node: str) -> str:
    """What SLURM calls the address of a node."""
    command = ["scontrol", "show", "node", node, "--oneliner"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        words = dict(word.split("=", 1) for word in told.stdout.split() if "=" in word)
        return words["NodeAddr"]
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        raise ConfigError(
            f"node {node}: neither the system nor SLURM knows its address ({error}); set "
            "MASTER_ADDR to one at which the other nodes reach it"
        ) from error


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _say(message: str) -> None:
    print(f"iec-eval: {message}", file=sys.stderr, flush=True)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's hints on workers and hardware, which are not about our users."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
