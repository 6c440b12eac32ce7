"""The queue: who begins where, what is still to be done, whom one waits for, and when one stops."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, model_serializer

from iec_eval import processes, ranks, work
from iec_eval.claims import Claims
from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.generation import _batches
from iec_eval.processes import Owner
from iec_eval.runs import Chunk, IndexRange, Spent, VariantFolder, missing_ranges
from iec_eval.stopping import (
    SAME_REQUEST_SECONDS,
    StopRequest,
    Terminated,
    ending_when_asked,
)
from iec_eval.study import ExecutionSpec
from iec_eval.work import ATTEMPTS, Queue, Share, Task, _in_own_order, something_to_do, waiting

OTHER = Owner("other-host/boot/space", 17, "1", 0, None, 0, "another launch")


@dataclass(frozen=True)
class Row:
    """A row as far as the queue knows it: images in files, no networks."""

    folder: VariantFolder
    count: int = 12
    networks: tuple[Any, ...] = ()

    def missing(self, chunk_size: int) -> list[IndexRange]:
        return missing_ranges(self.folder.finished(), self.count, chunk_size)

    def complete(self, part: IndexRange) -> bool:
        before = IndexRange(0, part.start)
        return not missing_ranges([before, *self.folder.finished()], part.stop, part.stop)

    def unseen(self) -> list[Any]:
        return []

    def make(self, part: IndexRange) -> None:
        images = torch.zeros(len(part), 1, 2, 2, dtype=torch.uint8)
        self.folder.write_chunk(Chunk(part, images, Spent(1, 0, 0.1)))


@pytest.fixture
def rows(tmp_path: Path) -> list[Any]:
    return [Row(VariantFolder(tmp_path / name)) for name in ("a", "b")]


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    with Claims(tmp_path / "claims", 8) as mine:
        yield mine


@pytest.fixture
def other(tmp_path: Path) -> Claims:
    """Claims of a process elsewhere."""
    return Claims(tmp_path / "claims", 8, OTHER)


def finish(queue: Queue, limit: float = 20) -> list[str]:
    """Do everything the queue gives; which tasks these were."""
    done, ends = [], time.monotonic() + limit
    for task in queue:
        assert time.monotonic() < ends, "the queue does not end"
        task.job.make(task.range)
        done.append(task.name)
    return done


# --- what there is to do --------------------------------------------------------------------------


def test_a_queue_gives_everything_once_and_leaves_no_claim(rows: list[Any], claims: Claims) -> None:
    done = finish(Queue(rows, 4, Share(), claims))
    assert sorted(done) == [
        f"{row}.images.{start:06d}-{start + 3:06d}" for row in "ab" for start in (0, 4, 8)
    ]
    assert claims.held() == {}
    assert not something_to_do(rows, 4, Share())
    assert finish(Queue(rows, 4, Share(), claims)) == []


def test_what_is_left_counts_what_others_made_meanwhile(
    rows: list[Any], claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOOK_SECONDS", 0)
    heard, queue = list[int](), Queue(rows, 4, Share(), claims)
    queue.tell = heard.append
    for number, task in enumerate(queue):
        task.job.make(task.range)
        if number == 0:
            rows[1].make(IndexRange(0, 4))
    assert heard == [24, 16, 12, 8, 4, 0, 0]


def test_what_others_made_meanwhile_is_not_made_again(rows: list[Any], claims: Claims) -> None:
    done = []
    for task in Queue(rows, 4, Share(), claims):
        done.append(task.name)
        task.job.make(task.range)
        for row in rows:
            row.make(IndexRange(8, 12))
    assert sorted(name[-13:] for name in done if name.startswith("b")) == [
        "000000-000003",
        "000004-000007",
    ]


def test_what_others_made_meanwhile_is_not_even_claimed(
    rows: list[Any], claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many processes and chunks that would be a claim for each of both."""
    asked, take = [], claims.take
    monkeypatch.setattr(claims, "take", lambda name: asked.append(name) or take(name))
    for task in Queue(rows, 4, Share(), claims):
        for row in rows:
            for start in (0, 4, 8):
                row.make(IndexRange(start, start + 4))
        assert asked == [task.name]
    assert len(asked) == 1


def test_shards_share_the_chunks_among_them(rows: list[Any], claims: Claims) -> None:
    shares = [Share(shard=(i, 3), wait=False) for i in range(3)]
    names = [[t.name for t in Queue(rows, 4, share, claims).pending()] for share in shares]
    assert [len(part) for part in names] == [2, 2, 2]
    assert len({name for part in names for name in part}) == 6


