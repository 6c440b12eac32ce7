"""Many processes of the program at the price of one start: forks of one that has imported all.

Run as a script this is the server. It reads orders, one JSON value a line, and answers each with
one line: ``{"arguments", "environment", "log"}`` starts the program in a fork and is answered with
its process id; a process id is answered with the status it ended with, or null. Processes that
Lightning starts within a run (``execution.devices``) are forks too, of the one that starts them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Fork:
    """One run of the program, in a process of its own.

    ``status`` is None while it runs, negative if a signal ended it.
    """

    server: Server
    pid: int
    log: Path
    began: float
    status: int | None = None

    @property
    def said(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self.err + self.out

    @property
    def out(self) -> str:
        """What it and the processes it started have written to stdout so far."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """What they have written to stderr."""
        return self.log.with_suffix(".err").read_text()

    def poll(self) -> int | None:
        """Its status, None if it has not ended."""
        if self.status is None:
            self.status = self.server.ask(self.pid)
        return self.status

    def wait(self, timeout: float = 120) -> int:
        """Its status at its end, which must come in time."""
        ends = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < ends, f"still running after {timeout} s:\n{self.said}"
            time.sleep(0.02)
        assert self.status is not None
        return self.status

    def wait_for_all(self, timeout: float = 120) -> int:
        """Its status, when those that it started have ended too."""
        status, ends = self.wait(timeout), time.monotonic() + timeout
        while self.server.ask([self.pid]):
            assert time.monotonic() < ends, f"others still run after {timeout} s:\n{self.said}"
            time.sleep(0.02)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not been found ended."""
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """``kill -9``, and its status."""
        self.signal(signal.SIGKILL)
        return self.wait()


class Server:
    """The process whose forks the runs are; ``with`` leaves none of them behind."""

    def __init__(self, process: subprocess.Popen[str], logs: Path) -> None:
        self._process, self._logs = process, logs
        self._started: list[Fork] = []

    def start(self, *arguments: Any, **environment: str) -> Fork:
        """Run ``iec-eval`` with arguments; variables are added to the environment."""
        log = self._logs / str(len(self._started))
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        words = [str(argument) for argument in arguments]
        order = {"arguments": words, "environment": environment, "log": str(log)}
        self._started.append(Fork(self, self.ask(order), log, time.time()))
        return self._started[-1]

    def run(self, *arguments: Any, timeout: float = 120, **environment: str) -> Fork:
        """Run ``iec-eval`` to its end."""
        fork = self.start(*arguments, **environment)
        fork.wait(timeout)
        return fork

    def ask(self, order: Any) -> Any:
        """The server's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Kill what still runs, and the server."""
        for fork in self._started:
            if self.ask([fork.pid]):
                os.killpg(fork.pid, signal.SIGKILL)
        self._process.communicate(timeout=30)


@contextmanager
def serving(logs: Path, environment: dict[str, str]) -> Iterator[Server]:
    """A server, started and ended."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    server = Server(process, logs)
    try:
        yield server
    finally:
        with suppress(BrokenPipeError):
            server.end()


def _serve() -> None:
    import torch
    from matplotlib import pyplot  # noqa: F401

    import iec_eval.workflow  # noqa: F401
    from iec_eval.plugins import load_registry

    load_registry()  # imports every built-in part
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of its forks are its own
    answers = os.fdopen(os.dup(1), "w")
    ends: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        _reap(ends)
        if isinstance(order, dict):
            answer: Any = _fork(lambda order=order: _program(**order))
            ends.pop(answer, None)  # of an earlier process of that number
        else:
            answer = ends.get(order) if isinstance(order, int) else _any_of_group(*order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reap(ends: dict[int, int]) -> None:
    """Take note of all that have ended."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ends[found[0]] = os.waitstatus_to_exitcode(found[1])


def _any_of_group(group: int) -> bool:
    """Whether a process lives in the group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _fork(work: Callable[[], int]) -> int:
    """Process id of a fork that does ``work`` and ends with the status it returns."""
    pid = os.fork()
    return pid or _end_with(work)


def _end_with(work: Callable[[], int]) -> NoReturn:
    status = 1
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _program(arguments: list[str], environment: dict[str, str], log: str) -> int:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive the server
    nothing = os.open(os.devnull, os.O_RDONLY)
    written = [os.open(f"{log}.{end}", os.O_WRONLY | os.O_APPEND) for end in ("out", "err")]
    for source, target in zip((nothing, *written), range(3), strict=True):
        os.dup2(source, target)
    os.environ.update(environment)
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    from lightning.pytorch.strategies.launchers import subprocess_script

    from iec_eval.cli.main import cli

    subprocess_script.subprocess = SimpleNamespace(Popen=Sibling)  # type: ignore[attr-defined]
    sys.argv = ["iec-eval", *arguments]
    try:
        cli(arguments, prog_name="iec-eval")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Sibling:
    """Stands for the Popen with which Lightning starts the program once more, as another rank.

    It is a fork, which starts anew: arguments, variables and the meaning of signals are those of a
    new process, and it is a child of the process that started it.
    """

    def __init__(self, command: list[str], env: dict[str, str], cwd: str | None) -> None:
        assert cwd is None
        _, _, *arguments = command  # python and the script

        def work() -> int:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            return _run(arguments)

        self.returncode: int | None = None
        self._lock = threading.Lock()  # its end can be asked for once, and by two threads
        self.pid = _fork(work)

    def poll(self) -> int | None:
        """Its status, None if it has not ended."""
        with self._lock:
            if self.returncode is None:
                found, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if found else None
            return self.returncode

    def wait(self, timeout: float = 60) -> int:
        """Its status at its end; raises TimeoutExpired as Popen does."""
        ends = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("iec-eval", timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not been found ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """``kill -9``."""
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    _serve()
