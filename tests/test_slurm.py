"""Submitting a study to SLURM, and telling how far a run is.

Most tests have small programs in the place of SLURM's, which write down how they are called; the
last ones have a whole cluster.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from cluster import Cluster
from conftest import VARIANTS
from fake_slurm import FakeSlurm, fake_slurm

from iec_eval import slurm
from iec_eval.claims import Claims
from iec_eval.processes import this_process
from iec_eval.study import load

Cli = Callable[..., Result]
Write = Callable[..., Path]
ROOT = Path(__file__).parents[1]

QUANTIZER = {"name": "timestep-quantizer", "weight_bits": 8, "activation_bits": 8}
CALIBRATED = [*VARIANTS, {"name": "W8A8", "efficiency": [QUANTIZER]}]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return fake_slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def option(words: list[str], name: str) -> str | None:
    """The value of an option as sbatch takes it: the last one counts."""
    given = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return given[-1] if given else None


def refusal(result: Result) -> str:
    """The one message of a command that refused."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("iec-eval: ")
    return result.stderr.removeprefix("iec-eval: ").rstrip("\n")


def names(calls: list[list[str]]) -> list[str]:
    """Which scripts were submitted."""
    return [Path(word).stem for words in calls for word in words if word.endswith(".sbatch")]


# --- what is submitted ------------------------------------------------------------------------


