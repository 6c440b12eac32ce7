"""What a second process gains, what the machinery for it costs, and how well this is predicted.

    python tests/benchmark_scaling.py [--pairs 5] [--images 256] [--steps 10]
    python tests/benchmark_scaling.py --constants

Without ``--constants``, on a machine with two idle cores:

* two processes of one thread against one, in turns: images a second of generation itself and of
  the whole command, start-up included (medians of the paired ratios);
* what ``show --scale 2`` predicts from the run of one process, against the wall time of two;
* one process with and without claims, parts and checksums, in turns;
* bytes of 1,000 images as chunk files and as PNG files.

With ``--constants``: the speeds of this machine that ``show --assume`` takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from iec_eval import storage, workflow
from iec_eval.assembly import assemble
from iec_eval.claims import Claims
from iec_eval.generation import generate
from iec_eval.jobs import Job
from iec_eval.plugins import load_registry
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder, VariantFolder
from iec_eval.scaling import Assumptions
from iec_eval.storage import content_digest, read_about, read_tensors, write_tensors, write_text
from iec_eval.study import load
from iec_eval.study_plans import plan_study
from iec_eval.work import Share
from iec_eval.workload import ScaleQuestion

GOAL, OVERHEAD_GOAL = 1.9, 0.01
CHUNKS = 16  # of a run: two processes have eight each


@dataclass(frozen=True)
class Timed:
    """A run of ``generate``: seconds of the command, and those in which images were made."""

    folder: Path
    wall: float
    generation: float


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as place:
        study = _write_study(Path(place), options.images, options.steps, CHUNKS)
        if options.constants:
            print_constants(study, Path(place))
            return
        compare_processes(study, Path(place), options.pairs)
        larger = _write_study(Path(place), options.images, options.steps, CHUNKS // 4)
        compare_machinery(larger, Path(place), options.pairs)


def compare_processes(study: Path, place: Path, pairs: int) -> None:
    """Two processes against one, and the prediction of the one from the other."""
    timed = []
    for turn in range(pairs):
        order = (2, 1) if turn % 2 else (1, 2)
        runs = {n: _run(study, place / f"{turn}-{n}", n) for n in order}
        timed.append((runs[1], runs[2]))
        print(f"pair {turn + 1}: {_seconds(runs[1])}; {_seconds(runs[2])}", flush=True)
    _tell("generation", [one.generation / two.generation for one, two in timed], GOAL)
    _tell("whole command", [one.wall / two.wall for one, two in timed], None)
    errors = [predicted(study, one) / two.wall - 1 for one, two in timed]
    print(
        f"predicted wall time of 2 processes from 1: {100 * statistics.median(errors):+.1f} % "
        f"({100 * min(errors):+.1f} to {100 * max(errors):+.1f})"
    )
    told = workflow.export(timed[0][0].folder, place / "png", None)
    print(told.text.splitlines()[-1])


def predicted(study: Path, one: Timed) -> float:
    """Wall time of ``generate`` on 2 processes, by ``show --scale`` from a run on one."""
    # Lightning starts the second process when the first has started; the row is in it
    start = f"start={2 * (one.wall - one.generation)}"
    asked = ScaleQuestion("2", assume=[start, "row=1e-9"])
    shown = workflow.show(str(study), (), one.folder, as_json=True, tflops=1.0, scale=asked)
    found = json.loads(shown)["scale"]["processes"][0]
    return float(found["start"] + found["generation"])


def compare_machinery(study: Path, place: Path, pairs: int) -> None:
    """One process with and without claims, parts and checksums; both pay for all the rest."""
    turns = itertools.count()

    def with_it() -> None:
        folder = RunFolder(place / f"with-{next(turns)}")
        _generate_here(study, folder, folder.claims())

    def without() -> None:
        folder = RunFolder(place / f"without-{next(turns)}")
        with _no_parts_nor_checksums():
            _generate_here(study, folder, NoClaims(folder.path / "claims"))

    with_it()  # warms up
    order = ((with_it, without), (without, with_it))
    taken = [{action: _took(action) for action in order[turn % 2]} for turn in range(pairs)]
    for number, name in enumerate(("wall", "CPU")):
        shares = [one[with_it][number] / one[without][number] - 1 for one in taken]
        print(
            f"claims, parts and checksums, {name}: {100 * statistics.median(shares):+.2f} % "
            f"(goal below {100 * OVERHEAD_GOAL:.0f} %; {100 * min(shares):+.2f} to "
            f"{100 * max(shares):+.2f} in {len(shares)} pairs)",
            flush=True,
        )


class NoClaims(Claims):
    """Everything is to be had, and nobody hears of it: no files, no thread."""

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *ending: Any) -> None:
        pass

    def take(self, name: str) -> bool:
        return True

    def release(self, name: str) -> None:
        pass


@contextmanager
def _no_parts_nor_checksums() -> Iterator[None]:
    with (
        mock.patch.object(VariantFolder, "write_part"),
        mock.patch.object(storage, "content_digest", return_value=""),
    ):
        yield


def _generate_here(study: Path, run: RunFolder, claims: Claims) -> None:
    read = load(str(study), ["execution.devices=1"])
    (plan,) = plan_study(read, load_registry())
    jobs = [Job(plan, run.variant("row", plan.fingerprint))]
    progress = Progress("images", visible=False)
    share = Share(features=False)
    generate(jobs, read.execution, None, claims, progress=progress, share=share, alone=True)


def _took(action: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall and CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def print_constants(study: Path, place: Path) -> None:
    """The defaults of Assumptions, measured here."""
    run = _run(study, place / "run", 1)
    found = {**measured_disk(place), **measured_row(study), "scoring": measured_scoring()}
    found["start"] = run.wall - run.generation - found["row"]
    for name in vars(Assumptions()):
        print(f"--assume {name}={found[name]:.3g}")


def _run(study: Path, out: Path, processes: int) -> Timed:
    """Generate on so many processes of one thread each."""
    words = ["generate", str(study), "-o", str(out), "-s", f"execution.devices={processes}"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOCAL_RANK"))}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "iec_eval", *words],
        env={**kept, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return Timed(out, time.perf_counter() - began, _generation_seconds(out))


def _generation_seconds(out: Path) -> float:
    """From the beginning of the first chunk to the end of the last, by what the files say."""
    ends = {path: path.stat().st_mtime for path in out.glob("*/chunks/*.safetensors")}
    begins = [end - read_about(path)["seconds"] for path, end in ends.items()]
    return max(ends.values()) - min(begins)


def measured_disk(place: Path) -> dict[str, float]:
    """Bytes a second written and read with their checksums, and seconds for a file."""
    images = torch.randint(0, 256, (256, 3, 256, 256), dtype=torch.uint8)
    path = place / "images.safetensors"
    write = _best(lambda: write_tensors(path, {"images": images}))
    read = _best(lambda: content_digest(read_tensors(path)[0]))

    def small() -> None:
        for number in range(100):
            write_text(place / f"{number}.txt", "")
        for number in range(100):
            (place / f"{number}.txt").unlink()

    return {
        "write": images.numel() / write,
        "read": images.numel() / read,
        "file": _best(small) / 200,
    }


def measured_row(study: Path) -> dict[str, float]:
    """Seconds to build a row's network with its weights, which are in the page cache."""
    (plan,) = plan_study(load(str(study)), load_registry())
    return {"row": _best(lambda: assemble(plan))}


