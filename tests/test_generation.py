"""An image is a function of the experiment and its index: not of batch, process, order, restart.

Every row has the callback ``witness``, which writes down the noise it is shown.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import started
from places import COUNT, EXECUTION, ROWS, STEPS, WITNESS, Place, assert_alike, assert_identical

from iec_eval import storage
from iec_eval.results import read_results
from iec_eval.runs import VariantFolder

pytestmark = pytest.mark.usefixtures("witness")


@pytest.fixture(scope="module")
def generate(cli: Callable[..., Result]) -> Callable[..., Place]:
    """``generate(place, *overrides)`` in this process, which must succeed."""

    def call(place: Place, *overrides: str) -> Place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WITNESS_NOTES", str(place.notes))
            result = cli(*place.arguments(*overrides))
        assert result.exit_code == 0, result.output
        return place

    return call


@pytest.fixture(scope="module")
def undisturbed(make_place: Callable[..., Place], generate: Callable[..., Place]) -> Place:
    """One process, batches and chunks of four."""
    return generate(make_place())


def wait_for_chunks(
    process: subprocess.Popen[str], place: Place, more_than: int, timeout: float = 900
) -> None:
    """Until there are more chunks than that, and the process still runs."""
    limit = time.monotonic() + timeout
    while len(place.chunks) <= more_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "no chunk in time"
        time.sleep(0.05)


# --- the toy is worth testing on ----------------------------------------------------------------


def test_rows_differ_and_images_are_not_saturated(undisturbed: Place) -> None:
    images = list(undisturbed.images().values())
    assert len(images) == 3
    for number, one in enumerate(images):
        assert one.shape == (COUNT, 1, 8, 8)
        assert float(((one > 0) & (one < 255)).float().mean()) > 0.5
        for other in images[:number]:
            assert float((one != other).float().mean()) > 0.1


def test_the_noise_is_one_for_every_row_and_another_for_every_image_and_step(
    undisturbed: Place,
) -> None:
    noises = undisturbed.noises()
    assert noises.keys() == {(image, step) for image in range(COUNT) for step in range(STEPS)}
    assert all(len(digests) == 1 for digests in noises.values())
    assert len(set.union(*noises.values())) == COUNT * STEPS


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "count"), [(1, 8), (7, COUNT), (256, 256)])
def test_batch_size_changes_no_noise_and_no_image(
    undisturbed: Place,
    make_place: Callable[..., Place],
    generate: Callable[..., Place],
    batch: int,
    count: int,
) -> None:
    overrides = f"execution.batch_size={batch}", "execution.chunk_size=256"
    place = generate(make_place(), *overrides, f"images.count={count}")
    noises, reference = place.noises(), undisturbed.noises()
    assert len(noises) == count * STEPS
    for image, step in noises.keys() & reference.keys():
        assert noises[image, step] == reference[image, step]
    for name, images in place.images().items():
        same = min(count, COUNT)
        assert len(images) == count
        assert_alike(images[:same], undisturbed.images()[name][:same])


# --- killed, interrupted, asked to stop, and taken up again ---------------------------------------


@dataclass(frozen=True)
class Interruption:
    """How a process ended that was sent ``signal``, and the chunks it left."""

    signal: signal.Signals
    status: int
    err: str
    kept: dict[Path, bytes]


@pytest.fixture(scope="module")
def interrupted(
    make_place: Callable[..., Place], generate: Callable[..., Place]
) -> tuple[Place, list[Interruption]]:
    """One run folder: three real processes interrupted in the middle, then one to the end."""
    place = make_place()
    ends = [interrupt(place, number) for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)]
    return generate(place), ends


def interrupt(
    place: Place, number: signal.Signals, *overrides: str, everybody: bool = True
) -> Interruption:
    """Start generating, send the signal after the next finished chunk, wait for the end."""
    before = len(place.chunks)
    arguments = place.arguments(*overrides)
    with started(*arguments, WITNESS_NOTES=str(place.notes), WITNESS_PAUSE="0.1") as process:
        wait_for_chunks(process, place, before)
        (os.killpg if everybody else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert out == ""
    return Interruption(number, process.returncode, err, place.chunks)


def test_interrupted_runs_say_how_to_go_on(interrupted: tuple[Place, list[Interruption]]) -> None:
    killed, by_ctrl_c, by_sigterm = interrupted[1]
    assert (killed.status, by_ctrl_c.status, by_sigterm.status) == (-signal.SIGKILL, 130, 143)
    for end, what in ((by_ctrl_c, "interrupted"), (by_sigterm, "asked to stop")):
        message = f"iec-eval: {what}; everything finished is kept, run the same command again"
        assert end.err.count(message) == 1
        assert "Traceback" not in end.err


def test_finished_chunks_are_kept_by_every_later_process(
    interrupted: tuple[Place, list[Interruption]],
) -> None:
    place, ends = interrupted
    total = len(ROWS) * COUNT // EXECUTION["batch_size"]
    assert 0 < len(ends[0].kept) < len(ends[1].kept) < len(ends[2].kept) < total
    assert len(place.chunks) == total
    for end in ends:
        assert end.kept.items() <= place.chunks.items()


def test_a_run_taken_up_again_is_an_undisturbed_one(
    undisturbed: Place, interrupted: tuple[Place, list[Interruption]]
) -> None:
    place, _ = interrupted
    assert place.noises() == undisturbed.noises()
    assert_identical(place, undisturbed)


def test_signal_handlers_are_as_before(
    make_place: Callable[..., Place], generate: Callable[..., Place]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    generate(make_place(), "images.count=2")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(
    make_place: Callable[..., Place], run: Callable[..., subprocess.CompletedProcess[str]]
) -> tuple[Place, list[Interruption], subprocess.CompletedProcess[str]]:
    """Two processes: Ctrl-C on a terminal, SIGTERM to the first of them alone, then to the end."""
    place = make_place()
    ends = [
        interrupt(place, signal.SIGINT, "execution.devices=2"),
        interrupt(place, signal.SIGTERM, "execution.devices=2", everybody=False),
    ]
    arguments = place.arguments("execution.devices=2")
    return place, ends, run(*arguments, WITNESS_NOTES=str(place.notes), timeout=900)


@pytest.mark.slow
def test_two_processes_stop_together(
    two_processes: tuple[Place, list[Interruption], subprocess.CompletedProcess[str]],
) -> None:
    place, (by_ctrl_c, by_sigterm), _ = two_processes
    assert (by_ctrl_c.status, by_sigterm.status) == (130, 143)
    assert "everything finished is kept" in by_ctrl_c.err
    assert by_sigterm.err.count("everything finished is kept") == 1
    # the second process learnt of it: it did not make its whole half
    assert len(by_sigterm.kept) < len(place.chunks) / 2
    for end in (by_ctrl_c, by_sigterm):
        assert end.kept.items() <= place.chunks.items()
        assert "Traceback" not in end.err


@pytest.mark.slow
def test_two_processes_make_what_one_makes(
    undisturbed: Place,
    two_processes: tuple[Place, list[Interruption], subprocess.CompletedProcess[str]],
) -> None:
    place, _, last = two_processes
    assert last.returncode == 0, last.stderr
    assert place.noises() == undisturbed.noises()
    assert len(list(place.notes.iterdir())) == 6
    for name, images in place.images().items():
        assert_alike(images, undisturbed.images()[name])
    assert not place.leftovers


# --- nowhere to write -----------------------------------------------------------------------------


def limit_file_size() -> None:
    """No file may grow beyond 4 KB: writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
