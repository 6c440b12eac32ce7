"""Whatever is done to the processes of a run, it ends as an undisturbed one would have.

Processes are killed, stopped, asked to end and started twice; files are damaged and disks full.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import DEEPCACHE, environment
from forks import Fork, Server, serving
from places import WITNESS, Place, assert_identical, assert_same_run

from iec_eval import storage
from iec_eval.generation import record_failure
from iec_eval.results import read_results
from iec_eval.runs import Chunk, IndexRange, VariantFolder, finished_ranges

BATCH, CHUNK, COUNT, STEPS = 2, 8, 24, 5
ROWS: list[dict[str, Any]] = [
    {"name": "cached", "efficiency": [DEEPCACHE], "callbacks": [WITNESS]},
    {"name": "cached + IEC", "efficiency": [DEEPCACHE], "callbacks": [WITNESS, {"name": "iec"}]},
    {"name": "w8a8", "efficiency": [{"name": "timestep-quantizer"}], "callbacks": [WITNESS]},
]
EXECUTION = {"batch_size": BATCH, "chunk_size": CHUNK, "threads": 1, "accelerator": "cpu"}
PATIENCE = 300.0  # seconds for anything that must happen, on a busy machine too
pytestmark = pytest.mark.usefixtures("witness")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, witness: None) -> Iterator[Server]:
    """Starts real processes in a fraction of a second."""
    with serving(tmp_path_factory.mktemp("logs"), environment()) as made:
        yield made


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place]) -> Callable[..., Place]:
    """A new run folder of one study; its claims last for a few seconds."""

    def make(**changes: Any) -> Place:
        execution = {**EXECUTION, "claim_timeout": 5.0, **changes.pop("execution", {})}
        settings = {"variants": ROWS, "calibration": {"images": 4}, **changes}
        return make_place(images={"seed": 7, "count": COUNT}, execution=execution, **settings)

    return make


@pytest.fixture(scope="module")
def undisturbed(server: Server, place: Callable[..., Place]) -> Place:
    """One process, started once."""
    made = place()
    fork = start(server, made)
    assert fork.wait(PATIENCE) == 0, fork.said
    return made


def copy_of(place: Place) -> Place:
    """The same run in another folder, with notes of its own."""
    number = len(list(place.out.parent.iterdir()))
    out, notes = (place.out.with_name(f"{kind}{number}") for kind in ("out", "notes"))
    shutil.copytree(place.out, out)
    notes.mkdir()
    return Place(place.study, out, notes)


def start(
    server: Server, place: Place, *overrides: str, verb: str = "launch", pause: float = 0
) -> Fork:
    """A real process; the witness pauses in every step."""
    notes = {"WITNESS_NOTES": str(place.notes), "WITNESS_PAUSE": str(pause)}
    return server.start(*place.arguments(*overrides, verb=verb), **notes)


def needed(count: int = COUNT) -> int:
    """Micro-batches of all rows."""
    return len(ROWS) * -(-count // BATCH)


def wait_for(what: Callable[[], Any], *forks: Fork) -> Any:
    """What ``what`` gives once it gives something; the processes must still run then."""
    limit = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < limit, "it did not come in time"
        assert all(fork.poll() is None for fork in forks), [fork.said for fork in forks]
        time.sleep(0.005)
    return found


def test_the_study_is_worth_disturbing(undisturbed: Place) -> None:
    """Rows differ, each has several chunks, each chunk several parts, and one is calibrated."""
    images = list(undisturbed.images().values())
    assert len(images) == len(ROWS)
    assert not any(torch.equal(images[0], other) for other in images[1:])
    assert CHUNK // BATCH > 2
    assert COUNT // CHUNK > 2
    assert len(list((undisturbed.out / "artifacts").glob("*.safetensors"))) == 1
    assert len(undisturbed.features()) == len(undisturbed.chunks) == len(ROWS) * COUNT // CHUNK
    assert undisturbed.begun(BATCH) == needed()
    assert not undisturbed.leftovers


# --- killed, again and again --------------------------------------------------------------------

MANY = 96  # images
PHASES = {"calibration", "images", "features", "scoring", "report"}
STARTING = 0.5  # seconds that a process needs until it takes its first work, more or less
MOST_STEPS = 25  # those of five micro-batches
# what is waited for, how often, and how much CPU time passes until the kill
AIMS: list[tuple[str | None, int, float]] = [
    ("calibration", 5, 0.15),
    ("features", 10, 0.01),  # it takes no longer
    ("images", 18, 0.02),  # after a random number of steps
    (None, 5, STARTING),
    ("scoring", 6, 0.8),
    ("report", 6, 0.3),
]
KILLS = sum(times for _, times, _ in AIMS)


@dataclass
class Soak:
    """Two processes at a time in one run folder, one after the other killed at random moments.

    Moments are told by the work that is done, and by CPU time: those of a fast or busy machine are
    the same. The kills before scoring leave work for each other: ten chunks of four micro-batches
    and 18 times five micro-batches are fewer than the 144 there are.
    """

    server: Server
    place: Place
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"images.count={MANY}",)

    def run(self) -> None:
        limit = time.monotonic() + 3 * PATIENCE
        aims = [(aim, longest) for aim, times, longest in AIMS for _ in range(times)]
        living = [self.begin(*aims[0]), self.begin(*aims[1])]
        while self.kills.total() < KILLS:
            assert time.monotonic() < limit, self.kills
            time.sleep(0.002)
            for place, victim in enumerate(living):
                if self.ended(victim):
                    living[place] = self.begin(*aims[min(self.kills.total() + 1, KILLS - 1)])
        for victim in living:
            victim.fork.kill()

    def begin(self, aim: str | None, longest: float) -> Victim:
        passed = {"calibration": calibrated, "features": scored, "images": scored}
        if aim in passed and passed[aim](self.place):
            aim, longest = None, STARTING
        fork = start(self.server, self.place, *self.overrides)
        steps = self.chance.randrange(MOST_STEPS) if aim == "images" else 0
        return Victim(fork, self.chance.uniform(0, longest), aim, steps)

    def ended(self, victim: Victim) -> bool:
        """Whether a process has come to its end, by being killed now if its time has come."""
        if victim.fork.poll() is None and not victim.due(self.place):
            return False
        if victim.fork.kill() == -signal.SIGKILL:
            self.kills[victim.phase(self.place)] += 1
        else:
            assert victim.fork.status == 0, victim.fork.said
        return True


@dataclass
class Victim:
    """A process that will be killed after ``lifetime``: since its start, or since its aim.

    It has reached its aim when it is at it and has begun so many denoising steps.
    """

    fork: Fork
    lifetime: float
    aim: str | None
    steps: int = 0
    since: float = 0.0

    def due(self, place: Place) -> bool:
        used = cpu_seconds(self.fork.pid)
        if self.aim and self.reached(place):
            self.aim, self.since = None, used
        return self.aim is None and used - self.since >= self.lifetime

    def reached(self, place: Place) -> bool:
        return self.aim in self.doing(place) and steps_begun(place, self.fork.pid) >= self.steps

    def phase(self, place: Place) -> str:
        """What it did when it was killed, from what it left.

        Who extracts features holds the claim on their images too.
        """
        doing = self.doing(place)
        return "features" if "features" in doing else next(iter(doing), "between")

    def doing(self, place: Place) -> set[str]:
        """What its claims are for, or what it does when there is nothing left to claim."""
        results = place.out / "results.json"
        if results.is_file() and results.stat().st_mtime > self.fork.began:
            return {"report"}
        return claimed(place, self.fork.pid) or ({"scoring"} if scored(place) else set())


def claimed(place: Place, pid: int) -> set[str]:
    """Kinds of work that a process has claims on."""
    kinds = set()
    for path in (place.out / "claims").glob("[!.]*"):
        with suppress(FileNotFoundError, ValueError):
            if json.loads(path.read_text())["pid"] == pid:
                words = path.name.split(".")
                kinds.add("calibration" if words[0] == "calibration" else words[1].split("-")[0])
    return kinds


def steps_begun(place: Place, pid: int) -> int:
    """Denoising steps that a process has begun, by its notes: a line an image."""
    notes = place.notes / f"{pid}.txt"
    return len(notes.read_text().splitlines()) // BATCH if notes.exists() else 0


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def calibrated(place: Place) -> bool:
    """Whether there is nothing to calibrate any more."""
    artifacts = place.out.glob("artifacts/*.json")
    return any(json.loads(path.read_text())["part"] != "unfinished" for path in artifacts)


def scored(place: Place) -> bool:
    """Whether all features are there."""
    return len(list(place.out.glob("*/features/*/*.safetensors"))) == len(ROWS) * MANY // CHUNK


@pytest.fixture(scope="module")
def soaked(server: Server, place: Callable[..., Place]) -> Soak:
    """A run that was killed fifty times, and then left to itself once."""
    soak = Soak(server, place(), random.Random(20))
    soak.run()
    last = start(server, soak.place, *soak.overrides)
    assert last.wait(PATIENCE) == 0, last.said
    return soak


@pytest.mark.slow
def test_kills_hit_every_phase(soaked: Soak) -> None:
    assert soaked.kills.total() >= KILLS
    assert soaked.kills.keys() >= PHASES, soaked.kills


@pytest.mark.slow
def test_a_run_killed_fifty_times_is_an_undisturbed_one(
    soaked: Soak, server: Server, place: Callable[..., Place]
) -> None:
    undisturbed = place()
    fork = start(server, undisturbed, *soaked.overrides)
    assert fork.wait(PATIENCE) == 0, fork.said
    assert_same_run(soaked.place, undisturbed)
    assert soaked.place.noises() == undisturbed.noises()


@pytest.mark.slow
def test_a_kill_costs_at_most_the_running_micro_batch(soaked: Soak) -> None:
    begun = soaked.place.begun(BATCH)
    assert needed(MANY) <= begun <= needed(MANY) + soaked.kills.total()
    # and not because there were hardly any kills in the middle of one
    assert begun > needed(MANY)


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_launches_at_once_share_the_work(
    server: Server, place: Callable[..., Place], undisturbed: Place
) -> None:
    made = place()
    forks = [start(server, made, pause=0.02) for _ in range(2)]
    assert [fork.wait(PATIENCE) for fork in forks] == [0, 0], [fork.said for fork in forks]
    tables = [without_seconds(fork.said) for fork in forks]
    assert tables[0] == tables[1] != []
    assert len(list(made.notes.iterdir())) == 2  # both made images
    assert made.begun(BATCH) == needed()  # and nothing was made twice
    assert_same_run(made, undisturbed)


def without_seconds(said: str) -> list[list[str]]:
    """The lines of the table, without the column that is measured."""
    rows = [line.split("|") for line in said.splitlines() if line.startswith("| ")]
    times = [i for i, title in enumerate(rows[0]) if "seconds" in title]
    return [[cell for i, cell in enumerate(row) if i not in times] for row in rows]


def test_a_failure_is_known_to_every_launch_that_met_it(tmp_path: Path) -> None:
    folder = VariantFolder(tmp_path)
    for launch_id in ("one", "two", "one"):
        folder.write_failure("it broke", "launch: nowhere\nin a plugin", launch_id)
    assert folder.failure() == folder.failure("one") == folder.failure("two") == "it broke"
    assert folder.failure("three") is None
    assert folder.failure("nowhere") is None
    folder.forget_failure("two")
    assert folder.failure("one") == "it broke"
    folder.forget_failure("three")
    assert folder.failure() is None
    folder.write_failure("it broke", "", "one")
    folder.forget_failure()
    assert folder.failure() is None


def test_a_fault_of_one_device_is_no_reason_for_the_others(tmp_path: Path) -> None:
    folder = VariantFolder(tmp_path)
    record_failure(folder, torch.OutOfMemoryError("of 80 GB 79 are taken"), "one")
    assert folder.failure() == "OutOfMemoryError: of 80 GB 79 are taken"
    assert folder.failure("one") is None  # whoever has memory left goes on
    record_failure(folder, RuntimeError("shapes"), "one")
    assert folder.failure("one") == "RuntimeError: shapes"


def test_a_row_that_fails_in_two_launches_at_once_is_not_tried_for_ever(
    server: Server, place: Callable[..., Place]
) -> None:
    sick = {**ROWS[0], "name": "sick", "callbacks": [{**WITNESS, "fails": True}]}
    made = place(variants=[sick, ROWS[1]])
    notes = {"WITNESS_NOTES": str(made.notes), "WITNESS_PAUSE": "0.02", "WITNESS_FAILS": "8"}
    forks = [server.start(*made.arguments(verb="launch"), **notes) for _ in range(2)]
    assert [fork.wait(PATIENCE) for fork in forks] == [1, 1], [fork.said for fork in forks]
    first, second = read_results(made.out / "results.json").variants
    assert (first.status, second.status) == ("failed", "done")
    assert first.error == "RuntimeError: the witness was told to fail"


# --- asked to stop --------------------------------------------------------------------------------


def finished_batches(place: Place) -> int:
    """Micro-batches whose images are on disk."""
    stems = [*finished_in(place, "chunks"), *finished_in(place, "parts")]
    return sum(-(-len(part) // BATCH) for part in stems)


def finished_in(place: Place, kind: str) -> list[IndexRange]:
    return [part for folder in place.out.glob(f"*/{kind}") for part in finished_ranges(folder)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_request_to_stop_loses_nothing(
    server: Server,
    place: Callable[..., Place],
    undisturbed: Place,
    number: signal.Signals,
    status: int,
) -> None:
    made = place()
    fork = start(server, made, pause=0.05)
    wait_for(lambda: made.parts, fork)
    fork.signal(number)
    assert fork.wait(PATIENCE) == status, fork.said
    assert "everything finished is kept, run the same command again" in fork.said
    assert "Traceback" not in fork.said
    begun = made.begun(BATCH)
    assert 0 < begun == finished_batches(made) < needed()
    assert finished_in(made, "parts")  # it did not go on to the end of the chunk
    last = start(server, made)
    assert last.wait(PATIENCE) == 0, last.said
    assert made.begun(BATCH) == needed()
    assert_same_run(made, undisturbed)


@pytest.mark.slow
def test_a_second_request_does_not_wait_for_the_micro_batch(
    server: Server, place: Callable[..., Place], undisturbed: Place
) -> None:
    made = place()
    fork = start(server, made, pause=2)
    wait_for(lambda: list(made.notes.iterdir()), fork)
    fork.signal(signal.SIGTERM)
    time.sleep(1.5)
    fork.signal(signal.SIGTERM)
    assert fork.wait(PATIENCE) == 143, fork.said
    assert max(step for _, step, _ in made.witnessed()) < STEPS - 1
    assert made.chunks == {}
    assert made.parts == []
    last = start(server, made)
    assert last.wait(PATIENCE) == 0, last.said
    assert_same_run(made, undisturbed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
@pytest.mark.parametrize("work", ["calibration", "waiting", "report"])
def test_a_request_to_stop_is_understood_at_any_time(
    server: Server,
    place: Callable[..., Place],
    undisturbed: Place,
    work: str,
    number: signal.Signals,
    status: int,
) -> None:
    made = place(calibration={"images": 2000}) if work != "report" else copy_of(undisturbed)
    begun = time.time()
    forks = [start(server, made)]
    if work == "report":
        wait_for(lambda: (made.out / "results.json").stat().st_mtime > begun, *forks)
    else:
        wait_for(lambda: "calibration" in claimed(made, forks[0].pid), *forks)
    if work == "waiting":
        forks.append(start(server, made))
        wait_for(lambda: "waiting for process" in forks[1].said, *forks)
    forks[-1].signal(number)
    assert forks[-1].wait(PATIENCE) == status, forks[-1].said
    assert "everything finished is kept, run the same command again" in forks[-1].said
    assert "Traceback" not in forks[-1].said
    assert claimed(made, forks[-1].pid) == set()
    forks[0].kill()


# --- stopped, and going on later ------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_process_loses_its_work_to_others_and_harms_nothing_later(
    server: Server, place: Callable[..., Place], undisturbed: Place
) -> None:
    made = place(execution={"claim_timeout": 1.0})
    stopped = start(server, made, pause=0.1)
    wait_for(lambda: made.parts, stopped)
    stopped.signal(signal.SIGSTOP)
    assert "images" in claimed(made, stopped.pid)
    other = start(server, made)
    assert other.wait(PATIENCE) == 0, other.said
    assert stopped.poll() is None
    assert_identical(made, undisturbed)
    stopped.signal(signal.SIGCONT)
    assert stopped.wait(PATIENCE) == 0, stopped.said
    assert_same_run(made, undisturbed)


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle of the data of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) - len(content) // 8] ^= 1
    path.write_bytes(content)


def launch(place: Place, cli: Callable[..., Result], *overrides: str) -> Result:
    """In this process, with the witness's notes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WITNESS_NOTES", str(place.notes))
        return cli(*place.arguments(*overrides, verb="launch"))