def test_a_row_that_failed_in_this_launch_is_passed_over_and_an_older_failure_is_not(
    rows: list[Any], claims: Claims
) -> None:
    rows[0].folder.write_failure("no", "trace", claims.owner.launch)
    rows[1].folder.write_failure("no", "trace", "earlier")
    done = finish(Queue(rows, 4, Share(), claims))
    assert {name[0] for name in done} == {"b"}
    for row in rows:
        row.folder.forget_failure(claims.owner.launch)
    assert rows[0].folder.failure() == "no"
    assert rows[1].folder.failure() is None


def test_a_row_that_was_given_up_is_passed_over_though_nothing_is_on_record(
    rows: list[Any], claims: Claims
) -> None:
    queue, done = Queue(rows, 4, Share(), claims), []
    for task in queue:
        done.append(task.name)
        if task.job is rows[0]:
            queue.give_up(task.job)
        else:
            task.job.make(task.range)
    assert sum(name.startswith("a.") for name in done) == 1
    assert sum(name.startswith("b.") for name in done) == 3


def test_others_that_go_on_with_a_row_that_was_given_up_are_waited_for(
    rows: list[Any], claims: Claims
) -> None:
    """This process's device has no memory left for it; theirs has."""
    beside = replace(claims.owner, pid=claims.owner.pid + 1, started="")
    colleague = Claims(claims.folder, 8, beside)
    assert colleague.take("a.images.000000-000003")
    queue = Queue(rows[:1], 4, Share(), claims)
    queue.give_up(rows[0])
    ended = threading.Event()
    waiting = threading.Thread(target=lambda: (finish(queue), ended.set()))
    waiting.start()
    assert not ended.wait(2.5)
    colleague.release("a.images.000000-000003")
    assert ended.wait(10)
    waiting.join()


def test_strangers_that_go_on_with_a_row_that_was_given_up_are_not_waited_for(
    rows: list[Any], claims: Claims, other: Claims
) -> None:
    assert other.take("a.images.000000-000003")
    queue = Queue(rows[:1], 4, Share(), claims)
    queue.give_up(rows[0])
    assert finish(queue, 3) == []


def test_what_is_damaged_again_and_again_ends_with_a_message(
    rows: list[Any], claims: Claims
) -> None:
    made = []

    def make_and_lose() -> None:
        for task in Queue(rows[:1], 12, Share(), claims):
            task.job.make(task.range)
            next(task.job.folder.chunks.iterdir()).unlink()
            made.append(task)

    with pytest.raises(CorruptFile, match="found damaged each time; check the disk"):
        make_and_lose()
    assert len(made) == ATTEMPTS


# --- together with others -------------------------------------------------------------------------


def test_what_another_process_makes_is_waited_for(
    rows: list[Any], claims: Claims, other: Claims
) -> None:
    name = Task(rows[0], 0, IndexRange(4, 8)).name
    assert other.take(name)

    def end() -> None:
        rows[0].make(IndexRange(4, 8))
        other.release(name)

    timer = threading.Timer(1.5, end)
    timer.start()
    done = finish(Queue(rows, 4, Share(wait=True), claims))
    assert rows[0].complete(IndexRange(0, 12))
    assert name not in done
    timer.join()


def test_what_a_process_of_another_job_makes_is_not_waited_for_by_those_who_need_not(
    rows: list[Any], claims: Claims, other: Claims
) -> None:
    name = Task(rows[0], 0, IndexRange(4, 8)).name
    assert other.take(name)
    done = finish(Queue(rows, 4, Share(wait=False), claims))
    assert len(done) == 5
    assert name not in done


def test_a_process_of_ones_own_job_is_always_waited_for_and_replaced_if_it_dies(
    rows: list[Any], claims: Claims, tmp_path: Path
) -> None:
    beside = replace(OTHER, launch=claims.owner.launch, job=claims.owner.job)
    name = Task(rows[0], 0, IndexRange(4, 8)).name
    assert Claims(tmp_path / "claims", 8, beside).take(name)
    claim = tmp_path / "claims" / f"{name}.0"
    os.utime(claim, (time.time() - 6.5, time.time() - 6.5))  # silent, and soon too long so
    began = time.monotonic()
    assert finish(Queue(rows, 4, Share(wait=False), claims))[-1] == name
    assert time.monotonic() - began > 1


def test_holding_a_claim_waits_for_whoever_has_it(
    claims: Claims, other: Claims, capsys: pytest.CaptureFixture[str]
) -> None:
    assert other.take("calibration.abc")
    threading.Timer(1.0, other.release, ["calibration.abc"]).start()
    with waiting(claims, "calibration.abc"):
        assert not other.take("calibration.abc")
    assert other.take("calibration.abc")
    said = capsys.readouterr().err
    assert said.count("waiting for process 17 on other-host, which does calibration") == 1


