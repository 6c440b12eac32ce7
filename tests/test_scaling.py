"""How a study scales: the arithmetic by itself, and against what a real run leaves on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import VARIANTS

from iec_eval.scaling import (
    Assumptions,
    NetworkWork,
    RowWork,
    ScoringWork,
    Workload,
    estimate,
    makespan,
    scoring_bytes,
    storage,
)

Cli = Callable[..., Result]
Write = Callable[..., Path]

FREE = Assumptions(start=1e-9, row=1e-9, read=1e15, write=1e15, file=1e-12)
WORK = Workload(
    images=1024,
    chunk_size=16,
    batch_size=16,
    image_bytes=100,
    weight_bytes=1000,
    rows=(RowWork("one", 2.0, "given"), RowWork("two", 3.0, "given")),
    networks=(NetworkWork("net", 20, 0.5, "given"),),
    metrics=(ScoringWork("fid", 7.0, 5000),),
)


# --- the arithmetic ---------------------------------------------------------------------------


def test_an_example_by_hand() -> None:
    """Two rows of 3 chunks (4, 4, 2 images) on 2 processes; a second for every file."""
    work = Workload(
        images=10,
        chunk_size=4,
        batch_size=4,
        image_bytes=92,  # 100 with its index
        weight_bytes=1000,
        rows=(RowWork("one", 1.0, "given"), RowWork("two", 10.0, "given")),
        networks=(NetworkWork("net", 25, 0.5, "given"),),  # 100 bytes an image
        metrics=(ScoringWork("fid", 5.0, 123),),
    )
    assumed = Assumptions(start=10.0, row=1.0, read=1000.0, write=100.0, file=1.0)
    found = estimate(work, 2, assumed)
    assert found.start == 10 + 1  # weights hashed at 1000 bytes a second
    # a chunk of row one: 4 images, 400 bytes written, 3 files: 4 + 4 + 3; the last 2 + 2 + 3
    # process A: 2 (row, weights) + 11 + 7 = 20, B: 2 + 11 = 13
    # row two: chunks of 40 + 4 + 3 and 20 + 2 + 3. B: 13 + 2 + 47 = 62; A: 20 + 2 + 47 = 69;
    # B takes the last: 62 + 25 = 87
    assert found.generation == pytest.approx(87)
    # features: a chunk of 4 takes 2 s, reads 400 bytes (0.4 s), writes 400 (4 s), 3 files: 9.4;
    # of 2: 1 + 0.2 + 2 + 3 = 6.2. Row one then: A: 2 + 20.4 + 13.2 = 35.6, B: 2 + 20.4 = 22.4;
    # row two: B: 22.4 + 2 + 56.4 = 80.8, A: 35.6 + 2 + 56.4 = 94, B: 80.8 + 31.2 = 112
    assert found.features == pytest.approx(112 - 87)
    # two rows: 5 s of FID, 1000 bytes of features read, 3 feature files and 3 chunks opened
    assert found.scoring == pytest.approx(2 * (5 + 1 + 6))
    assert found.wall == pytest.approx(11 + 87 + 25 + 24)
    assert found.busy == pytest.approx((10 + 100 + 2 * 5) / (2 * 147))


def test_one_process_takes_the_sum_of_all_work() -> None:
    found = estimate(WORK, 1, Assumptions())
    assumed = Assumptions()
    set_up = 2 * (assumed.row + 1000 / assumed.read)
    files = 2 * 64 * 3 * assumed.file
    written = 2 * 1024 * 108 / assumed.write
    assert found.generation == pytest.approx(1024 * 5 + set_up + files + written)
    assert found.busy == pytest.approx((1024 * 5 + 2 * 1024 * 0.5) / found.wall)


def test_twice_the_processes_take_half_the_time_far_below_the_limit() -> None:
    for processes in (1, 2, 4, 8):
        once, twice = (estimate(WORK, n, FREE) for n in (processes, 2 * processes))
        assert twice.generation == pytest.approx(once.generation / 2)
        assert twice.features == pytest.approx(once.features / 2)
        assert twice.scoring == once.scoring  # one process does it


def test_more_processes_never_take_longer_and_stop_helping_at_the_limit() -> None:
    times = [estimate(WORK, n, FREE).generation for n in range(1, 200)]
    assert times == sorted(times, reverse=True)
    assert times[127] < times[126]  # 2 rows of 64 chunks
    assert times[128:] == [times[127]] * len(times[128:])
    assert estimate(WORK, 128, FREE).working == estimate(WORK, 4000, FREE).working == 128


@pytest.mark.parametrize("processes", [1, 3, 7, 64, 200])
def test_the_end_comes_no_sooner_than_it_can(processes: int) -> None:
    """Bounds of every schedule: the mean load and the longest item; list scheduling's own."""
    rows = [(0.0, [float(i % 7 + 1) for i in range(50)]), (0.0, [5.0] * 13)]
    total, longest = sum(sum(items) for _, items in rows), 7.0
    found = makespan(rows, processes)
    assert max(total / processes, longest) <= found
    assert found <= total / processes + longest * (1 - 1 / processes) + 1e-9