def measured_scoring() -> float:
    """Operations a second of FID's sums: float64 products of features, two for each."""
    features = torch.randn(4096, 2048, dtype=torch.float64)
    return 2 * features.numel() * 2048 / _best(lambda: features.T @ features)


def _best(action: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _seconds(run: Timed) -> str:
    return f"{run.generation:.2f} s of {run.wall:.2f} s generating"


def _tell(what: str, ratios: list[float], goal: float | None) -> None:
    wanted = "" if goal is None else f"goal {goal}; "
    print(
        f"{what}: {statistics.median(ratios):.3f} times the images a second "
        f"({wanted}{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs)"
    )


def _write_study(place: Path, images: int, steps: int, chunks: int) -> Path:
    size = max(1, images // chunks)
    study = {
        "study": "scaling",
        "model": {"name": "fashion-mnist"},
        "sampler": {"name": "ddim", "steps": steps},
        "images": {"seed": 0, "count": images},
        "metrics": [{"name": "is", "features": "fashion-mnist"}],
        "controls": [],
        "variants": [{"name": "full precision"}],
        "execution": {
            "batch_size": max(1, size // 2),  # so that half of it waits as a part
            "chunk_size": size,
            "threads": 1,
            "accelerator": "cpu",
        },
    }
    path = place / f"study-{chunks}.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--constants", action="store_true", help="speeds of this machine")
    return parser.parse_args()


if __name__ == "__main__":
    main()
