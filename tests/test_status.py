"""How far a run is: what ``iec-eval status`` makes of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, environment
from fake_slurm import FakeSlurm, fake_slurm

from iec_eval.claims import Claims
from iec_eval.errors import CorruptFile
from iec_eval.processes import this_process
from iec_eval.results import Results
from iec_eval.runs import Chunk, IndexRange, RunFolder, Spent, VariantFolder
from iec_eval.status import look
from iec_eval.storage import write_json

Cli = Callable[..., Result]
Write = Callable[..., Path]
CHUNKS = (IndexRange(0, 4), IndexRange(4, 8), IndexRange(8, 10))
KEY = "ab" * 32


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return fake_slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of three rows that has been started and has made nothing."""
    rows = [
        {"name": name, "folder": f"{name}-0", "macs_per_image": macs, "artifacts": artifacts}
        for name, macs, artifacts in (
            ("a", 100, []),
            ("b", 200, []),
            ("c", 300, [{"part": "quantizer", "key": KEY}]),
        )
    ]
    sizes = {"images": 10, "chunk_size": 4, "claim_timeout": 120}
    listing = {"schema": 1, "study": "toy", **sizes, "rows": rows}
    write_json(tmp_path / "out" / "rows.json", listing)
    return tmp_path / "out"


def chunk(part: IndexRange, seconds_per_image: float = 2.0) -> Chunk:
    images = torch.zeros(len(part), 1, 8, 8, dtype=torch.uint8)
    return Chunk(part, images, Spent(5 * len(part), 0, seconds_per_image * len(part)))


def make(out: Path, row: str, *parts: IndexRange, seconds_per_image: float = 2.0) -> VariantFolder:
    folder = VariantFolder(out / f"{row}-0")
    for part in parts:
        folder.write_chunk(chunk(part, seconds_per_image))
    return folder


def claim(out: Path, name: str, *, pid: int = 1, job: str | None = None) -> Path:
    """A claim by a process of another machine."""
    owner = replace(this_process("one"), machine="n1/boot/space", pid=pid, job=job)
    assert Claims(out / "claims", owner=owner).take(name)
    return out / "claims" / f"{name}.0"


def told(cli: Cli, out: Path) -> dict[str, Any]:
    shown = cli("status", out, "--json")
    assert shown.exit_code == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def rows(cli: Cli, out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in told(cli, out)["rows"]}


def lines(cli: Cli, out: Path) -> list[str]:
    shown = cli("status", out)
    assert shown.exit_code == 0, shown.stderr
    return shown.stdout.splitlines()


# --- rows -------------------------------------------------------------------------------------


def test_what_is_done_running_missing_and_failed(cli: Cli, out: Path) -> None:
    make(out, "a", *CHUNKS)
    make(out, "b", CHUNKS[0]).write_part(chunk(IndexRange(4, 7)))
    claim(out, "b-0.images.000004-000007", pid=77)
    make(out, "c").write_failure("it broke", "Traceback ...", "earlier")
    found = rows(cli, out)
    assert [row["state"] for row in found.values()] == ["done", "running", "failed"]
    assert [row["images_done"] for row in found.values()] == [10, 7, 0]
    assert [row["chunks_missing"] for row in found.values()] == [0, 2, 3]
    assert [row["error"] for row in found.values()] == [None, None, "it broke"]
    # others may go on with what one process had no memory for
    VariantFolder(out / "b-0").write_failure("no memory", "Traceback ...", "this one, one process")
    found["b"] = rows(cli, out)["b"]
    assert (found["b"]["state"], found["b"]["error"]) == ("running", "no memory")
    VariantFolder(out / "b-0").forget_failure()
    (worker,) = found["b"]["workers"]
    assert worker.pop("seconds_silent") < 60
    work = {"work": "images 000004-000007", "host": "n1", "pid": 77, "job": None}
    assert worker == work
    text = lines(cli, out)
    assert text[0] == f"toy: 3 rows of 10 images in {out}"
    assert text[1] == "a: done, 10 of 10 images; 2 s an image"
    assert text[2] == "b: running, 7 of 10 images; 2 chunks missing; 2 s an image"
    assert text[3].startswith("    images 000004-000007: n1, process 77, sign of life ")
    assert text[4].endswith("; it broke")


