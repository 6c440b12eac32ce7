"""What a study's scale depends on, found in its plan and in what its run folder has measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iec_eval.assembly import artifact_keys
from iec_eval.cost import stored_bytes
from iec_eval.errors import ConfigError, CorruptFile, UnknownName
from iec_eval.jobs import Job, network_id
from iec_eval.metrics.base import Metric, PairedMetric
from iec_eval.metrics.extrapolation import needed
from iec_eval.metrics.features import FeatureNetwork
from iec_eval.runs import IndexRange, VariantFolder, finished_ranges
from iec_eval.scaling import (
    Assumptions,
    NetworkWork,
    RowWork,
    Scaling,
    ScoringWork,
    Workload,
    positive,
    process_counts,
)
from iec_eval.storage import read_about
from iec_eval.study import Study, full_precision

SAMPLED = 64  # finished files that a measurement is taken from, evenly spread

# How long scoring one row takes, on one thread of the machine that Assumptions were measured on.
EIGENVALUES = 18  # operations for each D^3: of a matrix, or its eigenvectors and what they make
LOGIT_OPERATIONS = 900  # for each logit: Inception Score's shuffle, softmax and logarithms
VALUE_OPERATIONS = {"psnr": 290, "ssim": 61_000}  # for each value of an image of a pair
# Bytes that are held for each image until a row is scored, and while it is
LIST, SCORE = 4, 8  # a float32, a float64


@dataclass(frozen=True)
class ScaleQuestion:
    """What ``show --scale`` asks: numbers of processes, and what the user knows of speeds.

    All are as on the command line: ``1,8,64``, ``[ROW=]SECONDS`` and ``NAME=VALUE``.
    """

    processes: str
    seconds_per_image: Sequence[str] = ()
    assume: Sequence[str] = ()

    def answered(
        self,
        jobs: Sequence[Job],
        macs: Sequence[float | None],
        study: Study,
        metrics: Sequence[Metric],
        tflops: float,
    ) -> Scaling:
        """The estimates; see :func:`workload`.

        Raises ConfigError or UnknownName for anything that cannot be read.
        """
        counts, assumed = process_counts(self.processes), Assumptions.replaced(self.assume)
        speeds = row_speeds(jobs, macs, given_seconds(jobs, self.seconds_per_image), tflops)
        counted = [(one.seconds, work) for one, work in zip(speeds, macs, strict=True) if work]
        all_macs = sum(work for _, work in counted)
        each = sum(one for one, _ in counted) / all_macs if counted else 2 / (tflops * 1e12)
        return Scaling.of(workload(jobs, study, metrics, speeds, each, assumed), assumed, counts)


@dataclass(frozen=True)
class Speed:
    """Seconds of one process for one image, and where the number is from."""

    seconds: float
    basis: str


def workload(
    jobs: Sequence[Job],
    study: Study,
    metrics: Sequence[Metric],
    speeds: Sequence[Speed],
    seconds_per_mac: float,
    assumed: Assumptions,
) -> Workload:
    """The workload of a study whose images are still to be made.

    Args:
        speeds: of the rows, as :func:`row_speeds` finds them.
        seconds_per_mac: at which feature networks are counted that no run has measured.
    """
    model, size = jobs[0].plan.model, study.execution
    values = math.prod(model.image_shape)
    networks = _networks(metrics).items()
    return Workload(
        images=study.images.count,
        chunk_size=size.chunk_size,
        batch_size=size.batch_size,
        image_bytes=values,
        weight_bytes=stored_bytes(model.skeleton()),
        rows=tuple(
            RowWork(job.name, speed.seconds, speed.basis)
            for job, speed in zip(jobs, speeds, strict=True)
        ),
        networks=tuple(_network(name, one, jobs, seconds_per_mac) for name, one in networks),
        metrics=tuple(_scoring(one, study.images.count, values, assumed) for one in metrics),
        image_reads=_image_reads(metrics),
        feature_reads=_feature_reads(metrics, study.images.count),
        artifacts=len(_artifacts(jobs)),
        keep_images=size.keep_images,
    )


def row_speeds(
    jobs: Sequence[Job], macs: Sequence[float | None], given: Mapping[str, float], tflops: float
) -> list[Speed]:
    """How long each row takes for an image: measured, given, or by its multiply-accumulates.

    Work, ``macs`` for an image of each row, is counted at the speed of the rows that are measured,
    else of those that are given, else at ``tflops`` 10^12 operations a second, two for each.

    Raises UnknownName if ``given`` names no row, ConfigError for a row of which nothing is known.
    """
    names = [job.plan.experiment.name for job in jobs]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise UnknownName("row in --seconds-per-image:", unknown[0], list(dict.fromkeys(names)))
    measured = [_measured_row(job.folder) for job in jobs]
    told = [Speed(given[name], "given") if name in given else None for name in names]
    known = measured if any(measured) else told
    sure = [one or two for one, two in zip(measured, told, strict=True)]
    for name, one, work in zip(names, sure, macs, strict=True):
        if one is None and work is None:
            raise ConfigError(
                f"{name}: its MACs cannot be counted; wanted --seconds-per-image '{name}=SECONDS'"
            )
    return [
        one if one is not None else _by_work(work or 0.0, known, macs, tflops)
        for one, work in zip(sure, macs, strict=True)
    ]


def given_seconds(jobs: Sequence[Job], texts: Iterable[str]) -> dict[str, float]:
    """Seconds per image by row, from ``SECONDS`` (the full-precision row's) or ``ROW=SECONDS``.

    Without a full-precision row the plain number is the first row's. Raises ConfigError for
    anything but positive numbers.
    """
    experiments = [job.plan.experiment for job in jobs]
    first = full_precision(experiments) or experiments[0]
    found = {}
    for text in texts:
        name, _, seconds = text.rpartition("=")
        complaint = f"--seconds-per-image {text!r}: wanted SECONDS or ROW=SECONDS, SECONDS positive"
        found[name or first.name] = positive(seconds, complaint)
    return found


def _by_work(
    macs: float, known: Sequence[Speed | None], all_macs: Sequence[float | None], tflops: float
) -> Speed:
    pairs = [(one, work) for one, work in zip(known, all_macs, strict=True) if one and work]
    if not pairs:
        return Speed(2 * macs / (tflops * 1e12), f"its MACs at {tflops:g} TFLOP/s")
    each = sum(one.seconds for one, _ in pairs) / sum(work for _, work in pairs)
    kind = pairs[0][0].basis.split(" ")[0]
    return Speed(each * macs, f"its MACs at the speed of {_rows(len(pairs), f'{kind} ')}")


def _measured_row(folder: VariantFolder) -> Speed | None:
    """Seconds per image that a row's finished chunks recorded, None if there are none."""
    return _measured(folder.ever_finished(), lambda part: folder.recorded_spent(part).seconds)


def _measured(
    finished: Iterable[IndexRange], seconds: Callable[[IndexRange], float]
) -> Speed | None:
    """Seconds per image that some of the finished files recorded, None if none did.

    Damaged ones, which only a run sets aside, are left out.
    """
    parts = sorted(finished)
    timed: dict[IndexRange, float] = {}
    for part in {parts[i * len(parts) // SAMPLED] for i in range(SAMPLED if parts else 0)}:
        with suppress(CorruptFile):
            timed[part] = seconds(part)
    if not timed:
        return None
    images = sum(len(part) for part in timed)
    return Speed(sum(timed.values()) / images, f"measured in {images} finished images")


def _measured_features(folder: Path) -> Speed | None:
    """Seconds per image that a row's files of features recorded, None if there are none."""
    return _measured(finished_ranges(folder), lambda part: _feature_seconds(folder, part))


def _feature_seconds(folder: Path, part: IndexRange) -> float:
    path = folder / f"{part.stem}.safetensors"
    try:
        return float(read_about(path)["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path}: does not say what it took ({error})") from error


def _networks(metrics: Sequence[Metric]) -> dict[str, FeatureNetwork]:
    """The feature networks by their folder's name; one without its files by its tag."""
    found: dict[str, FeatureNetwork] = {}
    for metric in metrics:
        network = metric.network
        if network is None:
            continue
        try:
            name = network_id(network)
        except ConfigError:
            name = network.tag or "inception"
        found.setdefault(name, network)
    return found


def _network(
    name: str, network: FeatureNetwork, jobs: Sequence[Job], seconds_per_mac: float
) -> NetworkWork:
    try:
        values = network.dimensions + network.classes
    except ConfigError as error:
        return NetworkWork(name, 0, None, f"not in the estimate: {error}")
    measured = [_measured_features(job.folder.features(name)) for job in jobs]
    known = [one for one in measured if one is not None]
    if known:
        seconds = sum(one.seconds for one in known) / len(known)
        return NetworkWork(name, values, seconds, f"measured in {_rows(len(known))}")
    if network.macs is None:
        return NetworkWork(name, values, None, "not in the estimate until a run has measured it")
    return NetworkWork(name, values, network.macs * seconds_per_mac, "its MACs at the rows' speed")


def _rows(count: int, kind: str = "") -> str:
    return f"{count} {kind}row{'' if count == 1 else 's'}"


def _scoring(metric: Metric, count: int, values: int, assumed: Assumptions) -> ScoringWork:
    operations = _operations(metric, count, values)
    seconds = None if operations is None else operations / assumed.scoring
    return ScoringWork(metric.name, seconds, _memory(metric, count))


def _operations(metric: Metric, count: int, values: int) -> float | None:
    """Operations to score a row, None for a metric that nobody has counted."""
    if metric.name in VALUE_OPERATIONS:
        return float(VALUE_OPERATIONS[metric.name] * values * count)
    size, classes = _dimensions(metric)
    options: Any = metric.options
    if metric.name == "fid":  # its sums, influence values, and both for two cuts
        products, decompositions = (12.0, 8) if _extrapolates(metric, count) else (4.0, 3)
        return products * count * size**2 + decompositions * EIGENVALUES * size**3
    if metric.name == "is":
        return float(LOGIT_OPERATIONS * count * classes)
    if metric.name == "kid":
        return float(6 * options.subsets * options.subset_size**2 * size)
    if metric.name == "precision-recall":
        return float(6 * options.samples**2 * size)
    return None


def _memory(metric: Metric, count: int) -> int:
    """Bytes that a metric holds while it computes, as its lists and their copies need."""
    size, classes = _dimensions(metric)
    if metric.name == "fid":
        return (26 if _extrapolates(metric, count) else 18) * SCORE * size**2
    if metric.name == "is":
        return count * classes * (3 * LIST + SCORE)
    if metric.name in ("kid", "precision-recall"):
        return count * size * 3 * LIST
    return count * 2 * SCORE  # a number and an index


def _extrapolates(metric: Metric, count: int) -> bool:
    """Whether ``fid`` has a number for infinitely many images too."""
    options: Any = metric.options
    return bool(options.extrapolate) and count >= needed(_dimensions(metric)[0])


def _feature_reads(metrics: Sequence[Metric], count: int) -> int:
    """How often a row's features are read: FID goes over them again for influence values."""
    distances = [metric for metric in metrics if metric.name == "fid"]
    return max((7 if _extrapolates(one, count) else 3 for one in distances), default=1)


def _dimensions(metric: Metric) -> tuple[int, int]:
    """D and K of the metric's features; zeros where it has none or their files are not there."""
    try:
        return (metric.network.dimensions, metric.network.classes) if metric.network else (0, 0)
    except ConfigError:
        return 0, 0


def _image_reads(metrics: Sequence[Metric]) -> int:
    """Paired metrics read a row's images and those of the full-precision row, others once."""
    paired = any(isinstance(metric, PairedMetric) for metric in metrics)
    plain = any(
        metric.network is None and not isinstance(metric, PairedMetric) for metric in metrics
    )
    return 2 * paired + plain


def _artifacts(jobs: Sequence[Job]) -> set[str]:
    return {key for job in jobs for _, key in artifact_keys(job.plan)}
