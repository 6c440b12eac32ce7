"""What a study takes on any number of processes: time, files, bytes and the merge at the end.

Plain arithmetic on counts and measured seconds; :mod:`iec_eval.workload` finds these. Chunks are
handed out as generation hands them out: from one pool, in order, to whoever is free first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from iec_eval.errors import ConfigError, UnknownName

CHUNKS_EACH = 4  # that many chunks a process leave few of them idle at the end
INDEX_BYTES = 8  # a chunk keeps the index of each image
SHOWN_IMAGES = 10  # of each row stay for the gallery, whatever is deleted
# what a safetensors file holds besides numbers: names, shapes, checksum, what the chunk cost
CHUNK_HEADER_BYTES, FEATURE_HEADER_BYTES = 328, 280
RECORD_BYTES = 170  # of what a deleted chunk cost
# study.yaml rows.json results.json influence.safetensors manifest.json table.md report.html and
# two galleries as PNG
RUN_FILES = 9
FILES_PER_ARTIFACT = 2
MOST_PROCESSES = 1_000_000  # that are estimated, each on its own


def _assumed(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """Speeds that a run folder does not tell; ``show --assume NAME=VALUE`` replaces them.

    The defaults are of one thread of a machine with two cores and a local disk; what they are
    elsewhere, ``python tests/benchmark_scaling.py --constants`` prints.
    """

    start: float = _assumed(8.5, "seconds of a process before its first row: imports, Lightning")
    row: float = _assumed(0.03, "seconds of a process for each row, besides reading the weights")
    read: float = _assumed(9e8, "bytes read and checked a second by one process")
    write: float = _assumed(1.7e9, "bytes written a second by one process")
    file: float = _assumed(1.5e-4, "seconds to create, replace or remove one file")
    scoring: float = _assumed(5e10, "float64 operations a second of the process that scores")

    @classmethod
    def replaced(cls, given: Iterable[str]) -> Assumptions:
        """The defaults but for ``given``, each ``NAME=VALUE``.

        Raises UnknownName for another name, ConfigError unless the value is a positive number.
        """
        names = [one.name for one in fields(cls)]
        values = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in names:
                raise UnknownName("assumption", name, names)
            values[name] = positive(value, f"--assume {text!r}: wanted NAME=VALUE, VALUE positive")
        return replace(cls(), **values)


@dataclass(frozen=True)
class RowWork:
    """A row: seconds of one process for one image, and where this number is from."""

    name: str
    seconds: float
    basis: str


@dataclass(frozen=True)
class NetworkWork:
    """A feature network: its numbers for one image, seconds for one, bytes of its weights.

    ``seconds`` is None where nobody knows; it is not in the estimate then.
    """

    name: str
    values: int
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class ScoringWork:
    """A metric on one row, by the one process that scores.

    ``seconds`` is None where nobody knows; it is not in the estimate then. ``memory`` is what it
    holds at once, in bytes.
    """

    name: str
    seconds: float | None
    memory: int


@dataclass(frozen=True)
class Workload:
    """A study as far as its scale depends on it.

    Attributes:
        images: images of each row.
        chunk_size: images in one file.
        batch_size: images denoised together.
        image_bytes: of one uint8 image.
        weight_bytes: of the model's network, which each process hashes once and reads for each row.
        rows: the rows, in order.
        networks: the feature networks that metrics share.
        metrics: what scoring one row takes.
        feature_reads: how many times scoring reads the features of a row.
        image_reads: the same of its images.
        artifacts: calibrated artifacts of all rows.
        keep_images: whether images stay once their features are there.
    """

    images: int
    chunk_size: int
    batch_size: int
    image_bytes: int
    weight_bytes: int
    rows: tuple[RowWork, ...]
    networks: tuple[NetworkWork, ...] = ()
    metrics: tuple[ScoringWork, ...] = ()
    feature_reads: int = 1
    image_reads: int = 0
    artifacts: int = 0
    keep_images: bool = True

    @cached_property
    def chunks(self) -> list[int]:
        """Images of each chunk of one row: all full but the last."""
        whole, rest = divmod(self.images, self.chunk_size)
        return [self.chunk_size] * whole + [rest] * bool(rest)

    @property
    def most_processes(self) -> int:
        """How many processes can have work at once: one for each chunk of each row."""
        return len(self.rows) * len(self.chunks)

    def chunk_size_for(self, processes: int) -> int | None:
        """The largest chunk size that gives each process several chunks; None if there is none.

        Where there are too few images for several, one chunk each has to do.
        """
        for each in range(CHUNKS_EACH, 0, -1):
            wanted = math.ceil(processes * each / len(self.rows))
            if wanted <= self.images:
                return next(
                    size
                    for size in range(self.images // wanted + 1, 0, -1)
                    if math.ceil(self.images / size) >= wanted
                )
        return None


@dataclass(frozen=True)
class Storage:
    """Files and bytes of a whole study.

    ``image_bytes`` and ``feature_bytes`` are of all chunks; ``files`` and ``bytes`` what is left
    at the end.
    """

    image_bytes: int
    feature_bytes: int
    files: int
    bytes: int
    bytes_per_1000: int


@dataclass(frozen=True)
class Estimate:
    """A study on ``processes`` processes, in seconds of wall time; see :func:`estimate`."""

    processes: int
    working: int
    start: float
    generation: float
    features: float
    scoring: float
    busy: float
    files_running: int
    bytes_running: int
    file_operations: int
    start_bytes: int

    @property
    def wall(self) -> float:
        """Seconds from the start of all processes to the table."""
        return self.start + self.generation + self.features + self.scoring


def estimate(work: Workload, processes: int, assumed: Assumptions) -> Estimate:
    """The whole study, from nothing but what is calibrated, on so many processes.

    One after the other: all start (``start``); chunks are made, each process reading the weights
    of each row it takes part in (``generation``), and each chunk's features extracted by whoever
    made it (``features``: how much later this ends for them); one process scores (``scoring``).
    ``busy`` is the share of all processes' time in which they make images or features;
    ``files_running`` and ``bytes_running`` are what there is at most; ``start_bytes`` what all
    processes read of the weights.
    """
    start = assumed.start + work.weight_bytes / assumed.read
    set_up = assumed.row + work.weight_bytes / assumed.read
    images = [(set_up, _image_items(work, row, assumed)) for row in work.rows]
    seen = _feature_items(work, assumed)
    both = [(first, [a + b for a, b in zip(made, seen, strict=True)]) for first, made in images]
    generation, together = makespan(images, processes), makespan(both, processes)
    scoring = len(work.rows) * scoring_seconds(work, assumed)
    useful = work.images * sum(row.seconds + _feature_seconds(work) for row in work.rows)
    working = min(processes, work.most_processes)
    return Estimate(
        processes=processes,
        working=working,
        start=start,
        generation=generation,
        features=together - generation,
        scoring=scoring,
        busy=useful / (processes * (start + together + scoring)),
        files_running=_files(work) + working * _files_in_work(work),
        bytes_running=storage(work).bytes + working * _chunk_bytes(work, work.chunks[0], 1),
        file_operations=len(work.rows) * sum(_operations(work, n) for n in work.chunks),
        start_bytes=processes * work.weight_bytes + _row_starts(work, working) * work.weight_bytes,
    )


def makespan(rows: Sequence[tuple[float, Sequence[float]]], processes: int) -> float:
    """When the last of ``processes`` is done with the items of all rows, in seconds.

    A row is the seconds to set it up, which each process spends before its first item of it, and
    the seconds of its items. Items are taken in order, each by the process that is free first.
    """
    free = [(0.0, -1) for _ in range(processes)]  # when, and the row it was at
    for number, (set_up, items) in enumerate(rows):
        for seconds in items:
            when, at = free[0]
            ready = when if at == number else when + set_up
            heapq.heapreplace(free, (ready + seconds, number))
    return max(when for when, _ in free)


def storage(work: Workload) -> Storage:
    """Files and bytes at the end, whatever the number of processes."""
    rows, chunks = len(work.rows), len(work.chunks)
    images = rows * _chunk_bytes(work, work.images, chunks)
    features = rows * sum(
        work.images * 4 * network.values + chunks * FEATURE_HEADER_BYTES
        for network in work.networks
    )
    kept = features + (images if work.keep_images else rows * _remains(work))
    return Storage(
        image_bytes=images,
        feature_bytes=features,
        files=_files(work),
        bytes=kept,
        bytes_per_1000=round(1000 * kept / (rows * work.images)),
    )


def scoring_bytes(work: Workload) -> int:
    """What the one process that scores reads of one row: features, and images if metrics do."""
    numbers = 4 * sum(network.values for network in work.networks)
    images = work.image_reads * (work.image_bytes + INDEX_BYTES)
    return work.images * (work.feature_reads * numbers + images)


def scoring_seconds(work: Workload, assumed: Assumptions) -> float:
    """Seconds to score one row: reading it, then every metric whose time is known."""
    known = sum(metric.seconds or 0.0 for metric in work.metrics)
    opened = len(work.chunks) * (1 + work.feature_reads * len(work.networks) + work.image_reads)
    return known + scoring_bytes(work) / assumed.read + opened * assumed.file


def scoring_memory(work: Workload) -> int:
    """Bytes that the metrics of one row hold at once, at most."""
    return sum(metric.memory for metric in work.metrics)


@dataclass(frozen=True)
class Scaling:
    """A workload, what its estimates assume, and an estimate for each number of processes."""

    work: Workload
    assumed: Assumptions
    estimates: Sequence[Estimate]

    @classmethod
    def of(cls, work: Workload, assumed: Assumptions, processes: Iterable[int]) -> Scaling:
        """The estimates for these numbers of processes."""
        return cls(work, assumed, [estimate(work, count, assumed) for count in processes])

    def as_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        work = self.work
        return {
            "most_processes": work.most_processes,
            "chunks_per_row": len(work.chunks),
            "rows": [asdict(row) for row in work.rows],
            "networks": [asdict(network) for network in work.networks],
            "metrics": [asdict(metric) for metric in work.metrics],
            "storage": asdict(storage(work)),
            "scoring": {
                "bytes_per_row": scoring_bytes(work),
                "seconds_per_row": scoring_seconds(work, self.assumed),
                "memory": scoring_memory(work),
            },
            "assumed": asdict(self.assumed),
            "processes": [{**asdict(one), "wall": one.wall} for one in self.estimates],
        }


def process_counts(text: str) -> list[int]:
    """The numbers in ``1,8,64``.

    Raises ConfigError unless all are whole, positive and at most MOST_PROCESSES.
    """
    words = [word.strip().lstrip("0") for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise ConfigError(
            f"--scale {text!r}: wanted numbers of processes from 1 up, such as 1,8,64,512"
        )
    if any(len(word) > len(str(MOST_PROCESSES)) or int(word) > MOST_PROCESSES for word in words):
        raise ConfigError(f"--scale {text!r}: wanted at most {MOST_PROCESSES:,} processes")
    return [int(word) for word in words]


def positive(text: str, complaint: str) -> float:
    """The positive number in ``text``; raises ConfigError with ``complaint`` if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(complaint)
    return value