@pytest.mark.parametrize(("number", "scored_before"), [(0, True), (0, False), (2, False)])
def test_a_flipped_bit_in_images_is_found_and_they_are_made_again(
    undisturbed: Place, cli: Callable[..., Result], number: int, scored_before: bool
) -> None:
    made = copy_of(undisturbed)
    path = list(made.chunks)[number]
    flip(path)
    if not scored_before:
        shutil.rmtree(path.parents[1] / "features")
    done = launch(made, cli)
    assert done.exit_code == 0, done.output
    assert f"{path}: its content does not match its checksum" in done.stderr
    assert f"set aside as {path.with_suffix('.corrupt').name}" in done.stderr
    assert made.begun(BATCH) == CHUNK // BATCH
    assert_same_run(made, undisturbed)


def test_a_flipped_bit_in_images_that_only_people_want_is_found_when_they_do(
    undisturbed: Place, cli: Callable[..., Result], tmp_path: Path
) -> None:
    """All scores are from features by then, and the gallery shows other images."""
    made = copy_of(undisturbed)
    path = list(made.chunks)[2]
    flip(path)
    assert launch(made, cli).exit_code == 0
    assert path.is_file()
    exported = cli("export", made.out, tmp_path / "pictures")
    assert exported.exit_code == 2
    assert f"{path}: its content does not match its checksum" in exported.stderr
    assert launch(made, cli).exit_code == 0
    assert made.begun(BATCH) == CHUNK // BATCH
    assert_same_run(made, undisturbed)


