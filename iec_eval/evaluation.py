"""Evaluation: features once per image, every metric from the features, in index order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from iec_eval.cost import EvaluationCost, Uncounted
from iec_eval.errors import CorruptChunk, IecEvalError, MissingArtifact
from iec_eval.fingerprints import fingerprint_over_seeds, identity
from iec_eval.intervals import Estimate, is_spread
from iec_eval.jackknife import with_groups
from iec_eval.jobs import Job, network_id, stored_features
from iec_eval.metrics.base import Metric, PairedMetric, Pairs
from iec_eval.metrics.features import FeatureNetwork
from iec_eval.progress import Progress
from iec_eval.results import Cost, Measurement, Status, Variant
from iec_eval.runs import NOTHING_SPENT, IndexRange, VariantFolder, covering

Reader = Callable[[IndexRange, slice], Any]


@dataclass(frozen=True)
class Scored:
    """A row of the results, and what its intervals and those of its differences are made of.

    ``directions`` says of its numbers whether higher is better, where their metric says so;
    ``apart`` are the numbers that are in no comparison with another row.
    """

    row: Variant
    estimates: Mapping[str, Estimate]
    directions: Mapping[str, bool]
    apart: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Batches:
    """What metrics read of a row, batch by batch with the images' indices; read when iterated."""

    read: Reader
    parts: Sequence[tuple[IndexRange, slice]]

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for part, rows in self.parts:
            yield self.read(part, rows), torch.tensor(part.indices[rows])


@dataclass(frozen=True)
class SpentPerImage:
    """What a variant's images cost, per image: evaluations and seconds of one process."""

    evaluations_full: float
    evaluations_cached: float
    seconds: float


def spent(job: Job) -> SpentPerImage:
    """Average cost of the variant's images, from what their chunks recorded."""
    parts = [part for part, _ in covering(job.finished(), job.count)]
    whole = sum((job.folder.spent(part) for part in parts), NOTHING_SPENT)
    images = sum(len(part) for part in parts)
    return SpentPerImage(
        whole.evaluations_full / images, whole.evaluations_cached / images, whole.seconds / images
    )


def evaluate(
    job: Job, metrics: Sequence[Metric], progress: Progress, base: Job | None = None
) -> list[tuple[Metric, dict[str, Estimate]]]:
    """Every metric and its numbers of one variant, over its images 0..count-1 in order.

    Paired metrics compare with the images of ``base``; they are left out where there is none, and
    for ``base`` itself. Raises MissingArtifact if an image is missing.
    """
    count, parts = job.count, covering(job.finished(), job.count)
    compared = base is not None and base is not job
    chosen = [metric for metric in metrics if compared or not isinstance(metric, PairedMetric)]
    listed = [index for part, rows in parts for index in part.indices[rows]]
    if listed != list(range(count)):
        raise RuntimeError("not every image would be scored exactly once")
    found = {}
    for read, group in _readers(job, chosen, base):
        batches = _Batches(read, parts)
        for batch, indices in batches:
            for metric in group:
                metric.update(batch, indices)
            progress.advance(len(indices))
        found.update({id(metric): _estimated(metric, batches) for metric in group})
    return _told_apart([(metric, found.get(id(metric), {})) for metric in metrics])


def _told_apart(
    found: Sequence[tuple[Metric, dict[str, Estimate]]],
) -> list[tuple[Metric, dict[str, Estimate]]]:
    """The numbers under names of their own: one that is taken is followed by its metric's.

    Paired metrics come last, as they have none in some rows: the others are called alike in all.
    """
    labels = _labels([metric for metric, _ in found])
    taken, named = set[str](), dict[str, dict[str, Estimate]]()
    paired = [isinstance(metric, PairedMetric) for metric, _ in found]
    for place in sorted(range(len(found)), key=paired.__getitem__):
        label, numbers = labels[place], found[place][1]
        named[label] = {f"{n} ({label})" if n in taken else n: x for n, x in numbers.items()}
        taken.update(named[label])
    return [(metric, named[label]) for (metric, _), label in zip(found, labels, strict=True)]