def _image_items(work: Workload, row: RowWork, assumed: Assumptions) -> list[float]:
    """Seconds of each chunk of a row: its images, its file, its claim."""
    costs: dict[int, float] = {}
    for n in set(work.chunks):
        written = n * (work.image_bytes + INDEX_BYTES) / assumed.write
        costs[n] = n * row.seconds + written + _image_operations(work, n) * assumed.file
    return [costs[n] for n in work.chunks]


def _feature_items(work: Workload, assumed: Assumptions) -> list[float]:
    """Seconds of the features of each chunk of a row, by all networks."""
    each = sum(
        (network.seconds or 0.0)
        + (work.image_bytes + INDEX_BYTES) / assumed.read
        + 4 * network.values / assumed.write
        for network in work.networks
    )
    files = FEATURE_OPERATIONS * len(work.networks) * assumed.file
    return [n * each + files for n in work.chunks]


def _chunk_bytes(work: Workload, images: int, chunks: int) -> int:
    return images * (work.image_bytes + INDEX_BYTES) + chunks * CHUNK_HEADER_BYTES


def _remains(work: Workload) -> int:
    """Bytes of a row whose images are deleted: the first chunks, and a record of each other."""
    shown = min(math.ceil(SHOWN_IMAGES / work.chunk_size), len(work.chunks))
    kept = _chunk_bytes(work, sum(work.chunks[:shown]), shown)
    return kept + (len(work.chunks) - shown) * RECORD_BYTES