def test_a_study_becomes_a_chain_of_jobs(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    study, out = write_study(tmp_path, variants=CALIBRATED), tmp_path / "out"
    told = cli("launch", study, "-o", out, "--slurm", "--array", 3, "-s", "images.count=9")
    assert told.exit_code == 0, told.stderr
    calls = fake.calls("sbatch")
    assert names(calls) == ["calibrate", "generate-array", "evaluate"]
    (entry,) = json.loads((out / "slurm" / "launches.json").read_text())
    snapshot = out / "slurm" / f"{entry['id']}.yaml"
    for words in calls:
        place = words.index(next(word for word in words if word.endswith(".sbatch")))
        assert words[place:] == [
            str(ROOT / "slurm" / Path(words[place]).name),
            str(snapshot),
            "-o",
            str(out),
        ]
        assert "--parsable" in words
        assert option(words, "export") == f"ALL,IEC_EVAL_LAUNCH={entry['id']}"
    assert [option(words, "dependency") for words in calls] == [
        None,
        "afterany:100",
        "afterany:101",
    ]
    assert [option(words, "array") for words in calls] == [None, "0-2", None]
    assert [option(words, "output") for words in calls] == [
        f"{out}/slurm/%x-{name}.out" for name in ("%j", "%A_%a", "%j")
    ]
    assert entry["jobs"] == [
        {"id": "100", "kind": "calibrate", "tasks": 1},
        {"id": "101", "kind": "generate", "tasks": 3},
        {"id": "102", "kind": "evaluate", "tasks": 1},
    ]
    assert entry["options"] == {"array": 3}
    for text in (
        "job 100",
        "job 101, 3 tasks, after 100",
        "job 102",
        f"iec-eval status {out}",
        "squeue --jobs=100,101,102",
    ):
        assert text in told.stdout
    # what is submitted is the study as it was given, to the last key
    assert load(str(snapshot)) == load(str(study), ["images.count=9"])
    assert yaml.safe_load(snapshot.read_text())["images"]["count"] == 9


def test_nodes_are_the_schedulers_affair(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    """A job of one task, such as the last one, could not start processes on several nodes."""
    execution = {"num_nodes": 2, "batch_size": 4, "chunk_size": 4, "accelerator": "cpu"}
    study, out = write_study(tmp_path, execution=execution), tmp_path / "out"
    assert cli("launch", study, "-o", out, "--slurm", "--nodes", 2).exit_code == 0
    (snapshot,) = out.glob("slurm/*.yaml")
    assert load(str(snapshot)).execution.num_nodes == 1
    assert load(str(snapshot)) == load(str(study), ["execution.num_nodes=1"])
    assert fake.calls("sbatch")


def test_the_gpus_of_a_job_are_those_that_it_got(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    """The last job has one, and so have tasks of an array that asked for one."""
    execution = {"devices": 4, "batch_size": 4, "chunk_size": 4}
    study, out = write_study(tmp_path, execution=execution), tmp_path / "out"
    assert cli("launch", study, "-o", out, "--slurm", "--gpus-per-node", 1).exit_code == 0
    (snapshot,) = out.glob("slurm/*.yaml")
    assert load(str(snapshot)).execution.devices == "auto"
    assert load(str(snapshot)) == load(str(study), ["execution.devices=auto"])
    assert option(fake.calls("sbatch")[0], "ntasks-per-node") == "1"


def test_ids_of_launches_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.new_id() != slurm.new_id()
    assert slurm.new_id().replace("-", "").isalnum()
    moments = []
    for seconds in (0, 1e9 - 1, 1e9, 2e9):
        monkeypatch.setattr(slurm.time, "gmtime", lambda s=seconds: slurm.time.localtime(s))
        moments.append(slurm.new_id())
    assert moments == sorted(moments)


@pytest.mark.parametrize(
    ("words", "changes", "wanted"),
    [
        ((), {}, {"array": "0-0", "ntasks-per-node": None, "gpus-per-node": None}),
        (("--array", "2"), {}, {"array": "0-1"}),
        (("--array", "99"), {}, {"array": "0-8"}),  # 3 rows of 3 chunks
        (
            ("--array", "2", "--gpus-per-node", "4"),
            {},
            {"array": "0-1", "ntasks-per-node": "4", "gpus-per-node": "4"},
        ),
        (
            ("--nodes", "3", "--gpus-per-node", "2"),
            {"devices": 8},
            {"nodes": "3", "ntasks-per-node": "2", "gpus-per-node": "2", "array": None},
        ),
        (
            ("--nodes", "3"),
            {"devices": 8},
            {"nodes": "3", "ntasks-per-node": "8", "gpus-per-node": None},
        ),
        # neither said: the script's own line counts
        (("--nodes", "3"), {}, {"nodes": "3", "ntasks-per-node": None, "gpus-per-node": None}),
    ],
)
def test_only_generation_is_spread(
    cli: Cli,
    write_study: Write,
    fake: FakeSlurm,
    tmp_path: Path,
    words: tuple[str, ...],
    changes: dict[str, Any],
    wanted: dict[str, str | None],
) -> None:
    execution = {"batch_size": 4, "chunk_size": 4, "accelerator": "cpu", **changes}
    study = write_study(tmp_path, execution=execution)
    assert cli("launch", study, "-o", tmp_path / "out", "--slurm", *words).exit_code == 0
    generate, evaluate = fake.calls("sbatch")
    assert names([generate]) == ["generate-nodes" if "--nodes" in words else "generate-array"]
    assert {name: option(generate, name) for name in wanted} == wanted
    one = "1" if "--gpus-per-node" in words else None
    of_others = {name: option(evaluate, name) for name in ("array", "nodes", "ntasks-per-node")}
    assert set(of_others.values()) == {None}
    assert option(evaluate, "gpus-per-node") == one


def test_options_of_sbatch_reach_every_job(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    study = write_study(tmp_path, variants=CALIBRATED)
    given = ("--partition", "gpu", "--time", "1-00:00", "--account", "me")
    extra = ("--", "--qos=low", "--mem", "32G", "--dependency=afterok:7", "--comment=a b;c")
    assert cli("launch", study, "-o", tmp_path / "out", "--slurm", *given, *extra).exit_code == 0
    calls = fake.calls("sbatch")
    assert len(calls) == 3
    for words in calls:
        found = [option(words, name) for name in ("partition", "time", "account", "comment")]
        assert found == ["gpu", "1-00:00", "me", "a b;c"]
        assert words[words.index("--mem") + 1] == "32G"
    waits = [option(words, "dependency") for words in calls]
    assert waits == ["afterok:7", "afterany:100", "afterany:101"]


def test_options_that_begin_like_refused_ones_are_passed_through(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    extra = ("--nodelist=n1", "--export-file=x", "--exclusive", "--wait", "--tmp=1", "--nodef=y")
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm", "--", *extra)
    assert cli(*words).exit_code == 0
    assert all(set(extra) <= set(words) for words in fake.calls("sbatch"))


def test_a_percent_sign_in_a_path_is_no_pattern(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    out = tmp_path / "50%j"
    assert cli("launch", write_study(tmp_path), "-o", out, "--slurm").exit_code == 0
    assert option(fake.calls("sbatch")[1], "output") == f"{tmp_path}/50%%j/slurm/%x-%j.out"


def test_a_dry_run_shows_the_commands_and_does_nothing(
    cli: Cli, write_study: Write, no_slurm: None, tmp_path: Path
) -> None:
    study, out = write_study(tmp_path, variants=CALIBRATED), tmp_path / "out"
    told = cli(
        "launch", study, "-o", out, "--slurm", "--dry-run", "--array", "2", "--", "--qos=a b"
    )
    assert told.exit_code == 0, told.stderr
    lines = [shlex.split(line) for line in told.stdout.splitlines()]
    assert {line[0] for line in lines} == {"sbatch"}
    assert names(lines) == ["calibrate", "generate-array", "evaluate"]
    waits = [option(line, "dependency") for line in lines]
    assert waits == [None, "afterany:CALIBRATE_ID", "afterany:GENERATE_ID"]
    assert all("--qos=a b" in line for line in lines)
    assert not out.exists()


def test_what_a_dry_run_shows_is_what_is_run(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "new_id", lambda: "20300101T000000-abcdef")
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm", "--nodes", "2")
    shown = [shlex.split(line) for line in cli(*words, "--dry-run").stdout.splitlines()]
    assert fake.calls("sbatch") == []
    cli(*words)
    run = [["sbatch", *call] for call in fake.calls("sbatch")]
    assert [[word.replace("GENERATE_ID", "100") for word in line] for line in shown] == run


def test_the_scripts_may_be_ones_own(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    own = tmp_path / "mine"
    own.mkdir()
    study = write_study(tmp_path)
    words = ("launch", study, "-o", tmp_path / "out", "--slurm", "--scripts", own)
    assert "SLURM scripts: no calibrate.sbatch, generate-array.sbatch, " in refusal(cli(*words))
    for name in slurm.SCRIPTS:
        (own / f"{name}.sbatch").write_text("#!/bin/bash\n")
    assert cli(*words).exit_code == 0
    assert all(str(own) in " ".join(call) for call in fake.calls("sbatch"))
    assert {path.read_text() for path in own.iterdir()} == {"#!/bin/bash\n"}


# --- what is missing, and what is there already --------------------------------------------------


def test_a_second_launch_waits_for_the_first(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm", "--array", "2")
    assert cli(*words).exit_code == 0
    fake.states(j100="RUNNING")
    told = refusal(cli(*words))
    assert "100_0 RUNNING, 100_1 RUNNING, 101 PENDING; nothing was submitted" in told
    assert len(fake.calls("sbatch")) == 2
    fake.states(j100="COMPLETED", j101="COMPLETING")
    assert "is still in the queue: 101 COMPLETING; " in refusal(cli(*words))
    assert cli(*words, "--force").exit_code == 0
    assert len(fake.calls("sbatch")) == 4
    fake.states(j101="FAILED", j102="", j103="TIMEOUT")
    assert cli(*words).exit_code == 0
    launches = json.loads((tmp_path / "out" / "slurm" / "launches.json").read_text())
    assert [[job["id"] for job in launch["jobs"]] for launch in launches] == [
        ["100", "101"],
        ["102", "103"],
        ["104", "105"],
    ]
    assert len({launch["id"] for launch in launches}) == 3


def test_jobs_that_slurm_has_forgotten_are_gone(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm")
    assert cli(*words).exit_code == 0
    monkeypatch.setenv("QUEUE_FAILS", "slurm_load_jobs error: Invalid job id specified")
    assert cli(*words).exit_code == 0


def test_a_queue_that_cannot_be_read_is_not_an_empty_one(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm")
    assert cli(*words).exit_code == 0
    monkeypatch.setenv("QUEUE_FAILS", "slurm_load_jobs error: Unable to contact controller")
    told = refusal(cli(*words))
    assert "Unable to contact controller; jobs 100, 101 of an earlier launch" in told
    assert len(fake.calls("sbatch")) == 2
    assert cli(*words, "--force").exit_code == 0


def test_two_launches_at_the_same_moment_are_one(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm", "--force")
    other = replace(this_process(), machine="login2/boot/space")
    with Claims(tmp_path / "out" / "claims", owner=other) as claims:
        assert claims.take("submission")
        told = refusal(cli(*words))
        assert told.startswith("another process is submitting jobs for ")
        assert fake.calls("sbatch") == []
    assert cli(*words).exit_code == 0
    assert not list((tmp_path / "out" / "claims").glob("submission*"))


def test_nothing_is_made_twice(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    """With all images there only the scores are computed; a chunk less, and one task makes it."""
    study, out = write_study(tmp_path, variants=CALIBRATED), tmp_path / "out"
    assert cli("launch", study, "-o", out).exit_code == 0
    words = ("launch", study, "-o", out, "--slurm", "--array", "3")
    assert cli(*words).exit_code == 0
    assert names(fake.calls("sbatch")) == ["evaluate"]
    assert option(fake.calls("sbatch")[0], "dependency") is None
    fake.states(j100="COMPLETED")
    next(out.glob("w8a8-*/chunks/*")).unlink()
    assert cli(*words).exit_code == 0
    assert names(fake.calls("sbatch")[1:]) == ["generate-array", "evaluate"]
    assert option(fake.calls("sbatch")[1], "array") == "0-0"
    fake.states(j101="", j102="")
    next(out.glob("artifacts/*.safetensors")).unlink()
    assert cli(*words).exit_code == 0
    assert names(fake.calls("sbatch")[3:]) == ["calibrate", "generate-array", "evaluate"]


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_mistake_in_the_study_is_found_before_anything_is_submitted(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    study = write_study(tmp_path, sampler={"name": "ddimm", "steps": 5})
    assert "did you mean 'ddim'" in refusal(cli("launch", study, "-o", tmp_path / "o", "--slurm"))
    assert fake.calls("sbatch") == []
    assert not (tmp_path / "o").exists()


def test_without_slurm_it_says_so(
    cli: Cli, write_study: Write, no_slurm: None, tmp_path: Path
) -> None:
    told = refusal(cli("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm"))
    assert told.startswith("sbatch was not found: wanted SLURM's programs on the PATH")
    assert not list((tmp_path / "out" / "slurm").iterdir())


def test_a_refused_job_takes_the_others_with_it(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = write_study(tmp_path, variants=CALIBRATED), tmp_path / "out"
    monkeypatch.setenv("REFUSE", "evaluate")
    assert refusal(cli("launch", study, "-o", out, "--slurm")) == (
        "the evaluate job was refused: sbatch: error: invalid partition specified: gpuu sbatch: "
        "error: Batch job submission failed; the jobs submitted before it (100, 101) were cancelled"
    )
    assert fake.calls("scancel") == [["100", "101"]]
    assert json.loads((out / "slurm" / "launches.json").read_text()) == []
    monkeypatch.setenv("REFUSE", "calibrate")
    assert "the calibrate job was refused" in refusal(cli("launch", study, "-o", out, "--slurm"))
    assert len(fake.calls("scancel")) == 1


def test_jobs_that_cannot_be_cancelled_stay_on_record(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = write_study(tmp_path), tmp_path / "out"
    monkeypatch.setenv("REFUSE", "evaluate")
    monkeypatch.setenv("CANCEL_FAILS", "scancel: error: no")
    told = refusal(cli("launch", study, "-o", out, "--slurm"))
    assert told.endswith("(100) are still there: cannot cancel 100: scancel: error: no")
    assert "100_0 PENDING" in refusal(cli("launch", study, "-o", out, "--slurm"))


def test_an_answer_that_is_no_job_is_refused(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm")
    monkeypatch.setenv("ANSWER", "Submitted")
    assert "wanted its id from sbatch, got 'Submitted\\n'" in refusal(cli(*words))
    monkeypatch.setenv("ANSWER", "77;cluster")
    assert cli(*words).exit_code == 0
    assert option(fake.calls("sbatch")[-1], "dependency") == "afterany:77"


def test_a_damaged_record_is_named(
    cli: Cli, write_study: Write, fake: FakeSlurm, tmp_path: Path
) -> None:
    record = tmp_path / "out" / "slurm" / "launches.json"
    record.parent.mkdir(parents=True)
    jobs = ("{}", '{"id": "1"}', '{"id": "abc", "kind": "generate"}', '{"id": 1, "kind": "x"}')
    entries = [f'[{{"id": "a", "jobs": [{job}]}}]' for job in jobs]
    for text in ("[{", "[1]", "{}", '[{"jobs": []}]', *entries):
        record.write_text(text)
        told = refusal(cli("launch", write_study(tmp_path), "-o", tmp_path / "out", "--slurm"))
        assert told.startswith(f"{record}: cannot be read (")
        assert "\n" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slurm", "--array", "2", "--nodes", "2"), "--array and --nodes exclude each other"),
        (("--slurm", "debug"), "'debug' is no option of sbatch"),
        (("--slurm", "--", "--array=0-9"), "--array=0-9: cannot be passed through"),
        (("--slurm", "--", "-N2"), "-N2: cannot be passed through to sbatch: give it before"),
        (("--slurm", "--", "--mem=1G", "--export=NONE"), "--export=NONE: cannot be passed through"),
        (("--slurm", "--", "--wrap", "true"), "--wrap: cannot be passed through"),
        (("--slurm", "--", "--arra=0-3"), "--arra=0-3: cannot be passed through to sbatch: give"),
        (("--slurm", "--", "--ar", "0-3"), "--ar: cannot be passed through to sbatch: give"),
        (("--slurm", "--", "--test"), "--test: cannot be passed through to sbatch: use --dry-run"),
    ],
)
def test_options_that_cannot_be_together_are_refused(
    cli: Cli,
    write_study: Write,
    fake: FakeSlurm,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    told = refusal(cli("launch", write_study(tmp_path), "-o", tmp_path / "out", *words))
    assert told.startswith(message)
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--array", "2"), "--array is for --slurm"),
        (("--gpus-per-node", "2"), "--gpus-per-node is for --slurm"),
        (("--dry-run",), "--dry-run is for --slurm"),
        (("--time", "1:00"), "--time is for --slurm"),
        (("--", "--qos=low"), "what follows the study is for --slurm"),
        (("--slurm", "--array", "0"), "0 is not in the range x>=1"),
    ],
)
def test_options_of_slurm_need_slurm(cli: Cli, words: tuple[str, ...], message: str) -> None:
    told = cli("launch", "quickstart", *words)
    assert (told.exit_code, told.stdout) == (2, "")
    assert message in told.stderr


# --- on a cluster ---------------------------------------------------------------------------------


@pytest.fixture
def on_cluster(cluster: Cluster, witness: None, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Commands of this process and their jobs see the cluster, and find this iec-eval."""
    for name in set(os.environ) - set(cluster.environment):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return cluster


def scores(out: Path) -> dict[str, dict[str, float]]:
    """The metrics of every row, all of them done."""
    found = json.loads((out / "results.json").read_text())["variants"]
    assert {row["status"] for row in found} == {"done"}
    return {
        row["name"]: {name: one["value"] for name, one in row["metrics"].items()} for row in found
    }


def submitted(result: Result) -> dict[str, tuple[str, int]]:
    """What a launch says it has submitted: the job and the tasks of each kind."""
    assert result.exit_code == 0, result.stderr
    found = re.findall(r"^  (\w+) +job (\d+)(?:, (\d+) tasks)?", result.stdout, re.MULTILINE)
    return {kind: (job, int(tasks or 1)) for kind, job, tasks in found}


def kill_who_makes(chunk: tuple[str, str], shown: dict[str, Any]) -> None:
    """Kill the process that makes a chunk (its row and its work), if it is the last one missing."""
    missing = sum(row["chunks_missing"] for row in shown["rows"])
    for row in shown["rows"] if missing == 1 else []:
        for worker in row["workers"]:
            if (row["name"], worker["work"]) == chunk:
                with suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_chain_that_loses_a_chunk_is_completed_by_a_second_launch(
    cli: Cli,
    write_study: Write,
    on_cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever takes up the last chunk is killed, until nobody of the launch is left."""
    last = {"name": "last", "callbacks": [{"name": "witness"}]}
    variants = [VARIANTS[0], {"name": "W8A8", "efficiency": [QUANTIZER]}, last]
    sizes = {"images": {"seed": 7, "count": 4}, "calibration": {"seed": 1, "images": 4}}
    study, out = write_study(tmp_path, variants=variants, **sizes), tmp_path / "out"
    assert cli("launch", study, "-o", tmp_path / "plain").exit_code == 0

    monkeypatch.setenv("WITNESS_PAUSE", "8")  # a step; processes do not all start at once
    words = ("launch", study, "-o", out, "--slurm", "--array", "3", "--", "--cpus-per-task=1")
    jobs = submitted(cli(*words))
    assert [tasks for _, tasks in jobs.values()] == [1, 3, 1]
    assert "nothing was submitted" in refusal(cli(*words))
    seen: list[dict[str, Any]] = []

    def generated() -> bool:
        if (out / "rows.json").is_file():
            seen.append(json.loads(cli("status", out, "--json").stdout))
            kill_who_makes(("last", "images 000000-000003"), seen[-1])
        states = on_cluster.state(jobs["generate"][0]).split(",")
        return set(states) <= {"COMPLETED", "FAILED"}

    on_cluster.until(generated, 120, "the end of the array")
    assert "FAILED" in on_cluster.state(jobs["generate"][0])
    makers = {worker["job"] for one in seen for row in one["rows"] for worker in row["workers"]}
    tasks = {f"{jobs['generate'][0]}_{number}" for number in range(3)}
    assert makers & tasks
    assert makers <= tasks | {jobs["calibrate"][0]}
    assert {job["id"] for job in seen[-1]["jobs"]} == {job for job, _ in jobs.values()}
    states = {task["state"] for one in seen for job in one["jobs"] for task in job["tasks"]}
    assert {"PENDING", "RUNNING", "COMPLETED"} <= states
    on_cluster.wait(jobs["evaluate"][0], 60)
    table = json.loads((out / "results.json").read_text())
    assert [row["status"] for row in table["variants"]] == ["done", "done", "partial"]

    monkeypatch.setenv("WITNESS_PAUSE", "0")
    jobs = submitted(cli(*words))
    assert {kind: tasks for kind, (_, tasks) in jobs.items()} == {"generate": 1, "evaluate": 1}
    ended = on_cluster.wait([job for job, _ in jobs.values()], 100)
    assert set(ended.values()) == {"COMPLETED"}, cli("status", out).stdout
    plain, found = scores(tmp_path / "plain"), scores(out)
    assert found == {name: pytest.approx(row, rel=1e-6) for name, row in plain.items()}
    shown = json.loads(cli("status", out, "--json").stdout)
    assert {row["state"] for row in shown["rows"]} == {"done"}
    assert shown["results"] == "current"
