"""The virtual cluster of the tests, and the scripts in slurm/ on it.

Jobs here are of a second or two, and where a script calls iec-eval, a few lines of bash answer:
what is asked is what SLURM and the scripts do. Real runs are in test_slurm_jobs.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cluster as module
import pytest
from cluster import Cluster, processes, require_slurm, virtual_cluster

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
NAMES = ["calibrate", "evaluate", "generate-array", "generate-nodes"]

# Answers as iec-eval: "$1 $2" are the verb and what to do; notes are kept for the next start.
PROGRAM = """\
#!/bin/bash
echo "task $SLURM_PROCID of $SLURM_NTASKS, restart ${SLURM_RESTART_COUNT:-0}: $*"
stop() { sleep 0.3; exit "$1"; }
case "$2" in
arguments) printf '<%s>' "$@" ;;
once) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit "$3" ;;
always) exit "$3" ;;
starting) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || kill -USR1 $$ ;;
wait)
    trap 'stop 143' TERM
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def clean(cluster: Cluster) -> Iterator[None]:
    """Nothing of this test is left in the queue."""
    yield
    cluster.cancel()


# --- the cluster --------------------------------------------------------------------------------


def test_two_idle_nodes_on_loopback_only(cluster):
    assert cluster.run("sinfo", "-h", "-p", "main", "-o", "%D %T").stdout.split() == ["2", "idle"]
    settings = (cluster.folder / "slurm.conf").read_text()
    ports = set(map(int, re.findall(r"Port=(\d+)", settings)))
    assert len(ports) == 3  # slurmctld and two slurmd
    assert {port: address for address, port in _listening() if port in ports} == dict.fromkeys(
        ports, "0100007F"
    )


def _listening() -> list[tuple[str, int]]:
    """Address (hexadecimal) and port of every TCP socket that listens."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [(address, int(port, 16)) for address, port in places]


def test_a_job_runs_on_both_nodes(cluster):
    script = cluster.script("srun bash -c 'echo $SLURM_PROCID on $SLURMD_NODENAME'")
    job = cluster.submit(script, options=["--nodes=2", "--ntasks-per-node=2"])
    assert cluster.wait(job, 20) == {job: "COMPLETED"}
    expected = ["0 on n1", "1 on n1", "2 on n2", "3 on n2"]
    assert sorted(cluster.log(job).splitlines()) == expected


def test_an_array_and_a_job_after_it(cluster):
    array = cluster.submit(cluster.script("sleep 0.5; date +%s.%N"), options=["--array=0-3%2"])
    after = cluster.submit(cluster.script("date +%s.%N"), options=[f"--dependency=afterok:{array}"])
    ends = cluster.wait([array, after], 30)
    assert ends == {array: "COMPLETED", after: "COMPLETED"}
    times = list(map(float, cluster.log(array).split()))
    assert len(times) == len(cluster.tasks(array)) == 4
    assert float(cluster.log(after)) > max(times)


def test_a_failed_job_says_so_and_holds_back_what_needs_it(cluster, clean):
    failing = cluster.submit(cluster.script("exit 3"))
    needs = cluster.submit(cluster.script("true"), options=[f"--dependency=afterok:{failing}"])
    follows = cluster.submit(cluster.script("true"), options=[f"--dependency=afterany:{failing}"])
    cluster.wait([failing, follows], 20)
    assert cluster.state(failing) == "FAILED"
    assert cluster.tasks(failing)[failing]["ExitCode"] == "3:0"
    assert cluster.state(follows) == "COMPLETED"
    assert cluster.queue() == {needs: "PENDING"}


def test_gpus_are_handed_out(cluster):
    script = cluster.script("echo $CUDA_VISIBLE_DEVICES; sleep 1")
    jobs = [cluster.submit(script, options=["--gpus-per-node=1", "-w", "n1"]) for _ in range(2)]
    cluster.wait(jobs, 20)
    assert sorted(cluster.log(job).strip() for job in jobs) == ["0", "1"]
    refused = cluster.run("sbatch", "--gpus-per-node=3", script, check=False)
    assert refused.returncode
    assert "configuration is not available" in refused.stderr


def test_an_unknown_partition_is_refused(cluster):
    refused = cluster.run("sbatch", "-p", "nowhere", cluster.script("true"), check=False)
    assert refused.returncode
    assert "invalid partition" in refused.stderr


def test_a_wait_that_fails_shows_the_logs(cluster, clean):
    job = cluster.submit(cluster.script("echo from the job; sleep 60"))
    cluster.until(lambda: "from the job" in cluster.log(job), 20, "output")
    with pytest.raises(AssertionError) as error:
        cluster.wait(job, 0.3)
    for part in ("within 0.3 s", "from the job", "slurmctld.log", "slurmd.n2.log", "squeue"):
        assert part in str(error.value)


def test_clusters_side_by_side_do_not_meet(cluster):
    with virtual_cluster() as other:
        script = "echo $SLURM_CONF; sleep 1"
        jobs = {each: each.submit(each.script(script)) for each in (cluster, other)}
        for each, job in jobs.items():
            assert each.queue().keys() <= {job}
            assert each.wait(job, 20) == {job: "COMPLETED"}
            assert each.log(job).strip() == f"{each.folder}/slurm.conf"
        assert int(jobs[cluster]) % 10000 != int(jobs[other]) % 10000  # the port of Lightning
    assert not other.folder.exists()
    assert not processes(other.folder)


KILLED = """
import sys, time
from cluster import virtual_cluster
with virtual_cluster() as made:
    job = made.submit(made.script("srun sleep 100"))
    made.wait(job, 20, ["RUNNING"])
    print(made.folder, flush=True)
    time.sleep(100)