def test_a_flipped_bit_in_a_part_costs_that_part(
    undisturbed: Place, cli: Callable[..., Result]
) -> None:
    made = copy_of(undisturbed)
    folder = VariantFolder(sorted(made.out.glob("*/chunks"))[1].parent)
    whole = folder.finished()[1]
    chunk = folder.read_chunk(whole)
    (folder.chunks / f"{whole.stem}.safetensors").unlink()
    for first in range(0, CHUNK, BATCH):
        part = IndexRange(whole.start + first, whole.start + first + BATCH)
        folder.write_part(Chunk(part, chunk.images[first : first + BATCH], chunk.spent))
    flip(made.parts[1])
    done = launch(made, cli)
    assert done.exit_code == 0, done.output
    assert "its content does not match its checksum; it is made again" in done.stderr
    assert made.begun(BATCH) == 1
    assert_identical(made, undisturbed)
    assert made.leftovers == []


def test_a_flipped_bit_in_features_is_found_and_they_are_extracted_again(
    undisturbed: Place, cli: Callable[..., Result]
) -> None:
    made = copy_of(undisturbed)
    path = next(made.out.glob("*/features/*/*.safetensors"))
    flip(path)
    done = launch(made, cli)
    assert done.exit_code == 0, done.output
    assert f"{path}: its content does not match its checksum" in done.stderr
    assert made.begun(BATCH) == 0
    assert_same_run(made, undisturbed)


