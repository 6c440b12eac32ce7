"""Several processes, started in every way: together they make what one makes, whoever dies.

Starting a process takes seconds. So Lightning's and torchrun's own ways to start them are used
once each, by the first two tests; elsewhere processes are forks (see forks.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import environment, installed_plugin
from forks import Fork, Server, serving
from places import COUNT, EXECUTION, ROWS, Place, assert_same_run

from iec_eval import generation, ranks
from iec_eval.errors import ConfigError, StorageError
from iec_eval.stopping import Terminated
from iec_eval.study import ExecutionSpec

BATCH, CHUNK = 2, 8
PATIENCE = 300.0  # seconds for anything that must happen, on a busy machine too
pytestmark = [pytest.mark.usefixtures("witness", "counter"), pytest.mark.slow]

# A plugin that counts finished runs, and kills the process it is told to when asked for its parts.
COUNTER = """
import os, signal
from iec_eval.api import hookimpl

@hookimpl
def iec_eval_metrics():
    if os.environ.get("LOCAL_RANK", "0") == os.environ.get("COUNTER_KILLS"):
        os.kill(os.getpid(), signal.SIGKILL)
    return []

@hookimpl
def iec_eval_run_finished(result):
    if "WITNESS_NOTES" in os.environ:
        with open(os.environ["WITNESS_NOTES"] + "/../finished.txt", "a") as notes:
            notes.write(f"{os.getpid()}\\n")
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the plugin above, for this process and for real ones."""
    with installed_plugin(tmp_path_factory.mktemp("counter"), "finished_counter", COUNTER):
        yield


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, witness: None, counter: None
) -> Iterator[Server]:
    """Starts real processes in a fraction of a second."""
    with serving(tmp_path_factory.mktemp("logs"), environment()) as made:
        yield made


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place]) -> Callable[..., Place]:
    """A new run folder of one study: three rows of three chunks of four micro-batches."""

    def make(**changes: Any) -> Place:
        return make_place(
            execution={**EXECUTION, "batch_size": BATCH, "chunk_size": CHUNK}, **changes
        )

    return make


@pytest.fixture(scope="module")
def alone(place: Callable[..., Place], cli: Callable[..., Result], counter: None) -> Place:
    """One process."""
    made = place()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WITNESS_NOTES", str(made.notes))
        done = cli(*made.arguments(verb="launch"))
    assert done.exit_code == 0, done.output
    return made


def notes_of(place: Place, pause: float = 0.05) -> dict[str, str]:
    """Variables that let the witness pause, so that others get some of the work too."""
    return {"WITNESS_NOTES": str(place.notes), "WITNESS_PAUSE": str(pause)}


def finished_runs(place: Place) -> int:
    """How often plugins heard of a finished run."""
    told = place.notes.parent / "finished.txt"
    return len(told.read_text().splitlines()) if told.exists() else 0


def workers(place: Place) -> int:
    """Processes that made images; scoring shows image 0 alone to the leading one."""
    lines = [notes.read_text().splitlines() for notes in place.notes.iterdir()]
    return sum(any(not line.startswith("0 ") for line in some) for some in lines)


def assert_done_once(place: Place, alone: Place) -> None:
    """What one process makes, bit by bit, and no micro-batch twice."""
    assert_same_run(place, alone)
    assert place.noises() == alone.noises()
    assert place.begun(BATCH) == alone.begun(BATCH) == len(ROWS) * COUNT // BATCH


# --- ways to start them ---------------------------------------------------------------------------


def test_processes_of_lightning_make_what_one_makes(
    alone: Place,
    place: Callable[..., Place],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    made = place()
    arguments = made.arguments("execution.devices=2", verb="launch")
    done = run(*arguments, timeout=PATIENCE, **notes_of(made))
    assert done.returncode == 0, done.stderr
    assert_made_by(made, alone, 2, done.stdout)


def test_processes_of_torchrun_make_what_one_makes(
    alone: Place, place: Callable[..., Place], server: Server
) -> None:
    """And all of them end when nothing is missing."""
    made = place()
    done = torchrun(made)
    assert done.returncode == 0, done.stderr
    assert_made_by(made, alone, 2, done.stdout)
    again = torchrun_forks(server, made)
    assert [fork.wait(PATIENCE) for fork in again] == [0, 0], [fork.said for fork in again]
    assert_done_once(made, alone)
    assert [fork.out.count("| full precision |") for fork in again] == [1, 0]
    assert finished_runs(made) == 2


def assert_made_by(made: Place, alone: Place, count: int, out: str) -> None:
    """All of so many processes made images, together what one makes; one of them told of it."""
    assert workers(made) == count
    assert_done_once(made, alone)
    assert out.count("| full precision |") == 1
    assert finished_runs(made) == 1


def free_port() -> str:
    """A port of loopback that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(place: Place) -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port(), "-m", "iec_eval"]
    command += place.arguments("execution.devices=2", verb="launch")
    return subprocess.run(
        command,
        env=environment(**notes_of(place)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def torchrun_forks(server: Server, place: Place) -> list[Fork]:
    """Two processes with the variables that torchrun sets."""
    common = {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    arguments = place.arguments("execution.devices=2", verb="launch")
    return [
        server.start(*arguments, **notes_of(place), **common, RANK=number, LOCAL_RANK=number)
        for number in ("0", "1")
    ]


def test_three_processes_make_what_one_makes(
    alone: Place, place: Callable[..., Place], server: Server
) -> None:
    made = place()
    fork = three(server, made)
    assert fork.wait_for_all(PATIENCE) == 0, fork.said
    assert_made_by(made, alone, 3, fork.out)


def test_processes_that_know_nothing_of_each_other_share_the_work(
    alone: Place, place: Callable[..., Place], server: Server
) -> None:
    """Four of an array: each of them a ``generate`` of its own."""
    made = place()
    tasks = [server.start(*made.arguments(), **notes_of(made)) for _ in range(4)]
    ends = [task.wait(PATIENCE) for task in tasks]
    assert ends == [0] * 4, [task.said for task in tasks]
    assert 1 < workers(made) <= 4
    assert finished_runs(made) == 0
    assert server.run(*made.arguments(verb="launch"), timeout=PATIENCE).status == 0
    assert_done_once(made, alone)


def test_more_processes_than_chunks(
    alone: Place, place: Callable[..., Place], server: Server
) -> None:
    made = place(variants=ROWS[:1])
    arguments = made.arguments("execution.devices=5", verb="launch")
    fork = server.run(*arguments, timeout=PATIENCE, **notes_of(made))
    assert fork.status == 0, fork.said
    assert workers(made) <= COUNT // CHUNK
    ((name, images),) = made.images().items()
    assert torch.equal(images, alone.images()[name])
    assert made.begun(BATCH) == COUNT // BATCH
    assert made.leftovers == []


def test_features_are_extracted_by_several_processes_each_once(
    alone: Place, place: Callable[..., Place], server: Server
) -> None:
    made = place()
    assert server.run(*made.arguments(), timeout=PATIENCE).status == 0
    assert made.features() == {}
    arguments = made.arguments("execution.devices=2", verb="evaluate")
    fork = server.run(*arguments, timeout=PATIENCE)
    assert fork.status == 0, fork.said
    assert_same_run(made, alone)
    assert fork.out.count("| full precision |") == 1


# --- processes that die ---------------------------------------------------------------------------


def three(server: Server, place: Place, **more: str) -> Fork:
    """The first of three processes, which starts the others."""
    arguments = place.arguments("execution.devices=3", verb="launch")
    return server.start(*arguments, **notes_of(place, 0.1), **more)


def one_that_works(place: Place, leader: Fork) -> int:
    """Process id of one that Lightning started and that makes images, once there is one."""
    limit = time.monotonic() + PATIENCE
    while True:
        pids = [int(notes.stem) for notes in place.notes.iterdir()]
        others = [pid for pid in pids if pid != leader.pid]
        if others:
            return others[0]
        assert leader.poll() is None, leader.said
        assert time.monotonic() < limit, "no second process made anything"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_do_the_work_of_one_that_is_lost(
    alone: Place, place: Callable[..., Place], server: Server, number: signal.Signals
) -> None:
    made = place()
    fork = three(server, made)
    os.kill(one_that_works(made, fork), number)
    assert fork.wait_for_all(PATIENCE) == 0, fork.said
    assert fork.out.count("| full precision |") == 1
    assert_same_run(made, alone)
    needed = alone.begun(BATCH)
    if number == signal.SIGKILL:
        assert "of 3 was killed by signal 9; the others do its work" in fork.err
        assert needed <= made.begun(BATCH) <= needed + 1
    else:  # it finishes what it has begun
        assert "was killed" not in fork.err
        assert made.begun(BATCH) == needed
    assert finished_runs(made) == 1


class Told(ranks.Launcher):
    """Has started nobody, and keeps what it would tell them."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def kill(self, signum: signal.Signals) -> None:
        self.signals.append(signum)

    def join(self, seconds: float = 0) -> None:
        pass


@pytest.mark.parametrize(
    ("ended", "signals"),
    [
        (None, []),
        (Terminated(signal.SIGUSR1), []),
        (StorageError("no space left"), [signal.SIGTERM]),
    ],
)
def test_the_others_are_asked_to_stop_once(
    ended: BaseException | None, signals: list[signal.Signals]
) -> None:
    """A request to stop has reached them already; a second one would cost them their batch."""
    launcher = Told()
    generation._dismiss(launcher, ended)
    assert launcher.signals == signals


def test_a_process_lost_before_they_meet_is_the_end_with_a_message(
    place: Callable[..., Place], server: Server
) -> None:
    made = place()
    began = time.monotonic()
    fork = three(server, made, COUNTER_KILLS="1")
    assert fork.wait_for_all(PATIENCE) == 1, fork.said
    assert time.monotonic() - began < PATIENCE / 2
    assert fork.out == ""
    assert "process 1 of 3 was killed by signal 9" in fork.err
    assert "had not met yet, so none of them can begin; run it again" in fork.err
    assert made.chunks == {}


def test_the_others_end_the_work_of_a_first_process_that_is_lost_and_say_so(
    alone: Place, place: Callable[..., Place], server: Server, cli: Callable[..., Result]
) -> None:
    made = place()
    fork = three(server, made)
    one_that_works(made, fork)
    fork.kill()
    fork.wait_for_all(PATIENCE)
    assert fork.out == ""
    assert "the first process has died; process 1 goes on" in fork.err
    assert "Run the same command again for the table" in fork.err
    needed = alone.begun(BATCH)
    assert needed <= made.begun(BATCH) <= needed + 1
    assert cli(*made.arguments(verb="launch")).exit_code == 0
    assert_same_run(made, alone)


def test_a_port_in_use_is_one_message_and_leaves_no_process(
    place: Callable[..., Place], server: Server
) -> None:
    made = place()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        fork = three(server, made, MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
        assert fork.wait_for_all(PATIENCE) == 2, fork.said
    assert fork.out == ""
    assert "the processes of this run could not meet" in fork.err
    assert "Traceback" not in fork.err


@pytest.mark.parametrize("named", ["auto", "cpu", "gpu", "mps"])
def test_a_mac_computes_on_its_cpu(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU has no float64, which calibration needs."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    execution = ExecutionSpec(accelerator=named)
    if named in ("auto", "cpu"):
        assert ranks.first_device(execution) == torch.device("cpu")
    else:
        with pytest.raises(ConfigError, match="a Mac's GPU here, which has no float64; wanted cpu"):
            ranks.first_device(execution)