def test_every_process_sets_a_row_up_once() -> None:
    assert makespan([(10.0, [1.0] * 4)], 1) == 14
    assert makespan([(10.0, [1.0] * 4)], 2) == 12
    assert makespan([(10.0, [1.0, 1.0]), (10.0, [1.0, 1.0])], 1) == 24


def test_the_suggested_chunk_size_gives_everyone_work() -> None:
    for processes in (129, 500, 2048):
        size = WORK.chunk_size_for(processes)
        assert size is not None
        assert replace(WORK, chunk_size=size).most_processes >= processes
        assert replace(WORK, chunk_size=size + 1).most_processes < 4 * processes
    assert WORK.chunk_size_for(2049) is None  # there are 2048 images
    assert WORK.chunk_size_for(512) == 1
    assert WORK.chunk_size_for(64) == 8


def test_bytes_grow_with_images_and_are_given_up_with_them() -> None:
    kept = storage(WORK)
    assert kept.image_bytes == pytest.approx(2 * 1024 * 108, rel=0.3)  # and a header for 16 images
    assert kept.feature_bytes == pytest.approx(2 * 1024 * 80, rel=0.3)
    assert kept.bytes == kept.image_bytes + kept.feature_bytes
    gone = replace(WORK, keep_images=False)
    assert storage(gone).bytes < kept.bytes - 0.9 * kept.image_bytes
    running = [estimate(gone, n, FREE).bytes_running - storage(gone).bytes for n in (1, 64, 500)]
    assert running[0] == pytest.approx(16 * 108, rel=0.3)  # a chunk for each that works
    assert running == [running[0], 64 * running[0], 128 * running[0]]
    assert scoring_bytes(WORK) == 1024 * 80
    assert scoring_bytes(replace(WORK, image_reads=2)) == 1024 * (80 + 2 * 108)


# --- the command ------------------------------------------------------------------------------


def scale(cli: Cli, study: Path, *more: Any, processes: str = "1,2") -> dict[str, Any]:
    shown = cli("show", study, "--scale", processes, *more, "--json")
    assert shown.exit_code == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout)["scale"]
    return found