def test_a_flipped_bit_in_an_artifact_is_found_and_it_is_calibrated_again(
    undisturbed: Place, cli: Callable[..., Result]
) -> None:
    made = copy_of(undisturbed)
    (path,) = (made.out / "artifacts").glob("*.safetensors")
    _, about = storage.read_tensors(path)
    flip(path)
    for chunks in made.out.glob("w8a8-*/chunks"):
        shutil.rmtree(chunks)
    done = launch(made, cli)
    assert done.exit_code == 0, done.output
    assert f"{path}: its content does not match its checksum; it is calibrated" in done.stderr
    tensors, again = storage.read_tensors(path)
    assert again == about
    assert storage.content_digest(tensors) == about["content"]
    assert_same_run(made, undisturbed)


def test_a_disk_that_is_full_after_a_part_costs_nothing(
    undisturbed: Place,
    place: Callable[..., Place],
    cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, save = place(), storage.save_file

    def save_two_parts(tensors: Any, path: Path, about: Any) -> None:
        if path.parent.name == "parts" and len(made.parts) > 2:  # one of them is being written
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, about)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", save_two_parts)
        failed = launch(made, cli)
    assert failed.exit_code == 2
    assert failed.stderr.count("No space left on device") == 1
    assert "Traceback" not in failed.output
    assert [path.suffix for path in made.leftovers] == [".safetensors"] * 2
    assert launch(made, cli).exit_code == 0
    assert made.begun(BATCH) == needed() + 1  # that which could not be written
    assert_same_run(made, undisturbed)


