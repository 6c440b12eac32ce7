"""What the program costs beside the network: its generation against a bare DDIM loop.

    python tests/benchmark_overhead.py [--repeats 5] [--images 256] [--batch 64] [--steps 20]

Both make the same images with the same network, batches and steps on one thread, in turns. The
median of the paired ratios is printed, of wall time and of the process's own CPU time, which
other programs on the machine disturb less; so are the largest shares of a profile if asked for.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from iec_eval.claims import Claims
from iec_eval.generation import generate
from iec_eval.jobs import Job
from iec_eval.noise import Noise
from iec_eval.plugins import load_registry
from iec_eval.progress import Progress
from iec_eval.runs import VariantFolder
from iec_eval.samplers.ddim import ddim_coefficients
from iec_eval.study import Study
from iec_eval.study_plans import plan_study
from iec_eval.work import Share

GOAL = 1.05


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    study = _study(options.images, options.batch, options.steps)
    program, bare = _contestants(study)
    assert_alike(program(), bare())  # also warms both up
    if options.profile:
        _profile(program)
        return
    pairs = [_pair(program, bare, swap=bool(turn % 2)) for turn in range(options.repeats)]
    for number, clock in enumerate(("wall", "CPU")):
        seconds = [(one[number], other[number]) for one, other in pairs]
        ratios = sorted(one / other for one, other in seconds)
        print(
            f"{clock:>4}: {statistics.median(ratios):.3f} of the bare loop "
            f"(goal {GOAL}; {ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} pairs, "
            f"bare {statistics.median(other for _, other in seconds):.2f} s)",
            flush=True,
        )


def bare_loop(study: Study) -> Callable[[], Tensor]:
    """Hand-written DDIM with eta 0: everything that does not depend on an image made before."""
    (plan,) = plan_study(study, load_registry())
    network, model, times = plan.model.load(), plan.model, plan.sampler.timesteps
    abar = [model.schedule.abar(t) for t in (*times, -1)]
    steps = [ddim_coefficients(now, then) for now, then in itertools.pairwise(abar)]
    count, size = study.images.count, study.execution.batch_size
    starts = Noise(study.images.seed, range(count), model.shape).initial()
    labels = model.condition(range(count)).inputs["class_labels"]

    @torch.inference_mode()
    def run() -> Tensor:
        made = []
        for x, y in zip(starts.split(size), labels.split(size), strict=True):
            for t, (a, b) in zip(times, steps, strict=True):
                x = a * x + b * network(x, t, class_labels=y, return_dict=False)[0]
            made.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(made)

    return run


def program_loop(study: Study) -> Callable[[], Tensor]:
    """The same through Lightning, weights read and chunks written each time."""
    plans = plan_study(study, load_registry())

    def run() -> Tensor:
        with tempfile.TemporaryDirectory() as place:
            folder = VariantFolder(Path(place))
            jobs = [Job(plan, folder) for plan in plans]
            claims = Claims(Path(place) / "claims")
            progress = Progress("images", visible=False)
            generate(jobs, study.execution, None, claims, progress=progress, share=Share())
            return torch.cat([folder.read_chunk(part).images for part in folder.finished()])

    return run


def assert_alike(one: Tensor, other: Tensor) -> None:
    """Equal but for one pixel in a thousand, and there by one level."""
    difference = (one.int() - other.int()).abs()
    assert difference.max() <= 1, f"images differ by {difference.max()} levels"
    assert (difference > 0).float().mean() <= 0.001


def _contestants(study: Study) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    return program_loop(study), bare_loop(study)


def _pair(
    program: Callable[[], Tensor], bare: Callable[[], Tensor], *, swap: bool
) -> list[tuple[float, float]]:
    """Seconds of wall and CPU of the program and of the bare loop, in either order."""
    order = [bare, program] if swap else [program, bare]
    taken = [_taken(run) for run in order]
    return taken[::-1] if swap else taken


def _taken(run: Callable[[], Tensor]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _profile(program: Callable[[], Tensor]) -> None:
    profile = cProfile.Profile()
    profile.runcall(program)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


def _study(images: int, batch: int, steps: int) -> Study:
    return Study.model_validate(
        {
            "study": "overhead",
            "model": {"name": "fashion-mnist"},
            "sampler": {"name": "ddim", "steps": steps},
            "images": {"seed": 0, "count": images},
            "metrics": [{"name": "is"}],
            "controls": [],
            "variants": [{"name": "full precision"}],
            "execution": {"batch_size": batch, "threads": 1, "accelerator": "cpu"},
        }
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="where the program's time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
