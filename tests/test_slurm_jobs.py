"""Studies on the virtual cluster with the scripts of slurm/: whatever befalls the jobs, the images
are those of one undisturbed process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from cluster import ENDED, Cluster
from conftest import DEEPCACHE

from iec_eval.results import read_results
from iec_eval.runs import VariantFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("witness")]

SCRIPTS = Path(__file__).parents[1] / "slurm"
WITNESS = {"name": "witness"}
ROWS: list[dict[str, Any]] = [
    {"name": "full precision", "callbacks": [WITNESS]},
    {"name": "cached", "efficiency": [DEEPCACHE], "callbacks": [WITNESS]},
]
CALIBRATED = {
    "name": "quantized",
    "efficiency": [{"name": "timestep-quantizer", "search": "max"}],
    "callbacks": [WITNESS],
}
IMAGES, CHUNK, BATCH = 24, 4, 2
START = 120  # seconds that the start of several processes may take on a busy machine


@dataclass(frozen=True)
class Runs:
    """Submits jobs of two studies: two rows that need no calibration, and those with a third."""

    cluster: Cluster
    folder: Path
    study: Path
    calibrated: Path

    def out(self, name: str) -> Path:
        return self.folder / name

    def submit(
        self,
        script: str,
        name: str,
        *options: str,
        study: Path | None = None,
        pause: float = 0,
    ) -> str:
        """Run a script into the folder ``name``; every denoising step takes ``pause`` seconds."""
        return self.cluster.submit(
            SCRIPTS / f"{script}.sbatch",
            study or self.study,
            *("-o", self.out(name)),
            options=["--cpus-per-task=1", *options],
            WITNESS_PAUSE=str(pause),
            PATH=f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}",
        )

    def wait_for_chunks(self, name: str, count: int) -> None:
        """Until so many chunks of the run are finished, but not all."""
        what = f"{count} chunks in {name}"
        self.cluster.until(lambda: len(chunks(self.out(name))) >= count, START, what)
        assert len(chunks(self.out(name))) < len(ROWS) * IMAGES // CHUNK


def chunks(out: Path) -> list[Path]:
    return sorted(out.glob("*/chunks/*.safetensors"))


def images(out: Path) -> dict[str, torch.Tensor]:
    """All images of each row by the name of its folder, every index exactly once."""
    found = {}
    for folder in sorted({path.parent.parent for path in chunks(out)}):
        row = VariantFolder(folder)
        parts = row.finished()
        assert [index for part in parts for index in part.indices] == list(range(IMAGES))
        found[folder.name] = torch.cat([row.read_chunk(part).images for part in parts])
    return found


def assert_same_images(made: Path, undisturbed: dict[str, torch.Tensor], rows: int) -> None:
    """At most one level of difference in at most 0.1 % of the pixels."""
    found = images(made)
    assert len(found) == rows
    for name, of_row in found.items():
        difference = (of_row.int() - undisturbed[name].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 0.001
    assert not list(made.glob("*/parts/*")), "pieces of chunks are left"
    assert not list(made.glob("*/error.txt"))


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, write_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    folder = tmp_path_factory.mktemp("slurm")
    program = folder / "bin" / "iec-eval"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m iec_eval "$@"\n')
    program.chmod(0o755)
    execution = {"batch_size": BATCH, "chunk_size": CHUNK, "threads": 1, "accelerator": "cpu"}
    common = {"images": {"seed": 7, "count": IMAGES}, "execution": execution}
    study = write_study(folder / "two", variants=ROWS, **common)
    calibrated = write_study(folder / "three", variants=[*ROWS, CALIBRATED], **common)
    return Runs(cluster, folder, study, calibrated)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, cli: Callable[..., Result]) -> dict[str, torch.Tensor]:
    """The images that one process makes."""
    made = cli("generate", runs.calibrated, "-o", runs.out("undisturbed"))
    assert made.exit_code == 0, made.output
    return images(runs.out("undisturbed"))


@pytest.fixture(scope="module", autouse=True)
def limited(runs: Runs) -> Iterator[str]:
    """A job whose time is up before it is done; it runs while the other tests do.

    Time limits are whole minutes, and SLURM looks every half minute: it signals 45 to 75 seconds
    after the start, and by then the job has begun, but has not made what takes 78 seconds.
    """
    options = ("--time=2", "--signal=USR1@45", "--nodelist=n1", "--nodes=1")
    yield runs.submit("generate-nodes", "limited", *options, pause=0.65)
    runs.cluster.cancel()


def test_two_nodes_with_two_tasks_each(runs, undisturbed):
    job = runs.submit("generate-nodes", "nodes", "--ntasks-per-node=2", pause=0.1)
    assert runs.cluster.wait(job, 2 * START) == {job: "COMPLETED"}
    assert_same_images(runs.out("nodes"), undisturbed, rows=2)


def test_calibrate_an_array_and_evaluate_by_hand(runs, undisturbed, cli):
    """As docs/slurm.md says it; the scores are those that one process computes of the images."""
    study, out = runs.calibrated, runs.out("array")
    calibrate = runs.submit("calibrate", "array", study=study)
    after = f"--dependency=afterany:{calibrate}"
    array = runs.submit("generate-array", "array", after, study=study, pause=0.1)
    after = f"--dependency=afterany:{array}"
    evaluate = runs.submit("evaluate", "array", after, "--ntasks-per-node=2", study=study)
    ends = runs.cluster.wait([calibrate, array, evaluate], 3 * START)
    assert set(ends.values()) == {"COMPLETED"}, runs.cluster.logs()
    assert len(runs.cluster.tasks(array)) == 4
    assert_same_images(out, undisturbed, rows=3)
    alone = runs.out("alone")
    shutil.copytree(out, alone, ignore=shutil.ignore_patterns("features", "results.json"))
    assert cli("evaluate", study, "-o", alone).exit_code == 0
    assert scores(out) == pytest.approx(scores(alone), rel=1e-6)


def scores(out: Path) -> dict[str, float]:
    found = {
        f"{row.name} {name}": measured.value
        for row in read_results(out / "results.json").variants
        for name, measured in row.metrics.items()
    }
    assert len(found) >= 6
    return found


def test_a_preempted_job_goes_on_where_it_was(runs, undisturbed):
    cluster, out = runs.cluster, runs.out("preempted")
    job = runs.submit("generate-nodes", "preempted", pause=0.2)
    runs.wait_for_chunks("preempted", 2)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in chunks(out)}
    urgent = ["--partition=high", "--nodelist=n2", "--exclusive"]
    high = cluster.submit(cluster.script("sleep 1"), options=urgent)
    cluster.wait(high, 60)
    assert cluster.state(job) not in ENDED
    assert cluster.wait(job, 2 * START) == {job: "COMPLETED"}
    assert cluster.restarts(job) == 1
    assert "asked to stop" in cluster.log(job)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    assert after == before
    assert_same_images(out, undisturbed, rows=2)


def test_killed_tasks_leave_their_work_to_the_others(runs, undisturbed):
    """Also the first one, to which the others were introduced at the start."""
    cluster, out = runs.cluster, runs.out("killed")
    job = runs.submit("generate-nodes", "killed", "--ntasks-per-node=2", pause=0.2)
    runs.wait_for_chunks("killed", 1)
    for rank in (0, 3):
        os.kill(task(job, rank), signal.SIGKILL)
    assert cluster.wait(job, 2 * START) == {job: "FAILED"}
    assert cluster.tasks(job)[job]["ExitCode"] == "137:0"
    assert "ended with status 137" in cluster.log(job)
    assert_same_images(out, undisturbed, rows=2)


def task(job: str, rank: int) -> int:
    """The process of a rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            has = set((place / "environ").read_text(errors="replace").split("\0"))
            if wanted <= has and b"iec_eval" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    (pid,) = found
    return pid


def test_a_job_whose_time_is_up_goes_on_in_its_next(runs, limited, undisturbed):
    cluster = runs.cluster
    assert cluster.wait(limited, 4 * START) == {limited: "COMPLETED"}
    assert cluster.restarts(limited) >= 1
    assert "interrupted (status 75); requeued, restart 1" in cluster.log(limited)
    assert_same_images(runs.out("limited"), undisturbed, rows=2)