def test_two_processes_report_one_full_disk(
    make_place: Callable[..., Place],
    generate: Callable[..., Place],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    place = generate(make_place(variants=ROWS[:1]), "images.count=56")
    before = place.chunks
    # what is missing: 56..63 for the first process, 64..127 for the second, which is too large
    overrides = "images.count=128", "execution.chunk_size=64", "execution.devices=2"
    failed = run(*place.arguments(*overrides), preexec_fn=limit_file_size, timeout=900)
    assert failed.returncode == 2, failed.stderr
    said = [line for line in failed.stderr.splitlines() if "cannot write" in line]
    assert len(said) <= 2  # either process may have tried it
    assert len(said) == len(set(said))
    assert all("000064-000127.safetensors" in line for line in said)
    assert "Traceback" not in failed.stderr
    assert before.items() <= place.chunks.items()
    assert len(place.chunks) == len(before) + 1
    assert set(place.leftovers) == set(place.parts)
    generate(place, *overrides[:2])
    assert len(place.images().popitem()[1]) == 128


def test_no_space_in_the_middle_is_one_message(
    undisturbed: Place,
    make_place: Callable[..., Place],
    generate: Callable[..., Place],
    cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, save = make_place(), storage.save_file

    def save_three(*arguments: Any) -> None:
        if len(place.chunks) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", save_three)
        failed = cli(*place.arguments(verb="launch"))
    assert failed.exit_code == 2
    assert failed.stderr.count("No space left on device") == 1
    assert "run the same command again: everything finished is kept" in failed.stderr
    assert "Traceback" not in failed.output
    assert not place.leftovers
    assert len(place.chunks) == 3
    kept = place.chunks
    assert kept.items() <= generate(place).chunks.items()
    assert_identical(place, undisturbed)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("file", "FILE: is a file, wanted a folder"),
        ("file/below", "FILE: is a file, wanted a folder"),
        ("/proc/iec-eval", "cannot write /proc/iec-eval"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "launch"])
def test_an_unwritable_place_is_one_message(
    make_place: Callable[..., Place],
    cli: Callable[..., Result],
    tmp_path: Path,
    where: str,
    told: str,
    verb: str,
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = cli(verb, make_place().study, "-o", tmp_path / where)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"iec-eval: {told.replace('FILE', str(tmp_path / 'file'))}")


# --- more images, other chunks, damaged chunks, shards --------------------------------------------


def test_more_images_are_added_to_those_there(
    undisturbed: Place, make_place: Callable[..., Place], generate: Callable[..., Place]
) -> None:
    place = generate(make_place(), "images.count=10")
    first = place.chunks
    assert len(place.images().popitem()[1]) == 10
    generate(place)
    assert first.items() <= place.chunks.items()
    for name, images in place.images().items():
        assert_alike(images, undisturbed.images()[name])


def test_fewer_images_remove_none(
    make_place: Callable[..., Place], generate: Callable[..., Place]
) -> None:
    place = generate(make_place(), "images.count=8")
    first = place.chunks
    assert generate(place, "images.count=3").chunks == first


def test_chunk_size_may_change_between_runs(
    undisturbed: Place, make_place: Callable[..., Place], generate: Callable[..., Place]
) -> None:
    place = make_place()
    for count, size in ((5, 4), (9, 7), (14, 3), (COUNT, 256)):
        before = place.chunks
        generate(place, f"images.count={count}", f"execution.chunk_size={size}")
        assert before.items() <= place.chunks.items()
        assert {len(images) for images in place.images().values()} == {count}
    for name, images in place.images().items():
        assert_alike(images, undisturbed.images()[name])


def test_a_corrupt_chunk_is_reported_set_aside_and_made_again(
    undisturbed: Place,
    make_place: Callable[..., Place],
    generate: Callable[..., Place],
    cli: Callable[..., Result],
) -> None:
    place = generate(make_place())
    path = next(path for path in place.chunks if "iec" in str(path))
    path.write_bytes(path.read_bytes()[:-1])
    scored = cli(*place.arguments(verb="evaluate"))
    assert scored.exit_code == 1
    assert scored.stderr.count(f"iec-eval: {path}: cannot be read") == 1
    assert f"set aside as {path.with_suffix('.corrupt').name}, to be made again" in scored.stderr
    assert [row.status for row in read_results(place.out / "results.json").variants] == [
        "done",
        "done",
        "partial",
    ]
    generate(place)
    assert_identical(place, undisturbed)
    assert path.with_suffix(".corrupt").exists()


def test_launch_heals_a_corrupt_chunk_by_itself(
    undisturbed: Place,
    make_place: Callable[..., Place],
    generate: Callable[..., Place],
    cli: Callable[..., Result],
) -> None:
    place = generate(make_place())
    next(iter(place.chunks)).write_bytes(b"")
    launched = cli(*place.arguments(verb="launch"))
    assert launched.exit_code == 0
    assert launched.stderr.count(".corrupt, to be made again") == 1
    assert_identical(place, undisturbed)


def test_a_second_run_makes_nothing(
    undisturbed: Place, generate: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = undisturbed.chunks
    monkeypatch.setattr(VariantFolder, "write_chunk", None)
    assert generate(undisturbed).chunks == before


@pytest.mark.parametrize("order", [("0/2", "1/2"), ("1/2", "0/2"), ("2/3", "0/3", "1/3")])
def test_shards_in_any_order_are_the_whole(
    undisturbed: Place, make_place: Callable[..., Place], cli: Callable[..., Result], order: Any
) -> None:
    place, seen = make_place(), 0
    for shard in order:
        assert cli(*place.arguments(), "--shard", shard).exit_code == 0
        assert len(place.chunks) > seen
        seen = len(place.chunks)
        assert cli(*place.arguments(), "--shard", shard).exit_code == 0
        assert len(place.chunks) == seen
    assert_identical(place, undisturbed)


# --- a variant that fails -------------------------------------------------------------------------


@pytest.fixture
def failing(make_place: Callable[..., Place]) -> Place:
    """The second of three rows can be told to fail, at an image."""
    fails = {**ROWS[1], "name": "sick", "callbacks": [{**WITNESS, "fails": True}]}
    return make_place(variants=[ROWS[0], fails, ROWS[2]])


@pytest.mark.parametrize("image", [0, 9])
def test_a_variant_that_fails_leaves_the_others_done(
    failing: Place, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, image: int
) -> None:
    monkeypatch.setenv("WITNESS_FAILS", str(image))
    launched = cli(*failing.arguments(verb="launch"))
    assert launched.exit_code == 1
    assert "Traceback" not in launched.output
    first, sick, last = read_results(failing.out / "results.json").variants
    assert (first.status, sick.status, last.status) == ("done", "failed", "done")
    assert sick.error == "RuntimeError: the witness was told to fail"
    assert sick.metrics == {}
    assert len(first.metrics) == len(last.metrics) == 3
    (notes,) = failing.out.glob("sick-*/error.txt")
    assert "in refine" in notes.read_text()  # where it happened, for whoever wrote the plugin
    kept = failing.chunks
    assert len(list(failing.out.glob("sick-*/chunks/*"))) == image // 4

    again = cli(*failing.arguments())
    assert again.exit_code == 1
    assert cli(*failing.arguments(verb="evaluate")).exit_code == 1
    _, sick, _ = read_results(failing.out / "results.json").variants
    assert (sick.status, sick.error) == ("failed", "RuntimeError: the witness was told to fail")

    monkeypatch.delenv("WITNESS_FAILS")
    healed = cli(*failing.arguments(verb="launch"))
    assert healed.exit_code == 0
    rows = read_results(failing.out / "results.json").variants
    assert [(row.status, row.error) for row in rows] == [("done", None)] * 3
    assert kept.items() <= failing.chunks.items()
    assert not notes.exists()
