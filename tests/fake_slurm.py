"""Small programs in the place of SLURM's, which write down how they are called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

# SLURM's programs as far as they are used: every call goes into calls.json, the queue is a file.
# REFUSE names a script that is refused, QUEUE_FAILS and CANCEL_FAILS hold what is then said.
FAKE = """#!{python}
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
name, words = Path(sys.argv[0]).name, sys.argv[1:]
calls = here / "calls.json"
made = json.loads(calls.read_text()) if calls.exists() else []
calls.write_text(json.dumps([*made, [name, *words]]))
queue = here / "queue"
if name == "sbatch":
    script = next(word for word in words if word.endswith(".sbatch"))
    if os.environ.get("REFUSE", "nothing") in script:
        print("sbatch: error: invalid partition specified: gpuu", file=sys.stderr)
        print("sbatch: error: Batch job submission failed", file=sys.stderr)
        sys.exit(1)
    job = 100 + sum(call[0] == "sbatch" for call in made)
    array = next((word[len("--array=0-"):] for word in words if word.startswith("--array")), None)
    tasks = [str(job)] if array is None else [f"{{job}}_{{i}}" for i in range(int(array) + 1)]
    with queue.open("a") as file:
        for i, task in enumerate(tasks):
            print(f"{{job}}|{{task}}|{{job + 1000 * i}}|PENDING|Priority", file=file)
    print(os.environ.get("ANSWER", f"{{job}}"))
elif name == "squeue":
    if "QUEUE_FAILS" in os.environ:
        sys.exit(os.environ["QUEUE_FAILS"])
    wanted = next(word[len("--jobs="):] for word in words if word.startswith("--jobs="))
    for line in queue.read_text().splitlines() if queue.exists() else []:
        if set(line.split("|")[0:3:2]) & set(wanted.split(",")):
            print(line)
elif "CANCEL_FAILS" in os.environ:
    sys.exit(os.environ["CANCEL_FAILS"])
"""


class FakeSlurm:
    """The folder of SLURM's stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of one of the programs."""
        path = self.folder / "calls.json"
        made = json.loads(path.read_text()) if path.exists() else []
        return [words for called, *words in made if called == name]

    def states(self, **of: str) -> None:
        """Set the state of every task of a job: ``j100="RUNNING"``; an empty one forgets it."""
        lines = []
        for line in (self.folder / "queue").read_text().splitlines():
            job, task, number, state, reason = line.split("|")
            state = of.get(f"j{task}", of.get(f"j{job}", state))
            lines += [f"{job}|{task}|{number}|{state}|{reason}"] if state else []
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put the stand-ins on the PATH, in a new folder."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        path = folder / name
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return FakeSlurm(folder)