"""


def test_nothing_of_it_survives_a_killed_process(cluster):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())  # bounded: it waits so itself
    process.kill()
    process.communicate(timeout=20)
    assert folder.name.startswith("slurm-")
    cluster.until(lambda: not folder.exists() and not processes(folder), 20, "the end of it")


def test_without_slurm_tests_skip_or_where_it_must_be_fail(monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", ("slurmctld", "no-such-program"))
    monkeypatch.delenv("IEC_EVAL_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-program.*apt-get install.*munge"):
        require_slurm()
    monkeypatch.setenv("IEC_EVAL_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        require_slurm()


# --- the scripts --------------------------------------------------------------------------------


def test_the_scripts_are_these():
    assert [path.stem for path in SCRIPTS] == NAMES
    assert len({path.read_text().partition("\nstatus=$?")[2] for path in SCRIPTS}) == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_a_script_is_bash_with_one_call(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=20)
    text = path.read_text()
    (call,) = re.findall(r"^srun .*", text, re.MULTILINE)
    verb = path.stem.partition("-")[0]
    assert call.endswith(f'"${{container[@]}}" iec-eval {verb} "$@"')
    for option in ("--requeue", "--open-mode=append", "--signal=USR1@120", "--time="):
        assert f"\n#SBATCH {option}" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_slurm_takes_a_script(cluster, path):
    for options in ([], ["--gpus-per-node=2", "--ntasks-per-node=2", "--time=1"]):
        cluster.run("sbatch", "--test-only", *options, path, "study.yaml", "-o", "out")


@dataclass(frozen=True)
class Bench:
    """Submits scripts that find the stand-in for iec-eval."""

    cluster: Cluster
    path: str

    def submit(self, name: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        script = ROOT / "slurm" / f"{name}.sbatch" if "/" not in name else Path(name)
        small = ["--cpus-per-task=1", *options]
        return self.cluster.submit(script, *arguments, options=small, PATH=self.path)


@pytest.fixture(scope="module")
def bench(cluster: Cluster) -> Bench:
    place = cluster.folder / "bin"
    place.mkdir()
    (place / "iec-eval").write_text(PROGRAM)
    (place / "iec-eval").chmod(0o755)
    return Bench(cluster, f"{place}{os.pathsep}{os.environ['PATH']}")


@dataclass(frozen=True)
class Ended:
    """A job that is over."""

    state: str
    restarts: int
    log: str


@pytest.fixture(scope="module")
def ended(bench: Bench) -> dict[str, Ended]:
    """Jobs that were interrupted in every way, side by side: their delays are what takes long."""
    cluster = bench.cluster
    twice = cluster.folder / "scripts" / "twice.sbatch"
    text = (ROOT / "slurm" / "calibrate.sbatch").read_text()
    twice.write_text(text.replace("max_restarts=100", "max_restarts=1"))
    jobs = {
        "plain": bench.submit("generate-nodes", "arguments", "a b", "", "-s", "x='1 2'"),
        "limit": bench.submit("generate-nodes", "once", "75"),
        "array": bench.submit("generate-array", "once", "75", options=("--array=0-1",)),
        "starting": bench.submit("evaluate", "starting"),
        "failed": bench.submit("evaluate", "always", "1"),
        "fixed": bench.submit("evaluate", "always", "75", options=("--no-requeue",)),
        "endless": bench.submit(str(twice), "always", "75"),
        "killed": bench.submit("generate-nodes", "once", "137", options=("--time=60",)),
        "killed late": bench.submit("generate-nodes", "once", "137", options=("--time=2",)),
        "requeued": bench.submit("calibrate", "wait"),
        "cancelled": bench.submit("evaluate", "wait"),
    }
    for name, command in (("requeued", ["scontrol", "requeue"]), ("cancelled", ["scancel"])):
        cluster.until(lambda name=name: "wait" in cluster.log(jobs[name]), 20, "a start")
        cluster.run(*command, jobs[name])
    cluster.wait(jobs.values(), 30)  # a requeue takes seconds, not SLURM's two minutes
    return {
        name: Ended(cluster.state(job), cluster.restarts(job), cluster.log(job))
        for name, job in jobs.items()
    }


def test_arguments_are_passed_on_as_they_are(ended):
    assert ended["plain"].state == "COMPLETED"
    assert ended["plain"].log.count("<generate><arguments><a b><><-s><x='1 2'>") == 2


@pytest.mark.parametrize(("name", "restarts"), [("limit", 1), ("array", 2), ("starting", 1)])
def test_a_job_told_to_stop_requeues_itself(ended, name, restarts):
    """Every task of an array does so for itself; also where iec-eval could not yet listen."""
    job = ended[name]
    assert (job.state, job.restarts) == ("COMPLETED", restarts)
    assert job.log.count("requeued, restart 1 goes on from here") == restarts
    assert "restart 0" in job.log  # the log of the first start was kept


def test_a_job_requeued_by_hand_is_not_requeued_twice(ended):
    assert (ended["requeued"].state, ended["requeued"].restarts) == ("COMPLETED", 1)
    assert "SLURM is ending this job (COMPLETING)" in ended["requeued"].log


def test_a_failed_job_is_not_requeued(ended):
    assert (ended["failed"].state, ended["failed"].restarts) == ("FAILED", 0)
    assert "ended with status 1" in ended["failed"].log


def test_a_killed_process_keeps_no_other_from_going_on_after_the_limit(ended):
    """SLURM gives the highest status of all tasks, so 137 of one hides 75 of the others."""
    assert (ended["killed"].state, ended["killed"].restarts) == ("FAILED", 0)
    assert "ended with status 137" in ended["killed"].log
    assert (ended["killed late"].state, ended["killed late"].restarts) == ("COMPLETED", 1)
    assert "a process was killed; the time limit is near" in ended["killed late"].log


def test_where_slurm_does_not_requeue_the_log_says_what_to_do(ended):
    assert (ended["fixed"].state, ended["fixed"].restarts) == ("FAILED", 0)
    assert "run the same 'iec-eval launch STUDY --slurm' again" in ended["fixed"].log


def test_without_requeue_jobs_of_one_name_can_follow_one_another(bench, clean):
    """Each goes on from where the one before was interrupted, as docs/slurm.md says."""
    cluster, options = bench.cluster, ("--no-requeue", "--dependency=singleton", "-J", "follow")
    first = bench.submit("generate-array", "always", "75", options=("--array=0-1", *options))
    second = bench.submit("generate-array", "arguments", options=("--array=0-1", *options))
    assert cluster.wait([first, second], 30) == {first: "FAILED", second: "COMPLETED"}
    ends = [row["EndTime"] for row in cluster.tasks(first).values()]
    assert max(ends) <= min(row["StartTime"] for row in cluster.tasks(second).values())


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(ended):
    assert (ended["endless"].state, ended["endless"].restarts) == ("FAILED", 1)
    assert "after 1 restarts" in ended["endless"].log


def test_a_cancelled_job_stays_cancelled(ended):
    assert (ended["cancelled"].state, ended["cancelled"].restarts) == ("CANCELLED", 0)
    assert "SLURM is ending this job (COMPLETING)" in ended["cancelled"].log


def test_preempted_jobs_come_back(bench, clean):
    """Though their tasks end in their grace time, when SLURM holds them to be running."""
    cluster = bench.cluster
    nodes = bench.submit("generate-nodes", "wait", options=("--nodes=2",))
    array = bench.submit("generate-array", "wait", options=("--array=0-1",))
    for job in (nodes, array):
        cluster.until(lambda job=job: cluster.log(job).count("wait") == 2, 20, "a start")
    urgent = ["--partition=high", "--nodes=2", "--exclusive"]
    high = cluster.submit(cluster.script("sleep 0.5"), options=urgent)
    ends = cluster.wait([high, nodes, array], 40)
    assert set(ends.values()) == {"COMPLETED"}
    assert (cluster.restarts(nodes), cluster.restarts(array)) == (1, 2)
    assert cluster.log(nodes).count("interrupted (status 143); requeued") == 1
    assert cluster.log(array).count("interrupted (status 143); requeued") == 2


def test_the_wheel_has_the_scripts(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if "slurm_scripts" in name}
        assert found == {f"iec_eval/slurm_scripts/{name}.sbatch" for name in NAMES}
        for path in SCRIPTS:
            assert opened.read(f"iec_eval/slurm_scripts/{path.name}") == path.read_bytes()
