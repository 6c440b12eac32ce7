"""Of all who want the same work one gets it, and whoever dies loses it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iec_eval import processes
from iec_eval.claims import Claims
from iec_eval.errors import StorageError
from iec_eval.processes import Owner, this_process

ELSEWHERE = Owner("other-host/boot/space", 17, "1", 0, None, 0, "launch")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def age(path: Path, seconds: float) -> None:
    """As if the last sign of life were that long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- one gets it ----------------------------------------------------------------------------------


def test_what_is_claimed_nobody_else_gets_until_it_is_given_back(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path, owner=ELSEWHERE)
    assert one.take("chunk.a")
    assert not other.take("chunk.a")
    assert other.take("chunk.b")
    assert files(tmp_path) == {"chunk.a.0", "chunk.b.0"}
    one.release("chunk.a")
    one.release("chunk.b")  # not its own: nothing happens
    assert files(tmp_path) == {"chunk.b.0"}
    assert other.take("chunk.a")


def grab(folder: Path, names: list[str], start: Any, end: Any, taken: Any) -> None:
    claims = Claims(folder)
    start.wait(30)
    taken.put([name for name in names if claims.take(name)])
    end.wait(60)  # who has ended can be taken over from


def taken_by_a_crowd(folder: Path, names: list[str]) -> Counter[str]:
    """How many of six processes got each of ``names``, all of them asking at once."""
    context = multiprocessing.get_context("fork")
    start, end, taken = context.Event(), context.Event(), context.Queue()
    crowd = [
        context.Process(target=grab, args=(folder, names, start, end, taken), daemon=True)
        for _ in range(6)
    ]
    for process in crowd:
        process.start()
    start.set()
    shares = [taken.get(timeout=60) for _ in crowd]
    end.set()
    for process in crowd:
        process.join(30)
    return Counter(name for share in shares for name in share)


def test_of_many_processes_exactly_one_gets_each(tmp_path: Path) -> None:
    names = [f"row.images.{number:06d}" for number in range(200)]
    assert taken_by_a_crowd(tmp_path, names) == dict.fromkeys(names, 1)


def test_of_many_who_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    dead = Claims(tmp_path, owner=ELSEWHERE)
    names = [f"row.images.{number:06d}" for number in range(100)]
    for name in names:
        assert dead.take(name)
        age(tmp_path / f"{name}.0", 3600)
    assert taken_by_a_crowd(tmp_path, names) == dict.fromkeys(names, 1)


# --- who lives, who does not ----------------------------------------------------------------------


def test_a_silent_owner_loses_its_claim_and_a_lively_one_does_not(tmp_path: Path) -> None:
    silent, other = Claims(tmp_path, 10, ELSEWHERE), Claims(tmp_path, 10)
    assert silent.take("chunk")
    age(tmp_path / "chunk.0", 9)
    assert not other.take("chunk")
    assert other.held()["chunk"].owner == ELSEWHERE
    age(tmp_path / "chunk.0", 11)
    assert other.held() == {}
    assert other.take("chunk")
    assert other.held()["chunk"].generation == 1


def test_a_claim_stays_as_long_as_its_owner_works(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.6, ELSEWHERE) as busy:
        assert busy.take("chunk")
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            assert not Claims(tmp_path, 0.6).take("chunk")
            time.sleep(0.05)
    assert files(tmp_path) == set()


def test_a_process_of_this_machine_that_has_ended_is_known_to_be_gone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    start = processes._started(process.pid)
    owner = replace(this_process(), pid=process.pid, started=start)
    assert start
    assert Claims(tmp_path, 3600, owner).take("chunk")
    assert not Claims(tmp_path, 3600).take("chunk")
    process.kill()
    process.wait()
    assert Claims(tmp_path, 3600).take("chunk")


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    before = replace(this_process(), started="1")  # this number, at the time of another boot
    assert Claims(tmp_path, 3600, before).take("chunk")
    assert Claims(tmp_path, 3600).take("chunk")


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"restart": 0}, True),
        ({"restart": 1}, False),
        ({"restart": 0, "job": "78"}, False),
        ({"restart": 0, "job": None}, False),
    ],
)
def test_a_requeued_job_has_what_it_had_before(
    tmp_path: Path, changes: dict[str, Any], gone: bool
) -> None:
    earlier = replace(ELSEWHERE, **{"job": "77", **changes})
    assert Claims(tmp_path, 3600, earlier).take("chunk")
    again = replace(ELSEWHERE, machine="third/boot/space", job="77", restart=1)
    assert Claims(tmp_path, 3600, again).take("chunk") == gone


def test_a_slow_owner_that_comes_back_gives_back_only_what_is_its_own(tmp_path: Path) -> None:
    slow, heir = Claims(tmp_path, 10, ELSEWHERE), Claims(tmp_path, 10)
    assert slow.take("chunk")
    age(tmp_path / "chunk.0", 11)
    assert heir.take("chunk")
    slow.release("chunk")
    assert not Claims(tmp_path, 10, ELSEWHERE).take("chunk") or (tmp_path / "chunk.1").exists()
    heir.release("chunk")
    assert files(tmp_path) <= {"chunk.0"}


def test_a_claim_without_a_word_in_it_counts_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "chunk.0").touch()  # its owner was killed before it could write
    claims = Claims(tmp_path, 10)
    assert not claims.take("chunk")
    assert claims.held()["chunk"].owner is None
    age(tmp_path / "chunk.0", 11)
    assert claims.take("chunk")


def test_leaving_gives_everything_back(tmp_path: Path) -> None:
    def fail() -> None:
        with Claims(tmp_path) as claims:
            assert claims.take("a")
            assert claims.take("b")
            claims.held()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert files(tmp_path) == set()


def test_who_only_looks_leaves_no_trace(tmp_path: Path) -> None:
    assert Claims(tmp_path / "none").held() == {}
    assert not (tmp_path / "none").exists()
    assert Claims(tmp_path, owner=ELSEWHERE).take("chunk")
    assert list(Claims(tmp_path).held()) == ["chunk"]
    assert files(tmp_path) == {"chunk.0"}


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        Claims(tmp_path / "file").take("chunk")


# --- which process this is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "rank", "count", "position"),
    [
        ({}, 0, 1, (0, 1)),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "3", "NODE_RANK": "0"}, 2, 3, (2, 3)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, 5, 8, (5, 8)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, 3, 4, (3, 4)),
        # the batch script itself, and an interactive shell: no task of srun's
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "9"}, 0, 1, (0, 1)),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            0,
            1,
            (3, 4),
        ),
    ],
)
def test_rank_and_position_are_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    rank: int,
    count: int,
    position: tuple[int, int],
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.count(), processes.position()) == (rank, count, position)
    assert processes.leads() == (rank == 0)


def test_tasks_of_one_array_belong_to_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(processes.LAUNCH, raising=False)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    one = this_process()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    other = this_process()
    assert one.launch == other.launch
    assert not one.beside(other)  # but the one does not wait for the other
    monkeypatch.setenv(processes.LAUNCH, "given")
    assert this_process().launch == "given"


def test_a_step_is_a_launch_and_an_allocation_sees_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (processes.LAUNCH, "SLURM_ARRAY_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert len({processes.launch_id() for _ in range(3)}) == 3
    for name, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    steps = []
    for step in ("0", "1"):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        assert processes.launch_id() == processes.launch_id()
        steps.append(processes.launch_id())
    assert steps[0] != steps[1]