# --- images that are not kept ---------------------------------------------------------------------

NOT_KEPT = "execution.keep_images=false"


@pytest.fixture(scope="module")
def dropped(place: Callable[..., Place], cli: Callable[..., Result]) -> Place:
    """The same study, keeping only what the gallery shows."""
    made = place()
    done = launch(made, cli, NOT_KEPT)
    assert done.exit_code == 0, done.output
    return made


def test_images_that_are_not_kept_leave_scores_costs_and_the_gallery(
    dropped: Place, undisturbed: Place
) -> None:
    stems = {path.stem for path in dropped.chunks}
    assert stems == {"000000-000007", "000008-000015"}  # the first ten images are in them
    assert len(list(dropped.out.glob("*/dropped/*.json"))) == len(ROWS)
    assert dropped.results() == undisturbed.results()
    for row in read_results(dropped.out / "results.json").variants:
        assert row.cost.seconds_per_image
    gallery = "gallery.png"
    assert (dropped.out / gallery).read_bytes() == (undisturbed.out / gallery).read_bytes()


def test_images_that_are_not_kept_are_not_made_again(
    dropped: Place, cli: Callable[..., Result]
) -> None:
    again = copy_of(dropped)
    done = launch(again, cli, NOT_KEPT)
    assert done.exit_code == 0, done.output
    assert again.begun(BATCH) == 0
    assert again.results() == dropped.results()