def test_nobody_is_at_work_who_gave_no_sign_of_life(cli: Cli, out: Path) -> None:
    path = claim(out, "a-0.images.000000-000003")
    assert rows(cli, out)["a"]["state"] == "running"
    old = time.time() - 3600
    os.utime(path, (old, old))
    assert rows(cli, out)["a"]["state"] == "missing"


def test_calibrations_that_are_missing_and_made(cli: Cli, out: Path) -> None:
    assert rows(cli, out)["c"]["calibration_missing"] == ["quantizer"]
    claim(out, f"calibration.{KEY[:32]}")
    found = rows(cli, out)
    assert found["c"]["workers"][0]["work"] == "calibration of quantizer"
    assert (found["c"]["state"], found["b"]["state"]) == ("running", "missing")
    assert "c: running, 0 of 10 images; 3 chunks missing; to calibrate: quantizer" in lines(
        cli, out
    )
    RunFolder(out).save(KEY, {"scale": torch.ones(1)}, {})
    found = rows(cli, out)
    assert (found["c"]["state"], found["c"]["calibration_missing"]) == ("missing", [])


def test_a_process_that_has_claimed_a_chain_is_at_its_first_part(cli: Cli, out: Path) -> None:
    listing = json.loads((out / "rows.json").read_text())
    row = next(row for row in listing["rows"] if row["name"] == "c")
    row["artifacts"].append({"part": "reconstruction", "key": "f" * 64})
    write_json(out / "rows.json", listing)
    for key in (KEY, "f" * 64):
        claim(out, f"calibration.{key[:32]}")
    work = [worker["work"] for worker in rows(cli, out)["c"]["workers"]]
    assert work == ["calibration of quantizer"]
    RunFolder(out).save(KEY, {"scale": torch.ones(1)}, {})
    work = [worker["work"] for worker in rows(cli, out)["c"]["workers"]]
    assert work == ["calibration of reconstruction"]


def test_images_that_were_deleted_after_use_are_not_missing(cli: Cli, out: Path) -> None:
    folder = make(out, "a", *CHUNKS, seconds_per_image=3)
    for part in CHUNKS:
        folder.drop_images(part)
    found = rows(cli, out)["a"]
    assert (found["state"], found["seconds_per_image"]) == ("done", 3)