def score(
    job: Job,
    metrics: Sequence[Metric],
    cost: EvaluationCost | Uncounted,
    progress: Progress,
    base: Job | None = None,
) -> Scored:
    """The variant's row of the results; a variant that failed or is incomplete says so.

    ``base`` is the full-precision variant that paired metrics compare with. If it has not all its
    images, the row is scored by the other metrics and says why it lacks these. If it has another
    sampler, what they measure is in no comparison: a row with twice the steps is not the worse for
    being unlike that one.
    """
    row = _empty_row(job)
    failure = job.folder.failure()
    if failure:
        return _unscored(row, "failed", failure)
    try:
        found, lacking = _evaluated(job, metrics, progress, base)
        estimates = {name: one for _, numbers in found for name, one in numbers.items()}
        measured = {name: _measured(one) for name, one in estimates.items()}
        expense = _cost(spent(job), cost)
    except (MissingArtifact, CorruptChunk) as error:
        return _unscored(row, "partial", str(error))
    except IecEvalError:  # disk and feature network: what all rows share
        raise
    except Exception as error:  # one row's failure must not hide the others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return _unscored(row, "failed", reason)
    finally:
        for metric in metrics:
            metric.reset()
    notes = [lacking, f"MACs not counted, {cost.reason}" if isinstance(cost, Uncounted) else None]
    said = "; ".join(filter(None, notes)) or None
    scored = row.model_copy(update={"metrics": measured, "cost": expense, "error": said})
    return Scored(scored, estimates, _directions(found), _apart(job, base, found))


def _apart(
    job: Job, base: Job | None, found: Sequence[tuple[Metric, Mapping[str, Estimate]]]
) -> frozenset[str]:
    """The numbers that no comparison within the study may rest on."""
    if base is None or identity(base.plan.sampler) == identity(job.plan.sampler):
        return frozenset()
    return frozenset(chain(*(one for metric, one in found if isinstance(metric, PairedMetric))))


def _evaluated(
    job: Job, metrics: Sequence[Metric], progress: Progress, base: Job | None
) -> tuple[list[tuple[Metric, dict[str, Estimate]]], str | None]:
    """What :func:`evaluate` gives, and why it is without the metrics that compare with ``base``."""
    if base is None or base is job:
        return evaluate(job, metrics, progress, base), None
    if lacking := _lacking(base, metrics):
        return evaluate(job, metrics, progress), lacking
    try:
        return evaluate(job, metrics, progress, base), None
    except CorruptChunk:
        if not (lacking := _lacking(base, metrics)):
            raise
        for metric in metrics:  # it was an image of the base that turned out to be damaged
            metric.reset()
        return evaluate(job, metrics, progress), lacking


def _unscored(row: Variant, status: Status, why: str) -> Scored:
    return Scored(row.model_copy(update={"status": status, "error": why}), {}, {})


def _directions(found: Sequence[tuple[Metric, Mapping[str, Estimate]]]) -> dict[str, bool]:
    """By number, as its metric says; a spread has no better direction."""
    return {
        name: bool(metric.higher_is_better)
        for metric, numbers in found
        for name in numbers
        if metric.higher_is_better is not None and not is_spread(name)
    }


def over_seeds(of_seeds: Mapping[str, Scored]) -> Scored:
    """One row of the results from the same row scored for each seed, by the name of its job.

    Numbers and costs are means over seeds. The row is finished if it is for every seed; else it
    says for which it is not, and has no numbers.
    """
    rows = {name: scored.row for name, scored in of_seeds.items()}
    first = next(iter(rows.values()))
    fingerprint = fingerprint_over_seeds(row.fingerprint for row in rows.values())
    errors = [f"{name}: {row.error}" for name, row in rows.items() if row.error]
    found = {"fingerprint": fingerprint, "error": "; ".join(errors) or None}
    states = {row.status for row in rows.values()}
    if states != {"done"}:
        status = "failed" if "failed" in states else "partial"
        bare = {"metrics": {}, "cost": Cost(), "status": status}
        return Scored(first.model_copy(update=found | bare), {}, {})
    numbers = [scored.estimates for scored in of_seeds.values()]
    estimates = {
        name: Estimate.mean([of_seed[name] for of_seed in numbers])
        for name in numbers[0]
        if all(name in of_seed for of_seed in numbers)
    }
    measured = {name: _measured(one) for name, one in estimates.items()}
    cost = _mean_cost([row.cost for row in rows.values()])
    row = first.model_copy(update=found | {"metrics": measured, "cost": cost})
    one = next(iter(of_seeds.values()))
    return Scored(row, estimates, one.directions, one.apart)


def _mean_cost(of_seeds: Sequence[Cost]) -> Cost:
    """Relative costs are not known yet."""
    first, found = of_seeds[0], {}
    for name, value in first:
        values = [getattr(cost, name) for cost in of_seeds]
        if isinstance(value, float):
            found[name] = math.fsum(values) / len(values)
    return first.model_copy(update=found)


def groups(metrics: Sequence[Metric]) -> int:
    """How many times evaluation goes over the images of a row, at most."""
    # not by "in": comparing two torchmetrics makes a third, which is always true
    alone = [metric for metric in metrics if not isinstance(metric, PairedMetric)]
    return len(by_network(alone)) + (len(alone) < len(metrics))


