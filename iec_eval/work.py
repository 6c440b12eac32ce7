"""The queue of a run: every process takes from it what nobody else is making.

There is no list that is handed out and no process that hands out. What is to be done is what has
no file yet; who does it is whoever claims it first. So a process may be slow, join late, be one
of many, or die.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from iec_eval import processes
from iec_eval.claims import Claims
from iec_eval.errors import CorruptFile
from iec_eval.jobs import Job, features_file, network_id
from iec_eval.metrics.features import FeatureNetwork
from iec_eval.runs import IndexRange

POLL_SECONDS, MAX_POLL_SECONDS = 0.5, 10.0
LOOK_SECONDS = 15.0  # between two looks at what is left, while there is work
ATTEMPTS = 3  # a disk that damages what it has just been given is not tried for ever


@dataclass(frozen=True)
class Task:
    """One file to make: images of a range, or what ``network`` sees in them."""

    job: Job
    number: int
    range: IndexRange
    network: FeatureNetwork | None = None

    @property
    def name(self) -> str:
        """What claims call it."""
        kind = "images" if self.network is None else f"features-{network_id(self.network)}"
        return f"{self.job.folder.path.name}.{kind}.{self.range.stem}"

    def made(self) -> bool:
        """Whether this very file is there: one look, where :meth:`done` lists a folder."""
        if self.network is not None:
            return features_file(self.job.folder, self.range, self.network).is_file()
        return self.job.folder.has(self.range)

    def done(self) -> bool:
        """Whether the file is there, or others that hold the same images."""
        return self.made() or (self.network is None and self.job.complete(self.range))


@dataclass(frozen=True)
class Share:
    """What a process may take of the work, and for whom it waits at the end.

    Attributes:
        images: whether to make images.
        features: whether to extract features.
        shard: (i, n): only chunks whose number leaves i when divided by n.
        wait: for every other process; else for those of the same job only.
    """

    images: bool = True
    features: bool = True
    shard: tuple[int, int] = (0, 1)
    wait: bool = True


class Queue:
    """Iterates over tasks that this process has claimed, until all of the run's are done.

    ``stopped()`` ends it early. Rows that failed in this launch are passed over.

    Attributes:
        tell: hears now and then how many images and features are still to be made by whomever;
            if None, nobody looks.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        chunk_size: int,
        share: Share,
        claims: Claims,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._jobs, self._chunk_size, self._share = jobs, chunk_size, share
        self._claims, self._stopped = claims, stopped
        self.tell: Callable[[int], None] | None = None
        self._attempts: Counter[str] = Counter()
        self._given_up: set[str] = set()
        self._idle, self._looked = 0, 0.0

    def __iter__(self) -> Iterator[Task]:
        unneeded = False  # whether the look before found nobody to wait for
        while not self._stopped():
            pending = self.pending()
            self._tell_left(pending)
            taken = 0
            for task in _in_own_order(pending):
                for claimed in self._claimed(task):
                    taken += 1
                    yield claimed
                    yield from self._features_of(claimed)
                    if self.tell and time.monotonic() - self._looked > LOOK_SECONDS:
                        self._tell_left(self.pending())
                if self._stopped():
                    return
            if taken or self._worth_waiting(pending) or self._others_have_what_was_given_up():
                unneeded = False
            elif self._given_up and not unneeded:  # between two tasks others hold nothing
                unneeded = True
            else:
                return
            self._idle = 0 if taken else self._idle + 1
            self._pause(min(POLL_SECONDS * self._idle, MAX_POLL_SECONDS))

    def pending(self) -> list[Task]:
        """Everything that has no file yet, rows in order, images before features."""
        return [
            task
            for number, job in enumerate(self._jobs)
            if not self._failed(job)
            for task in (*self._images(number, job), *self._features(number, job))
            if task.range.start // self._chunk_size % self._share.shard[1] == self._share.shard[0]
        ]

    def _tell_left(self, pending: Sequence[Task]) -> None:
        if self.tell is not None:
            self.tell(sum(map(self._units, pending)))
        self._looked = time.monotonic()

    def _units(self, task: Task) -> int:
        """Images and features that come of a task: who makes images looks at them too."""
        looks = task.network is None and self._share.features
        return len(task.range) * (1 + (len(task.job.networks) if looks else 0))

    def _images(self, number: int, job: Job) -> list[Task]:
        missing = job.missing(self._chunk_size) if self._share.images else []
        return [Task(job, number, part) for part in missing]

    def _features(self, number: int, job: Job) -> list[Task]:
        unseen = job.unseen() if self._share.features else []
        return [Task(job, number, part, network) for part, network in unseen]

    def _features_of(self, made: Task) -> Iterator[Task]:
        """What networks see in images that were made just now, before they are out of mind."""
        if made.network is None and self._share.features:
            for network in made.job.networks:
                if not self._stopped():
                    yield from self._claimed(replace(made, network=network))

    def _claimed(self, task: Task) -> Iterator[Task]:
        """The task, if it is to be had and still to be done; given back afterwards."""
        # most tasks of others are done when one comes to them: not worth a claim for each
        if self._failed(task.job) or task.made() or not self._claims.take(task.name):
            return
        try:
            if not task.done():
                self._count(task)
                yield task
        finally:
            self._claims.release(task.name)

    def _count(self, task: Task) -> None:
        self._attempts[task.name] += 1
        if self._attempts[task.name] > ATTEMPTS:
            raise CorruptFile(
                f"{task.job.folder.path}: images {task.range.start} to {task.range.stop - 1} were "
                f"made {ATTEMPTS} times and found damaged each time; check the disk and the memory"
            )

    def give_up(self, job: Job) -> None:
        """Pass over all that is left of a row, whatever others make of it.

        Other processes of this job that go on with it are waited for.
        """
        self._given_up.add(job.folder.path.name)

    def _failed(self, job: Job) -> bool:
        failed = job.folder.failure(self._claims.owner.launch) is not None
        return failed or job.folder.path.name in self._given_up

    def _worth_waiting(self, pending: Sequence[Task]) -> bool:
        """Whether somebody makes what is left, and could leave it to this process."""
        if not pending:
            return False
        held, names = self._claims.held(), {task.name for task in pending}
        owners = [claim.owner for name, claim in held.items() if name in names]
        ours = [one for one in owners if one is None or one.beside(self._claims.owner)]
        return bool(ours) or (bool(owners) and self._share.wait) or len(owners) < len(names)

    def _others_have_what_was_given_up(self) -> bool:
        """Whether a process that ends with this one still makes what this one cannot."""
        if not self._given_up:
            return False
        mine = self._claims.owner
        return any(
            name.split(".")[0] in self._given_up
            and one.owner is not None
            and one.owner.beside(mine)
            for name, one in self._claims.held().items()
        )

    def _pause(self, seconds: float) -> None:
        ends = time.monotonic() + min(seconds, self._claims.timeout / 4)
        while time.monotonic() < ends and not self._stopped():
            time.sleep(0.05)


