"""Evaluation: features once per image, every metric from the features, in index order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from iec_eval.errors import CorruptFile, MissingArtifact
from iec_eval.generation import Job
from iec_eval.metrics.base import Metric
from iec_eval.metrics.features import FeatureNetwork, Features
from iec_eval.progress import Progress
from iec_eval.storage import IndexRange, VariantFolder, read_tensors, write_tensors
from iec_eval.study import digest


@dataclass(frozen=True)
class Spent:
    """What a variant's images cost, per image: evaluations and seconds of one process."""

    evaluations_full: float
    evaluations_cached: float
    seconds: float


def covering(ranges: Sequence[IndexRange], count: int) -> list[tuple[IndexRange, slice]]:
    """Which rows of which files make up images 0..count-1, each exactly once.

    Raises MissingArtifact if an image is in no file.
    """
    chosen, position = [], 0
    for part in sorted(ranges):
        if part.stop <= position:
            continue
        if part.start > position or position >= count:
            break
        stop = min(part.stop, count)
        chosen.append((part, slice(position - part.start, stop - part.start)))
        position = stop
    if position < count:
        raise MissingArtifact(
            f"image {position} of {count} is missing; run iec-eval launch or generate again"
        )
    return chosen


def spent(job: Job) -> Spent:
    """Average cost of the variant's images, from what their chunks recorded."""
    count = job.plan.experiment.images.count
    chunks = [job.folder.read_chunk(part) for part, _ in covering(job.folder.finished(), count)]
    images = sum(len(chunk.range) for chunk in chunks)
    return Spent(
        sum(chunk.evaluations_full for chunk in chunks) / images,
        sum(chunk.evaluations_cached for chunk in chunks) / images,
        sum(chunk.seconds for chunk in chunks) / images,
    )


def evaluate(job: Job, metrics: Sequence[Metric], progress: Progress) -> dict[str, float]:
    """Every metric of one variant, over its images 0..count-1 in order.

    Raises MissingArtifact if an image is missing.
    """
    count = job.plan.experiment.images.count
    parts = covering(job.folder.finished(), count)
    for metric in metrics:
        metric.reset()
    for network, group in _by_network(metrics):
        seen = torch.zeros(count, dtype=torch.long)
        for part, rows in parts:
            features = stored_features(job.folder, part, network)
            indices = torch.tensor(part.indices[rows])
            seen[indices] += 1
            chosen = Features(features.features[rows], features.logits[rows])
            for metric in group:
                metric.update(chosen, indices)
            progress.advance(len(indices))
        assert bool((seen == 1).all()), "every image must be scored exactly once"
    values: dict[str, float] = {}
    for metric in metrics:
        values.update(metric.compute())
    return values


def stored_features(folder: VariantFolder, part: IndexRange, network: FeatureNetwork) -> Features:
    """Features of a chunk's images: read if they are on disk, else computed and kept."""
    path = folder.features(network_id(network)) / f"{part.stem}.safetensors"
    if path.is_file():
        try:
            tensors, _ = read_tensors(path)
            return Features(tensors["features"], tensors["logits"])
        except (CorruptFile, KeyError):
            path.unlink()
    features = network.extract(folder.read_chunk(part).images)
    write_tensors(path, {"features": features.features, "logits": features.logits})
    return features


def network_id(network: FeatureNetwork) -> str:
    """A folder name for a feature network; other weights or another protocol give another."""
    return f"{network.tag or 'inception'}-{digest(network.identity())[:8]}"


def protocol(metrics: Sequence[Metric]) -> dict[str, Any]:
    """How the metrics measure: what must agree for two results to be comparable."""
    return {metric.name: metric.protocol() for metric in metrics}


def _by_network(metrics: Sequence[Metric]) -> Iterator[tuple[FeatureNetwork, list[Metric]]]:
    """Metrics grouped by the feature network they share."""
    groups: dict[str, tuple[FeatureNetwork, list[Metric]]] = {}
    for metric in metrics:
        network = metric.network
        groups.setdefault(network_id(network), (network, []))[1].append(metric)
    for network, group in groups.values():
        network.load()
        yield network, group
