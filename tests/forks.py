"""Many processes of the program at the price of one start: forks of one that has imported all.

Run as a script this is the server. It reads orders, one JSON value a line, and answers each with
one line: ``{"arguments", "environment", "log"}`` starts the program in a fork and is answered with
its process id; a process id is answered with the status it ended with, or null.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


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
        return self.log.read_text()

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
        log = self._logs / f"{len(self._started)}.txt"
        log.touch()
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
            if fork.poll() is None:
                fork.kill()
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
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        answer = _begin(order) if isinstance(order, dict) else _status(order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _status(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _begin(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = _program(**order)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def _program(arguments: list[str], environment: dict[str, str], log: str) -> int:
    from iec_eval.cli.main import cli

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the server
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    os.environ.update(environment)
    try:
        cli(arguments, prog_name="iec-eval")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    _serve()