@pytest.fixture(scope="module")
def finished(cli: Cli, write_study: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a launched study of 10 images in chunks of 4; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli("launch", write_study(folder), "-o", folder / "out").exit_code == 0
    return folder / "out"


def test_the_files_are_those_a_run_leaves(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    found = scale(cli, write_study(tmp_path))["storage"]
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert found["files"] == len(files)


def test_the_bytes_are_those_a_run_leaves(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    found = scale(cli, write_study(tmp_path))["storage"]
    for kind, name in (("image_bytes", "chunks"), ("feature_bytes", "features")):
        actual = sum(path.stat().st_size for path in finished.glob(f"*/{name}/**/*.safetensors"))
        assert found[kind] == pytest.approx(actual, rel=0.02), name


def test_what_is_left_without_images_is_what_a_run_leaves(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    """The first chunks stay for the gallery; each other one leaves a record."""
    execution = {"batch_size": 4, "chunk_size": 8, "accelerator": "cpu", "keep_images": False}
    study = write_study(tmp_path, execution=execution, images={"count": 60}, variants=VARIANTS[:2])
    assert cli("launch", study, "-o", tmp_path / "out").exit_code == 0
    found = scale(cli, study)["storage"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    rows = [path for path in files if path.parent.parent != tmp_path]  # not the results'
    assert found["files"] == len(files)
    assert found["bytes"] == pytest.approx(sum(path.stat().st_size for path in rows), rel=0.02)


def test_measured_rows_come_first_and_tell_the_others(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    """A row of the run folder, one that was given, and one that follows by its work."""
    variants = [
        {"name": "full precision"},
        {"name": "told", "sampler": {"steps": 7}},
        {"name": "counted", "sampler": {"steps": 10}},
    ]
    study = write_study(tmp_path, variants=variants)
    given = ("--seconds-per-image", "told=123", "--seconds-per-image", "55")
    found = scale(cli, study, "-o", finished, *given)
    rows = found["rows"]
    measured = json.loads((finished / "results.json").read_text())["variants"][0]["cost"]
    assert rows[0]["seconds"] == pytest.approx(measured["seconds_per_image"])
    assert rows[0]["basis"] == "measured in 10 finished images"
    assert (rows[1]["seconds"], rows[1]["basis"]) == (123, "given")
    assert rows[2]["seconds"] == pytest.approx(2 * rows[0]["seconds"])
    assert rows[2]["basis"] == "its MACs at the speed of 1 measured row"
    assert found["networks"][0]["basis"] == "measured in 1 row"
    assert found["networks"][0]["seconds"] > 0


def test_what_is_given_of_a_row_is_so_for_each_of_its_seeds(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    study = write_study(tmp_path, images={"seeds": [3, 4], "count": 10})
    name = VARIANTS[1]["name"]
    found = scale(cli, study, "--seconds-per-image", "55", "--seconds-per-image", f"{name}=7")
    seconds = [row["seconds"] for row in found["rows"]]
    assert seconds[:4] == [55, 55, 7, 7]


def test_what_is_given_tells_the_others_where_nothing_is_measured(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    study = write_study(tmp_path)
    given = scale(cli, study, "--seconds-per-image", "55")["rows"]
    assert [row["basis"] for row in given] == [
        "given",
        *["its MACs at the speed of 1 given row"] * 2,
    ]
    assert given[0]["seconds"] == 55 > given[1]["seconds"] > 0
    counted = scale(cli, study, "--tflops", "0.001")["rows"]
    hours = json.loads(cli("show", study, "--tflops", "0.001", "--json").stdout)["rows"]
    for row, shown in zip(counted, hours, strict=True):
        assert row["seconds"] == pytest.approx(shown["hours"] * 3600 / 10)
        assert row["basis"] == "its MACs at 0.001 TFLOP/s"


def test_the_text_says_where_scaling_ends(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    study = write_study(tmp_path)
    given = ("--seconds-per-image", "55", "--assume", "start=100")
    told = cli("show", study, "--scale", "1,12,40", *given).stdout
    assert "Chunks: 3 rows of 3; at most 9 processes have work" in told
    assert "- 12 processes: execution.chunk_size=1 gives all of them work" in told
    assert "- 40 processes: more than the 30 images there are to make" in told
    assert "- full precision: 55.0 (given)" in told
    assert "start=100, row=" in told
    wall = scale(cli, study, *given, processes="1")["processes"][0]["wall"]
    assert f"- 1 process: {wall / 60:.1f} min (start 1.67 min, generation" in told


def test_show_estimates_without_any_files(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    """The files are missing, as for a published model: still every number is there."""
    metrics = [{"name": "fid", "weights": "/nowhere/inception", "reference": "nowhere.safetensors"}]
    study = write_study(tmp_path, model={"name": "ddpm-cifar10", "path": "gone"}, metrics=metrics)
    found = scale(cli, study)
    assert found["networks"][0]["values"] == 2048 + 1008
    assert all(math.isfinite(one["wall"]) for one in found["processes"])
    fid = found["metrics"][0]
    assert found["scoring"]["bytes_per_row"] == 3 * 10 * 4 * 3056  # twice more for intervals
    assert fid["memory"] == 18 * 8 * 2048**2
    # enough images for another one without bias, which two cuts are scored for
    many = scale(cli, study, "-s", "images.count=20000")
    assert many["scoring"]["bytes_per_row"] == 7 * 20000 * 4 * 3056
    assert many["metrics"][0]["memory"] == 26 * 8 * 2048**2
    sums = 20000 * 2048**2
    fewer = scale(cli, study, "-s", "images.count=20000", "-s", "metrics.0.extrapolate=false")
    more = many["metrics"][0]["seconds"] - fewer["metrics"][0]["seconds"]
    assert more == pytest.approx((8 * sums + 5 * 18 * 2048**3) / 5e10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "0"], "--scale '0': wanted numbers of processes from 1 up, such as 1,8,64"),
        (["--scale", "a"], "--scale 'a': wanted numbers"),
        (["--scale", "1,,2"], "--scale '1,,2': wanted numbers"),
        (["--scale", "-1"], "--scale '-1': wanted numbers"),
        (["--scale", "1,1000001"], "--scale '1,1000001': wanted at most 1,000,000 processes"),
        (["--scale", "9" * 5000], f"--scale '{'9' * 5000}': wanted at most 1,000,000 processes"),
        (["--scale", "1", "--seconds-per-image", "fast"], "--seconds-per-image 'fast': wanted"),
        (["--scale", "1", "--seconds-per-image", "0"], "--seconds-per-image '0': wanted"),
        (["--scale", "1", "--seconds-per-image", "cachd=1"], "unknown row in --seconds-per-image:"),
        (["--scale", "1", "--assume", "disk=3"], "unknown assumption 'disk'"),
        (["--scale", "1", "--assume", "read=-3"], "--assume 'read=-3': wanted NAME=VALUE"),
        (["--scale", "1", "--assume", "read"], "--assume 'read': wanted NAME=VALUE"),
    ],
)
def test_what_cannot_be_read_is_refused(
    cli: Cli, write_study: Write, tmp_path: Path, words: list[str], message: str
) -> None:
    told = cli("show", write_study(tmp_path), *words)
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith(f"iec-eval: {message}")
    assert told.stderr.count("\n") == 1
