"""How a study scales, in words: a line for each number of processes, and what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from iec_eval.report.wording import quantity, significant
from iec_eval.scaling import (
    Assumptions,
    Estimate,
    Scaling,
    Workload,
    scoring_bytes,
    scoring_memory,
    scoring_seconds,
    storage,
)


def scaling_as_text(found: Scaling) -> str:
    """The estimates, then files and bytes, the merge, and the basis of every number."""
    work, assumed = found.work, found.assumed
    lines = [
        "At scale, from nothing but what is calibrated:",
        *map(_estimate, found.estimates),
        *_limits(work, found.estimates),
        *_storage(work),
        *_merge(work, assumed),
        *_basis(work),
        _assumptions(assumed),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds below a minute, then minutes below an hour and a half, then hours."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    if seconds < 5400:
        return f"{significant(seconds / 60)} min"
    return f"{significant(seconds / 3600)} h"


def _estimate(one: Estimate) -> str:
    return (
        f"- {_processes(one.processes)}: {duration(one.wall)} (start {duration(one.start)}, "
        f"generation {duration(one.generation)}, features {duration(one.features)}, "
        f"scoring {duration(one.scoring)}), {100 * one.busy:.0f} % of it at work; up to "
        f"{one.files_running:,} files and {quantity(one.bytes_running, 'B')} while it runs, "
        f"{one.file_operations:,} file operations, "
        f"{quantity(one.start_bytes, 'B')} of weights read by all"
    )


def _limits(work: Workload, estimates: Sequence[Estimate]) -> Iterator[str]:
    """Where more processes have nothing to do, and what would give them something."""
    yield (
        f"Chunks: {len(work.rows)} rows of {len(work.chunks)}; at most "
        f"{_processes(work.most_processes)} have work"
    )
    for processes in sorted({one.processes for one in estimates}):
        if processes <= work.most_processes:
            continue
        size = work.chunk_size_for(processes)
        if size is None:
            images = len(work.rows) * work.images
            yield f"- {_processes(processes)}: more than the {images:,} images there are to make"
        else:
            yield f"- {_processes(processes)}: execution.chunk_size={size} gives all of them work"


def _storage(work: Workload) -> Iterator[str]:
    kept = storage(work)
    yield (
        f"Disk: {kept.files:,} files and {quantity(kept.bytes, 'B')} at the end; 1,000 images take "
        f"{quantity(kept.bytes_per_1000, 'B')} (images {quantity(kept.image_bytes, 'B')} in all, "
        f"features {quantity(kept.feature_bytes, 'B')})"
    )


def _merge(work: Workload, assumed: Assumptions) -> Iterator[str]:
    yield (
        f"Scoring, by one process: each row {duration(scoring_seconds(work, assumed))}, reads "
        f"{quantity(scoring_bytes(work), 'B')} and holds {quantity(scoring_memory(work), 'B')}"
    )
    for metric in work.metrics:
        took = "not in the estimate" if metric.seconds is None else duration(metric.seconds)
        yield f"- {metric.name}: {took}, holds {quantity(metric.memory, 'B')}"


def _basis(work: Workload) -> Iterator[str]:
    yield "Seconds of one process for an image:"
    for row in work.rows:
        yield f"- {row.name}: {significant(row.seconds)} ({row.basis})"
    for network in work.networks:
        seconds = "unknown" if network.seconds is None else significant(network.seconds)
        yield f"- features {network.name}: {seconds} ({network.basis})"


def _assumptions(assumed: Assumptions) -> str:
    values = ", ".join(f"{name}={value:g}" for name, value in vars(assumed).items())
    return f"Assumed, --assume NAME=VALUE replaces: {values}"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count:,} processes"