@pytest.mark.parametrize("total", [1, 2, 3, 7, 40])
def test_every_process_sees_all_tasks_and_no_two_begin_alike(
    monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    tasks: list[Any] = list(range(20))
    orders = []
    for place in range(total):
        monkeypatch.setattr("iec_eval.processes.position", lambda place=place: (place, total))
        orders.append(_in_own_order(tasks))
    for place, order in enumerate(orders):
        assert sorted(order) == tasks
        own = tasks[place::total]
        assert order[: len(own)] == own
    first = [order[0] for order in orders[:20]]
    assert len(set(first)) == len(first)


# --- micro-batches --------------------------------------------------------------------------------


def test_micro_batches_are_cut_as_if_the_chunk_had_never_been_begun() -> None:
    execution = ExecutionSpec(batch_size=4, chunk_size=10)
    whole = IndexRange(10, 20)
    fresh = _batches(whole, [], execution)
    assert fresh == [IndexRange(10, 14), IndexRange(14, 18), IndexRange(18, 20)]
    assert _batches(whole, [IndexRange(10, 14)], execution) == fresh[1:]
    assert _batches(whole, [IndexRange(14, 18)], execution) == [fresh[0], fresh[2]]
    assert _batches(whole, fresh, execution) == []
    # an earlier run of fewer images has ended inside
    assert _batches(IndexRange(13, 20), [], execution) == [
        IndexRange(13, 14),
        IndexRange(14, 18),
        IndexRange(18, 20),
    ]


def test_micro_batches_and_pieces_are_the_whole() -> None:
    rng = random.Random(0)
    for _ in range(300):
        size, batch = rng.randint(1, 12), rng.randint(1, 12)
        start = size * rng.randint(0, 3)
        whole = IndexRange(start + rng.randrange(size), start + size)
        cuts = sorted(rng.sample(range(whole.start, whole.stop + 1), min(len(whole) + 1, 4)))
        there = [IndexRange(*cuts[:2])] if len(cuts) > 1 else []
        there += [IndexRange(*cuts[2:])] if len(cuts) == 4 else []
        made = _batches(whole, there, ExecutionSpec(batch_size=batch, chunk_size=size))
        listed = [index for part in sorted([*made, *there]) for index in part.indices]
        assert listed == list(whole.indices)
        assert all(len(part) <= batch for part in made)
        assert all(
            (part.start - start) // batch == (part.stop - 1 - start) // batch for part in made
        )


# --- how processes are started -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_copy_the_process_are_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{strategy}.*wanted auto or ddp"):
        ranks.trainer(ExecutionSpec(devices=2, accelerator="cpu", strategy=strategy), [])


def test_nodes_that_nobody_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    execution = ExecutionSpec(num_nodes=2, devices=1, accelerator="cpu")
    with pytest.raises(ConfigError, match=r"2 nodes need .*wanted srun, torchrun, or MASTER_ADDR"):
        ranks.trainer(execution, [])
    for name, value in {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.asked_for(execution) == (1, 2)
    assert not processes.leads()


# --- being asked to stop --------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_the_first_request_is_polite_and_the_second_is_not(
    signum: signal.Signals, status: int
) -> None:
    stop, heard = StopRequest(), []
    stop.pass_on_to(heard.append)
    with stop.listening():
        stop.check()
        assert not stop
        os.kill(os.getpid(), signum)
        assert stop
        stop.check(urgent=True)  # what runs goes on
        with pytest.raises(Terminated) as asked:
            stop.check()
        assert asked.value.status == status
        os.kill(os.getpid(), signum)  # the same request, on another way
        stop.check(urgent=True)
        time.sleep(SAME_REQUEST_SECONDS + 0.1)
        os.kill(os.getpid(), signum)
        with pytest.raises(Terminated):
            stop.check(urgent=True)
    assert heard == [signum] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_an_interruption_is_not_hidden_by_the_library_it_went_through(
    number: signal.Signals,
) -> None:
    """pydantic makes an error of its own of whatever one of its callbacks raises."""

    class Slow(BaseModel):
        @model_serializer
        def _written(self) -> dict[str, str]:
            signal.raise_signal(number)
            return {}

    # a shell has what it starts in the background ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((Terminated, KeyboardInterrupt)) as ended, ending_when_asked():
            Slow().model_dump()
    finally:
        signal.signal(signal.SIGINT, before)
    assert getattr(ended.value, "signum", signal.SIGINT) == number


def test_errors_leave_the_block_as_they_are() -> None:
    with pytest.raises(KeyError, match="own"), ending_when_asked():
        raise KeyError("own") from ValueError("cause")


def test_requests_end_with_their_block() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