def test_looking_changes_nothing(cli: Cli, out: Path, fake: FakeSlurm) -> None:
    make(out, "a", *CHUNKS[:2])
    claim(out, "a-0.images.000008-000009", job="100")
    make(out, "b").write_failure("it broke", "", "earlier")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    lines(cli, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_damaged_chunk_is_left_where_it_is(cli: Cli, out: Path) -> None:
    """Setting it aside is for those who make it again."""
    folder = make(out, "a", *CHUNKS[:2])
    (folder.chunks / f"{CHUNKS[0].stem}.safetensors").write_bytes(b"damaged")
    folder.drop_images(CHUNKS[1])
    dropped = folder.dropped / f"{CHUNKS[1].stem}.json"
    write_json(dropped, {**json.loads(dropped.read_text()), "seconds": "long"})
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert rows(cli, out)["a"]["seconds_per_image"] is None
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_chunk_may_vanish_while_it_is_looked_at(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are deleted by a process that has scored them."""
    folder = make(out, "a", *CHUNKS[:2])
    make(out, "b", CHUNKS[0], seconds_per_image=3)
    vanishing = folder.chunks / f"{CHUNKS[0].stem}.safetensors"
    stat = Path.stat
    asked: list[Path] = []

    def late(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = stat(path, follow_symlinks=follow_symlinks)
        if path == vanishing:
            asked.append(path)
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", late)
    found = rows(cli, out)
    assert asked
    assert (found["a"]["seconds_per_image"], found["b"]["seconds_per_image"]) == (2, 3)


@contextmanager
def a_user_without_rights() -> Iterator[None]:
    """Nobody, where the tests are run by root, who may read everything."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


@pytest.fixture
def foreign(out: Path) -> Iterator[Path]:
    """A run in a folder that everybody may look into, as pytest's own are not."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield out.rename(Path(folder) / "out")


def test_what_this_user_may_not_read_is_not_measured(cli: Cli, foreign: Path) -> None:
    folder = make(foreign, "a", *CHUNKS)
    (folder.chunks / f"{CHUNKS[0].stem}.safetensors").chmod(0)
    make(foreign, "b", *CHUNKS, seconds_per_image=3).chunks.chmod(0o444)
    (foreign / "artifacts").mkdir(mode=0)
    for path in (foreign, folder.path, folder.chunks):
        path.chmod(0o555)
    with a_user_without_rights():
        found = look(foreign)
    for path in (foreign, folder.path, folder.chunks, foreign / "b-0" / "chunks"):
        path.chmod(0o755)
    assert [row.images_done for row in found.rows[:2]] == [10, 10]
    assert (found.rows[0].seconds_per_image, found.rows[0].measured) == (2, True)
    assert (found.rows[1].seconds_per_image, found.rows[1].measured) == (4, False)


@pytest.mark.parametrize("name", ["rows.json", "slurm/launches.json"])
def test_a_list_that_this_user_may_not_read_is_named(foreign: Path, name: str) -> None:
    (foreign / name).parent.mkdir(exist_ok=True)
    (foreign / name).touch(mode=0)
    (foreign / name).chmod(0)
    with a_user_without_rights(), pytest.raises(CorruptFile, match=rf"{name}: .*Permission denied"):
        look(foreign)


# --- time -------------------------------------------------------------------------------------


def test_the_time_left_is_what_images_took_over_the_processes_at_work(cli: Cli, out: Path) -> None:
    make(out, "a", CHUNKS[0], seconds_per_image=2)  # 6 left: 12 s
    make(out, "b", CHUNKS[2], seconds_per_image=8)  # 8 left: 64 s
    # of c nothing is measured: (4 * 2 + 2 * 8) s for (4 * 100 + 2 * 200) MACs, 300 an image: 9 s
    found = told(cli, out)
    speeds = [(row["seconds_per_image"], row["measured"]) for row in found["rows"]]
    assert speeds == [(2, True), (8, True), (pytest.approx(9), False)]
    assert (found["workers"], found["remaining_seconds"]) == (0, pytest.approx(12 + 64 + 90))
    assert "About 3 minutes left for images, on one process, but none is at work" in lines(cli, out)
    for pid in (1, 2):
        claim(out, f"a-0.images.{CHUNKS[pid].stem}", pid=pid)
    claim(out, f"b-0.images.{CHUNKS[0].stem}", pid=2)  # the same process
    found = told(cli, out)
    assert (found["workers"], found["remaining_seconds"]) == (2, pytest.approx(83))
    assert "About 83 seconds left for images, on the 2 processes at work" in lines(cli, out)


def test_a_time_that_cannot_be_known_is_not_guessed(cli: Cli, out: Path) -> None:
    assert told(cli, out)["remaining_seconds"] is None
    assert "Time left is unknown: nothing is measured yet of a, b, c" in lines(cli, out)
    listing = json.loads((out / "rows.json").read_text())
    listing["rows"][1]["macs_per_image"] = None
    write_json(out / "rows.json", listing)
    make(out, "a", CHUNKS[0])
    assert [row["remaining_seconds"] for row in told(cli, out)["rows"]] == [12, None, 60]
    assert "Time left is unknown: nothing is measured yet of b" in lines(cli, out)
    make(out, "b", *CHUNKS)
    assert told(cli, out)["remaining_seconds"] == 72


def test_only_the_newest_chunks_are_asked(cli: Cli, out: Path) -> None:
    """The machine may have changed since; and a damaged chunk is no reason not to answer."""
    listing = json.loads((out / "rows.json").read_text())
    write_json(out / "rows.json", {**listing, "images": 100})
    for start in range(0, 100, 4):
        part = IndexRange(start, start + 4)
        folder = make(out, "a", part, seconds_per_image=1000 if start < 20 else 3)
        os.utime(folder.chunks / f"{part.stem}.safetensors", (start, start))
    assert rows(cli, out)["a"]["seconds_per_image"] == 3
    (folder.chunks / "000096-000099.safetensors").write_bytes(b"damaged")
    assert rows(cli, out)["a"]["seconds_per_image"] == 3


def test_whether_the_results_are_of_all_images(cli: Cli, out: Path) -> None:
    folder = make(out, "a", *CHUNKS)
    assert told(cli, out)["results"] == "missing"
    assert lines(cli, out)[-1] == "results.json: not there yet"
    written = Results(study="s", images=4, protocol={}, variants=[]).model_dump_json(by_alias=True)
    (out / "results.json").write_text(written)
    assert told(cli, out)["results"] == "current"
    (out / "results.json").write_text("{")
    assert told(cli, out)["results"] == "unreadable"
    assert lines(cli, out)[-1] == "results.json: cannot be read, evaluate again"
    later = time.time() + 10
    os.utime(folder.chunks / f"{CHUNKS[1].stem}.safetensors", (later, later))
    assert told(cli, out)["results"] == "outdated"
    assert lines(cli, out)[-1] == "results.json: older than the newest images, evaluate again"


# --- jobs -------------------------------------------------------------------------------------


def submitted(cli: Cli, write_study: Write, out: Path) -> None:
    """An array of two tasks and the job after it: 100 and 101."""
    listing = (out / "rows.json").read_text()
    study = write_study(out.parent)
    assert cli("launch", study, "-o", out, "--slurm", "--array", "2").exit_code == 0
    (out / "rows.json").write_text(listing)


def test_jobs_and_their_states(cli: Cli, write_study: Write, fake: FakeSlurm, out: Path) -> None:
    submitted(cli, write_study, out)
    fake.states(j100_1="RUNNING")
    claim(out, "a-0.images.000000-000003", job="1100")  # what the task calls itself
    found = told(cli, out)
    assert [(job["id"], job["kind"]) for job in found["jobs"]] == [
        ("100", "generate"),
        ("101", "evaluate"),
    ]
    states = {task["name"]: task["state"] for job in found["jobs"] for task in job["tasks"]}
    assert states == {"100_0": "PENDING", "100_1": "RUNNING", "101": "PENDING"}
    assert found["jobs_unknown"] is None
    assert found["rows"][0]["workers"][0]["job"] == "100_1"
    text = lines(cli, out)
    assert "generate job 100: 1 PENDING (Priority), 1 RUNNING" in text
    assert "evaluate job 101: PENDING (Priority)" in text
    assert any(", job 100_1, sign of life" in line for line in text)
    fake.states(j100="")
    assert "generate job 100: no longer in the queue" in lines(cli, out)


def test_what_waits_in_the_queue_can_be_looked_at(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    """Before any of its jobs has started."""
    study, out = write_study(tmp_path), tmp_path / "out"
    assert cli("launch", study, "-o", out, "--slurm").exit_code == 0
    found = told(cli, out)
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in VARIANTS]
    assert {row["state"] for row in found["rows"]} == {"missing"}
    assert [job["tasks"][0]["state"] for job in found["jobs"]] == ["PENDING", "PENDING"]


def test_of_earlier_launches_only_what_is_still_there(
    cli: Cli, write_study: Write, fake: FakeSlurm, out: Path
) -> None:
    submitted(cli, write_study, out)
    fake.states(j100="FAILED", j101="COMPLETED")
    submitted(cli, write_study, out)
    assert len(told(cli, out)["jobs"]) == 4
    assert [line.split(":")[0] for line in lines(cli, out) if " job " in line] == [
        "generate job 102",
        "evaluate job 103",
    ]


def test_without_slurm_the_states_are_unknown(
    cli: Cli, write_study: Write, fake: FakeSlurm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(cli, write_study, out)
    claim(out, "a-0.images.000000-000003", job="1100")
    monkeypatch.setenv("QUEUE_FAILS", "slurm_load_jobs error: Unable to contact controller")
    found = told(cli, out)
    assert [job["tasks"] for job in found["jobs"]] == [None, None]
    assert "Unable to contact controller" in found["jobs_unknown"]
    assert found["rows"][0]["workers"][0]["job"] == "1100"
    monkeypatch.setenv("PATH", str(out))
    text = lines(cli, out)
    assert "generate job 100: state unknown" in text
    assert any(line.startswith("The states of the jobs are unknown: squeue was") for line in text)


def test_slurm_is_not_asked_where_no_job_is_known(cli: Cli, fake: FakeSlurm, out: Path) -> None:
    lines(cli, out)
    assert fake.calls("squeue") == []


# --- what is no run, and what makes one --------------------------------------------------------


LISTED = (
    '{"schema": 1, "study": "toy", "images": 10, "chunk_size": %s, "claim_timeout": 1, "rows": %s}'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "OUT: no run there (rows.json is missing); wanted the folder of a run"),
        ("[", "OUT/rows.json: cannot be read ("),
        ("{}", "OUT/rows.json: cannot be read ("),
        ('{"schema": 1}', "OUT/rows.json: cannot be read (study: Field required)"),
        (LISTED % ('"4"', "[]"), "OUT/rows.json: cannot be read (chunk_size: Input should be"),
        (LISTED % ("4", '[{"name": "a"}]'), "OUT/rows.json: cannot be read (rows.0.folder: "),
        ('{"schema": 9}', "OUT/rows.json: has schema 9, this version reads 1"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    cli: Cli, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "rows.json").write_text(text)
    shown = cli("status", tmp_path)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"iec-eval: {message.replace('OUT', str(tmp_path))}")
    assert shown.stderr.count("\n") == 1


def test_every_start_says_what_rows_there_are(
    cli: Cli, write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = {"name": "timestep-quantizer", "weight_bits": 8, "activation_bits": 8}
    variants = [*VARIANTS[:2], {"name": "W8A8", "efficiency": [quantizer]}]
    study, out = write_study(tmp_path, variants=variants), tmp_path / "out"
    planned = json.loads(cli("show", study, "--json").stdout)["rows"]
    assert cli("launch", study, "-o", out).exit_code == 0
    listing = json.loads((out / "rows.json").read_text())
    assert (listing["study"], listing["images"], listing["chunk_size"]) == ("toy", 10, 4)
    macs = [row["macs_per_image"] for row in listing["rows"]]
    assert macs == [row["macs_per_image"] for row in planned]
    assert all((out / row["folder"] / "chunks").is_dir() for row in listing["rows"])
    assert [len(row["artifacts"]) for row in listing["rows"]] == [0, 0, 1]
    found = told(cli, out)
    assert {row["state"] for row in found["rows"]} == {"done"}
    assert (found["results"], found["remaining_seconds"]) == ("current", 0)
    assert not any(row["calibration_missing"] for row in found["rows"])
    # counted once: rows that are on record are not counted again, others are
    monkeypatch.setattr("iec_eval.inspection.evaluation_costs", lambda plans: 1 / 0)
    assert cli("generate", study, "-o", out, "-s", "images.count=11").exit_code == 0
    again = json.loads((out / "rows.json").read_text())
    assert again == {**listing, "images": 11}
    assert cli("generate", study, "-o", out, "-s", "images.seed=8").exit_code == 0
    again = json.loads((out / "rows.json").read_text())
    assert {row["macs_per_image"] for row in again["rows"]} == {None}


def test_a_start_shows_nothing_to_the_callbacks_of_others(
    cli: Cli, write_study: Write, witness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take their time, or note what they see; the rows of our own are counted."""
    variants = [VARIANTS[1], VARIANTS[2], {"name": "seen", "callbacks": [{"name": "witness"}]}]
    study, out = write_study(tmp_path, variants=variants), tmp_path / "out"
    monkeypatch.setenv("WITNESS_NOTES", str(tmp_path))
    assert cli("calibrate", study, "-o", out).exit_code == 0
    found = {row["name"]: row for row in json.loads((out / "rows.json").read_text())["rows"]}
    assert found["cached + IEC"]["macs_per_image"] > 0
    assert found["seen"]["macs_per_image"] is None
    assert not list(tmp_path.glob("*.txt"))


def test_looking_loads_nothing_heavy() -> None:
    code = (
        "import sys, iec_eval.status; "
        "heavy = {'lightning', 'diffusers', 'torchvision', 'matplotlib', 'torchmetrics'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)