def something_to_do(jobs: Sequence[Job], chunk_size: int, share: Share) -> bool:
    """Whether any file is missing that ``share`` allows to make."""
    images = share.images and any(job.missing(chunk_size) for job in jobs)
    return images or (share.features and any(job.unseen() for job in jobs))


@contextmanager
def waiting(claims: Claims, name: str) -> Iterator[None]:
    """Hold the claim on ``name`` in the block; first waits for whoever has it, and says so."""
    told = False
    while not claims.take(name):
        holder = claims.held().get(name)
        if holder is not None and holder.owner is not None and not told:
            told = True
            one = holder.owner
            work = name.split(".")[0]
            processes.say(f"waiting for process {one.pid} on {one.host}, which does {work}")
        time.sleep(min(MAX_POLL_SECONDS, claims.timeout / 4))
    try:
        yield
    finally:
        claims.release(name)


def _in_own_order(pending: Sequence[Task]) -> list[Task]:
    """Each process begins with tasks of its own; those of others come last, the last ones first.

    So processes rarely ask for the same task, and whoever helps stays away from where the others
    work.
    """
    place, total = processes.position()
    own = range(place % total, len(pending), total)
    others = (index for index in reversed(range(len(pending))) if index not in own)
    return [pending[index] for index in (*own, *others)]
