"""The work of a study: which files each row needs, and which of them are missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from iec_eval import processes
from iec_eval.errors import CorruptFile
from iec_eval.fingerprints import digest
from iec_eval.metrics.features import FeatureNetwork, Features
from iec_eval.planning import Plan
from iec_eval.runs import IndexRange, VariantFolder, covers, missing_ranges
from iec_eval.storage import read_sealed, seen, write_sealed

SHOWN = 10  # images of each row in the gallery
EXTRACTED = 128  # images a feature network sees at once, whatever a file holds


@dataclass(frozen=True)
class Job:
    """A plan, the folder its images go to, and the networks whose features of them are wanted.

    A row of several seeds is several jobs.

    Images may be deleted only where no metric reads them: ``keep_images`` says so. An earlier
    study of the same rows may have deleted some that a metric of this one reads.
    """

    plan: Plan
    folder: VariantFolder
    networks: Sequence[FeatureNetwork] = ()
    keep_images: bool = True
    reads_images: bool = False

    @property
    def name(self) -> str:
        """The row's name, and the seed where the row has several."""
        row = self.plan.experiment
        return row.name if row.images.seeds is None else f"{row.name} (seed {row.images.seed})"

    @property
    def count(self) -> int:
        """Images of the row and seed."""
        return self.plan.experiment.images.count

    def finished(self) -> list[IndexRange]:
        """Ranges whose images are there, or all that is wanted of them."""
        return self.folder.finished_or_scored(self.stand_ins())

    def stand_ins(self) -> list[str]:
        """Networks whose features, all together, stand in for deleted images; none if none do."""
        return [] if self.reads_images else [network_id(network) for network in self.networks]

    def missing(self, chunk_size: int) -> list[IndexRange]:
        """Ranges that are not on disk yet."""
        return missing_ranges(self.finished(), self.count, chunk_size)

    def complete(self, part: IndexRange) -> bool:
        """Whether nothing of ``part`` is missing."""
        return covers(self.finished(), part)

    def whole(self) -> bool:
        """Whether images and features are all there."""
        return self.complete(IndexRange(0, self.count)) and not self.unseen()

    def may_drop(self, part: IndexRange) -> bool:
        """Whether nobody will read these images again: not the networks, nor the gallery."""
        files = (features_file(self.folder, part, network) for network in self.networks)
        return not self.keep_images and part.start >= SHOWN and all(f.is_file() for f in files)

    def drop_read(self) -> None:
        """Delete images that nobody will read again, left by a process that was killed."""
        for part in self.folder.finished() if not self.keep_images else []:
            if self.may_drop(part):
                self.folder.drop_images(part)

    def unseen(self) -> list[tuple[IndexRange, FeatureNetwork]]:
        """Chunks of which a network's features are not on disk yet."""
        chunks = [part for part in self.folder.finished() if part.start < self.count]
        return [
            (part, network)
            for network in self.networks
            for part in chunks
            if not features_file(self.folder, part, network).is_file()
        ]


def by_row(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each row, which follow one another: one for each seed."""
    return [list(found) for _, found in groupby(jobs, lambda job: job.plan.experiment.name)]


def stored_features(folder: VariantFolder, part: IndexRange, network: FeatureNetwork) -> Features:
    """Features of a chunk's images: read if they are on disk, else computed and kept.

    Raises CorruptChunk if they have to be computed and the images are damaged.
    """
    path = features_file(folder, part, network)
    found = seen(path)
    if found is not None:
        try:
            tensors, _ = read_sealed(path)
            return Features(tensors["features"], tensors["logits"])
        except (CorruptFile, KeyError) as error:
            if seen(path) == found:  # else another process was faster
                processes.say(f"{error}; these features are extracted again")
                path.unlink(missing_ok=True)
    images, began = folder.read_chunk(part).images, time.perf_counter()
    pieces = [network.extract(some) for some in images.split(EXTRACTED)]
    features = torch.cat([piece.features for piece in pieces])
    logits = torch.cat([piece.logits for piece in pieces])
    about = {"seconds": time.perf_counter() - began}
    write_sealed(path, {"features": features, "logits": logits}, about)
    return Features(features, logits)


def features_file(folder: VariantFolder, part: IndexRange, network: FeatureNetwork) -> Path:
    """Where the features of a chunk's images are kept."""
    return folder.features(network_id(network)) / f"{part.stem}.safetensors"


def network_id(network: FeatureNetwork) -> str:
    """A folder name for a feature network; other weights or another protocol give another."""
    return f"{network.tag or 'inception'}-{digest(network.identity())[:8]}"