def _feature_seconds(work: Workload) -> float:
    return sum(network.seconds or 0.0 for network in work.networks)


FEATURE_OPERATIONS = 3  # claim, file, release


def _image_operations(work: Workload, images: int) -> int:
    """Files created, replaced or removed for a chunk: claim, parts and their end, file, release."""
    return 3 + 2 * _parts(work, images)


def _operations(work: Workload, images: int) -> int:
    return _image_operations(work, images) + FEATURE_OPERATIONS * len(work.networks)


def _parts(work: Workload, images: int) -> int:
    """Micro-batches of a chunk that wait on disk for the rest of it: all but the last."""
    return math.ceil(images / work.batch_size) - 1


def _files_in_work(work: Workload) -> int:
    """Of a process at work besides finished ones: its claim, clock, parts, a file half made."""
    return 3 + _parts(work, work.chunks[0])


def _files(work: Workload) -> int:
    """Files at the end; a chunk without images leaves a record of what it cost."""
    chunks = len(work.rows) * len(work.chunks)
    return chunks * (1 + len(work.networks)) + RUN_FILES + FILES_PER_ARTIFACT * work.artifacts


def _row_starts(work: Workload, working: int) -> int:
    """How many times a process sets up a row, at most, when all take part in all rows."""
    return len(work.rows) * min(working, len(work.chunks))
