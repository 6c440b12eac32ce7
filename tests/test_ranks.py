"""Several processes, started in every way: together they make what one makes, whoever dies.

Starting a process takes seconds, so runs are shared by the tests that look at them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import environment, installed_plugin, started
from places import COUNT, EXECUTION, ROWS, Place, assert_same_run

BATCH, CHUNK = 2, 8
PATIENCE = 300.0  # seconds for anything that must happen, on a busy machine too
pytestmark = [pytest.mark.usefixtures("witness", "counter"), pytest.mark.slow]

# A plugin that counts finished runs, and kills the process it is told to while it is loaded.
COUNTER = """
import os, signal
from iec_eval.api import hookimpl

if os.environ.get("LOCAL_RANK", "0") == os.environ.get("COUNTER_KILLS"):
    os.kill(os.getpid(), signal.SIGKILL)

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


@pytest.mark.parametrize("devices", [2, 3])
def test_processes_of_lightning_make_what_one_makes(
    alone: Place,
    place: Callable[..., Place],
    run: Callable[..., subprocess.CompletedProcess[str]],
    devices: int,
) -> None:
    made = place()
    arguments = made.arguments(f"execution.devices={devices}", verb="launch")
    done = run(*arguments, timeout=PATIENCE, **notes_of(made))
    assert done.returncode == 0, done.stderr
    assert workers(made) == devices
    assert_done_once(made, alone)
    assert done.stdout.count("| full precision |") == 1
    assert finished_runs(made) == 1


def test_processes_that_know_nothing_of_each_other_share_the_work(
    alone: Place, place: Callable[..., Place], cli: Callable[..., Result]
) -> None:
    """Four of an array: each of them a ``generate`` of its own."""
    made = place()
    with ExitStack() as stack:
        tasks = [
            stack.enter_context(started(*made.arguments(), **notes_of(made))) for _ in range(4)
        ]
        ends = [task.communicate(timeout=PATIENCE) for task in tasks]
        assert [task.returncode for task in tasks] == [0] * 4, ends
    assert 1 < workers(made) <= 4
    assert finished_runs(made) == 0
    assert cli(*made.arguments(verb="launch")).exit_code == 0
    assert_done_once(made, alone)


def test_more_processes_than_chunks(
    alone: Place,
    place: Callable[..., Place],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    made = place(variants=ROWS[:1])
    arguments = made.arguments("execution.devices=5", verb="launch")
    done = run(*arguments, timeout=PATIENCE, **notes_of(made))
    assert done.returncode == 0, done.stderr
    assert workers(made) <= COUNT // CHUNK
    ((name, images),) = made.images().items()
    assert torch.equal(images, alone.images()[name])
    assert made.begun(BATCH) == COUNT // BATCH
    assert made.leftovers == []


def test_features_are_extracted_by_several_processes_each_once(
    alone: Place,
    place: Callable[..., Place],
    cli: Callable[..., Result],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    made = place()
    assert cli(*made.arguments()).exit_code == 0
    assert made.features() == {}
    done = run(*made.arguments("execution.devices=2", verb="evaluate"), timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert_same_run(made, alone)
    assert done.stdout.count("| full precision |") == 1


# --- torchrun -------------------------------------------------------------------------------------


def torchrun(place: Place, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "iec_eval"]
    command += place.arguments("execution.devices=2", *overrides, verb="launch")
    return subprocess.run(
        command,
        env=environment(**notes_of(place)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_processes_of_torchrun_make_what_one_makes_and_end_when_nothing_is_missing(
    alone: Place, place: Callable[..., Place]
) -> None:
    made = place()
    done = torchrun(made)
    assert done.returncode == 0, done.stderr
    assert workers(made) == 2
    assert_done_once(made, alone)
    assert done.stdout.count("| full precision |") == 1
    assert finished_runs(made) == 1
    again = torchrun(made)
    assert again.returncode == 0, again.stderr
    assert_done_once(made, alone)
    assert again.stdout.count("| full precision |") == 1
    assert finished_runs(made) == 2


# --- processes that die ---------------------------------------------------------------------------


@contextmanager
def three(place: Place, **more: str) -> Iterator[subprocess.Popen[str]]:
    arguments = place.arguments("execution.devices=3", verb="launch")
    with started(*arguments, **notes_of(place, 0.2), **more) as process:
        yield process


def one_that_works(place: Place, leader: subprocess.Popen[str]) -> int:
    """Process id of one that Lightning started and that makes images, once there is one."""
    limit = time.monotonic() + PATIENCE
    while True:
        pids = [int(notes.stem) for notes in place.notes.iterdir()]
        others = [pid for pid in pids if pid != leader.pid]
        if others:
            return others[0]
        assert leader.poll() is None, leader.communicate()
        assert time.monotonic() < limit, "no second process made anything"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_do_the_work_of_one_that_is_lost(
    alone: Place, place: Callable[..., Place], number: signal.Signals
) -> None:
    made = place()
    with three(made) as process:
        os.kill(one_that_works(made, process), number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.count("| full precision |") == 1
    assert_same_run(made, alone)
    needed = alone.begun(BATCH)
    if number == signal.SIGKILL:
        assert "of 3 was killed by signal 9; the others do its work" in err
        assert needed <= made.begun(BATCH) <= needed + 1
    else:  # it finishes what it has begun
        assert "was killed" not in err
        assert made.begun(BATCH) == needed
    assert finished_runs(made) == 1


def test_a_process_lost_before_they_meet_is_the_end_with_a_message(
    place: Callable[..., Place],
) -> None:
    made = place()
    began = time.monotonic()
    with three(made, COUNTER_KILLS="1") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2
    assert process.returncode == 1
    assert out == ""
    assert "process 1 of 3 was killed by signal 9" in err
    assert "had not met yet, so none of them can begin; run it again" in err
    assert made.chunks == {}


def test_the_others_end_the_work_of_a_first_process_that_is_lost_and_say_so(
    alone: Place, place: Callable[..., Place], cli: Callable[..., Result]
) -> None:
    made = place()
    with three(made) as process:
        one_that_works(made, process)
        process.kill()
        out, err = process.communicate(timeout=PATIENCE)  # until the others have ended too
    assert out == ""
    assert "the first process has died; process 1 goes on" in err
    assert "Run the same command again for the table" in err
    needed = alone.begun(BATCH)
    assert needed <= made.begun(BATCH) <= needed + 1
    assert cli(*made.arguments(verb="launch")).exit_code == 0
    assert_same_run(made, alone)


def test_a_port_in_use_is_one_message_and_leaves_no_process(place: Callable[..., Place]) -> None:
    made = place()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with three(made, MASTER_PORT=port, MASTER_ADDR="127.0.0.1") as process:
            out, err = process.communicate(timeout=PATIENCE)  # of all that write to it
    assert process.returncode == 2
    assert out == ""
    assert "the processes of this run could not meet" in err
    assert "Traceback" not in err