def test_images_that_a_killed_process_left_are_deleted_at_the_next_start(
    dropped: Place, undisturbed: Place, cli: Callable[..., Result]
) -> None:
    again = copy_of(undisturbed)  # all its features are there, and all its images
    done = launch(again, cli, NOT_KEPT)
    assert done.exit_code == 0, done.output
    assert again.begun(BATCH) == 0
    assert {path.stem for path in again.chunks} == {path.stem for path in dropped.chunks}
    assert again.results() == dropped.results()


def test_damaged_features_of_images_that_are_gone_make_both_again(
    dropped: Place, cli: Callable[..., Result]
) -> None:
    again = copy_of(dropped)
    flip(max(again.out.glob("cached-iec-*/features/*/*.safetensors")))
    done = launch(again, cli, NOT_KEPT)
    assert done.exit_code == 0, done.output
    assert "its content does not match its checksum" in done.stderr
    assert again.begun(BATCH) == CHUNK // BATCH
    assert again.results() == dropped.results()
    assert {path.stem for path in again.chunks} == {path.stem for path in dropped.chunks}


def test_another_feature_network_makes_the_images_again(
    dropped: Place, cli: Callable[..., Result], toy: Any, tmp_path: Path
) -> None:
    again, other = copy_of(dropped), tmp_path / "features"
    shutil.copytree(toy.features, other)
    settings = json.loads((other / "features.json").read_text())
    (other / "features.json").write_text(json.dumps({**settings, "tag": "other"}))
    metrics = [*toy.metrics(), {"name": "is", "splits": 2, "features": str(other)}]
    override = f"metrics={json.dumps(metrics)}"
    scored = cli(*again.arguments(NOT_KEPT, override, verb="evaluate"))
    assert scored.exit_code == 1  # says so
    (error,) = {row.error for row in read_results(again.out / "results.json").variants}
    assert "run iec-eval launch or generate again" in str(error)
    done = launch(again, cli, NOT_KEPT, override)
    assert done.exit_code == 0, done.output
    assert again.begun(BATCH) == len(ROWS) * (COUNT - 16) // BATCH
    assert {path.stem for path in again.chunks} == {path.stem for path in dropped.chunks}
    for row in read_results(again.out / "results.json").variants:
        assert "is-other" in row.metrics


def test_a_metric_that_reads_images_has_deleted_ones_made_again(
    dropped: Place, cli: Callable[..., Result], toy: Any
) -> None:
    """Deleted by an earlier study of the same rows, which read features only."""
    again = copy_of(dropped)
    metrics = [*toy.metrics(), {"name": "psnr"}]
    wanted = (f"metrics={json.dumps(metrics)}", "controls=[full-precision]")
    before = json.loads(cli("status", again.out, "--json").stdout)["rows"]
    assert {row["state"] for row in before} == {"done"}
    assert cli(*again.arguments(*wanted, verb="calibrate")).exit_code == 0
    began = json.loads(cli("status", again.out, "--json").stdout)["rows"]
    assert {row["state"] for row in began} == {"missing"}
    done = launch(again, cli, *wanted)
    assert done.exit_code == 0, done.output
    for row in read_results(again.out / "results.json").variants:
        assert (row.status, row.error) == ("done", None)
    assert {path.stem for path in again.chunks} >= {path.stem for path in dropped.chunks}


def test_metrics_that_read_images_want_them_kept(
    place: Callable[..., Place], cli: Callable[..., Result]
) -> None:
    made = place()
    paired = "metrics=[{name: psnr}]", "controls=[full-precision]"
    refused = cli(*made.arguments(NOT_KEPT, *paired, verb="launch"))
    assert refused.exit_code == 2
    assert "keep_images: false" in refused.stderr
    assert "psnr reads images; keep them or leave the metric out" in refused.stderr
    assert not made.out.exists()