def networks(metrics: Sequence[Metric]) -> list[FeatureNetwork]:
    """The feature networks that metrics read, each once."""
    return [network for network, _ in by_network(metrics) if network is not None]


def by_network(metrics: Sequence[Metric]) -> list[tuple[FeatureNetwork | None, list[Metric]]]:
    """Metrics grouped by the feature network they share; None for those that read images."""
    groups: dict[str, tuple[FeatureNetwork | None, list[Metric]]] = {}
    for metric in metrics:
        network = metric.network
        key = network_id(network) if network is not None else ""
        groups.setdefault(key, (network, []))[1].append(metric)
    return list(groups.values())


def protocol(metrics: Sequence[Metric]) -> dict[str, Any]:
    """How the metrics measure: what must agree for two results to be comparable."""
    return {
        label: metric.protocol() for label, metric in zip(_labels(metrics), metrics, strict=True)
    }


def _labels(metrics: Sequence[Metric]) -> list[str]:
    """The metrics' names, and their number among those of one name but for the first."""
    before = Counter[str]()
    labels = []
    for metric in metrics:
        before[metric.name] += 1
        number = before[metric.name]
        labels.append(metric.name if number == 1 else f"{metric.name} {number}")
    return labels


def _readers(
    job: Job, metrics: Sequence[Metric], base: Job | None
) -> Iterator[tuple[Reader, list[Metric]]]:
    """Groups of metrics that read the same, and how to read it from a file's rows."""
    paired = [metric for metric in metrics if isinstance(metric, PairedMetric)]
    for network, group in by_network([m for m in metrics if not isinstance(m, PairedMetric)]):
        yield partial(_batch, job.folder, network=network), group
    if paired and base is not None:
        yield partial(_pairs, job.folder, base.folder), list(paired)


def _pairs(folder: VariantFolder, base: VariantFolder, part: IndexRange, rows: slice) -> Pairs:
    """The images of a part, with those of the same indices in ``base``, however it is cut up."""
    indices, reference = part.indices[rows], []
    for other, found in covering(base.finished(), indices.stop):
        first = max(found.start, indices.start - other.start)
        if first < found.stop:
            reference.append(base.read_chunk(other).images[first : found.stop])
    return Pairs(folder.read_chunk(part).images[rows], torch.cat(reference))


def _lacking(base: Job, metrics: Sequence[Metric]) -> str | None:
    """Why paired metrics cannot compare with ``base``, None if they can or there are none."""
    paired = ", ".join(metric.name for metric in metrics if isinstance(metric, PairedMetric))
    if not paired:
        return None
    name, failure = base.name, base.folder.failure()
    if failure:
        return f"{paired}: the row compared with, {name!r}, failed ({failure})"
    try:
        covering(base.folder.finished(), base.count)
    except MissingArtifact as error:
        return f"{paired}: the row compared with, {name!r}, is incomplete ({error})"
    return None


def _batch(
    folder: VariantFolder, part: IndexRange, rows: slice, network: FeatureNetwork | None
) -> Any:
    """What a metric reads: features, or the images themselves."""
    if network is None:
        return folder.read_chunk(part).images[rows]
    return stored_features(folder, part, network)[rows]


def _estimated(metric: Metric, again: Iterable[tuple[Any, torch.Tensor]]) -> dict[str, Estimate]:
    """The metric's numbers and what their intervals are made of; it is empty again afterwards."""
    estimates = metric.estimates(again)
    for name, one in estimates.items():
        if not math.isfinite(one.value):
            raise ValueError(f"metric {metric.name!r} gave {name} = {one.value}")
    estimates = with_groups(metric, estimates, again)
    metric.reset()
    return estimates


def _measured(estimate: Estimate) -> Measurement:
    return Measurement(
        value=estimate.value,
        ci95=estimate.interval(),
        by_seed=list(estimate.by_seed),
        spread=estimate.spread(),
    )


def _empty_row(job: Job) -> Variant:
    row = job.plan.experiment
    return Variant(
        name=row.name,
        fingerprint=job.plan.fingerprint,
        control=row.control,
        judge_of=row.judge_of,
        lacks=row.lacks,
        simulated=job.plan.simulated,
        efficiency=row.efficiency,
        callbacks=row.callbacks,
    )


def _cost(spent: SpentPerImage, cost: EvaluationCost | Uncounted) -> Cost:
    return Cost(
        evaluations_full=spent.evaluations_full,
        evaluations_cached=spent.evaluations_cached,
        macs_per_image=cost.macs(spent.evaluations_full, spent.evaluations_cached),
        bit_operations_per_image=cost.bit_operations(
            spent.evaluations_full, spent.evaluations_cached
        ),
        seconds_per_image=spent.seconds,
        weight_bytes=cost.weight_bytes,
    )
