"""The layout of a run on disk.

<out>/study.yaml  rows.json         the study as it was last started, and its rows for ``status``
<out>/<variant>-<fingerprint8>/chunks/000000-000255.safetensors     uint8 images, their indices
<out>/<variant>-<fingerprint8>/parts/000000-000031.safetensors      of a chunk that is being made
<out>/<variant>-<fingerprint8>/features/<network>/000000-000255.safetensors
<out>/<variant>-<fingerprint8>/dropped/000000-000255.json    of a chunk whose images were deleted
<out>/artifacts/<key>.safetensors
<out>/claims/                       who makes what at this moment, empty when nobody does
<out>/slurm/                        studies, logs and a list of what was submitted to SLURM
<out>/results.json  table.md  report.html  gallery.png  manifest.json
<out>/influence.safetensors         what each image contributes to each number of results.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from os.path import exists, isdir, isfile
from pathlib import Path

import torch
from torch import Tensor

from iec_eval import processes
from iec_eval.claims import TIMEOUT, Claims
from iec_eval.errors import ConfigError, CorruptChunk, CorruptFile, MissingArtifact, StorageError
from iec_eval.storage import (
    content_digest,
    read_about,
    read_sealed,
    read_tensors,
    remove_leftovers,
    seen,
    write_json,
    write_sealed,
    write_tensors,
    write_text,
)

INFLUENCE = "influence.safetensors"
LAUNCH = "launch: "  # begins the last lines of a failure's record


@dataclass(frozen=True, order=True)
class IndexRange:
    """Images ``start`` to ``stop - 1``, the content of one file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, other: IndexRange) -> bool:
        return self.start <= other.start and other.stop <= self.stop

    @property
    def indices(self) -> range:
        return range(self.start, self.stop)

    @property
    def stem(self) -> str:
        """File name without suffix: first and last index."""
        return f"{self.start:06d}-{self.stop - 1:06d}"

    @classmethod
    def parse(cls, stem: str) -> IndexRange | None:
        """The range that a file name states, None if it states none."""
        match = re.fullmatch(r"(\d{6,})-(\d{6,})", stem)
        return cls(int(match[1]), int(match[2]) + 1) if match else None


@dataclass(frozen=True)
class Spent:
    """What some images cost together: evaluations summed over images, seconds of one process."""

    evaluations_full: int
    evaluations_cached: int
    seconds: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.evaluations_full + other.evaluations_full,
            self.evaluations_cached + other.evaluations_cached,
            self.seconds + other.seconds,
        )


NOTHING_SPENT = Spent(0, 0, 0.0)


@dataclass(frozen=True)
class Chunk:
    """Finished images of one range, uint8 ``[n, C, H, W]``, with what they cost."""

    range: IndexRange
    images: Tensor
    spent: Spent

    @classmethod
    def joined(cls, pieces: Iterable[Chunk]) -> Chunk:
        """One chunk of pieces that follow each other."""
        ordered = sorted(pieces, key=lambda piece: piece.range)
        whole = IndexRange(ordered[0].range.start, ordered[-1].range.stop)
        images = torch.cat([piece.images for piece in ordered])
        assert len(images) == len(whole), "pieces neither overlap nor leave gaps"
        return cls(whole, images, sum((piece.spent for piece in ordered), NOTHING_SPENT))


class VariantFolder:
    """The files of one variant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks = path / "chunks"
        self.parts = path / "parts"
        self.dropped = path / "dropped"
        self.error_file = path / "error.txt"

    def write_chunk(self, chunk: Chunk) -> None:
        """Keep a finished chunk, atomically; its parts are not needed any more."""
        _write_images(self._chunk(chunk.range), chunk)
        self.remove_parts(chunk.range)

    def read_chunk(self, part: IndexRange) -> Chunk:
        """Read a chunk back.

        Raises CorruptChunk if it is damaged or its images are not those its name says: it is set
        aside then, and so is missing. Raises MissingArtifact if its images were deleted.
        """
        path = self._chunk(part)
        found = seen(path)
        if found is None and self._dropped(part).is_file():
            raise MissingArtifact(
                f"the images {part.start} to {part.stop - 1} in {self.path} were deleted after "
                "their features were kept (execution.keep_images: false)"
            )
        try:
            return _read_images(path, part)
        except CorruptFile as error:
            raise CorruptChunk(f"{error}; {self._set_aside(path, found)}") from error

    def write_part(self, chunk: Chunk) -> None:
        """Keep a piece of a chunk that is being made, atomically."""
        _write_images(self._part(chunk.range), chunk)

    def read_parts(self, whole: IndexRange) -> list[Chunk]:
        """The pieces of ``whole`` that are there, disjoint and in order; damaged ones are gone."""
        found: list[Chunk] = []
        for part in finished_ranges(self.parts):
            if part in whole and (not found or part.start >= found[-1].range.stop):
                try:
                    found.append(_read_images(self._part(part), part))
                except CorruptFile as error:
                    if self._part(part).is_file():  # else merged by another process in between
                        processes.say(f"{error}; it is made again")
                    self._part(part).unlink(missing_ok=True)
        return found

    def remove_parts(self, whole: IndexRange) -> None:
        """Remove the pieces of ``whole``."""
        for part in finished_ranges(self.parts):
            if part in whole:
                self._part(part).unlink(missing_ok=True)

    def has(self, part: IndexRange) -> bool:
        """Whether just this range has a chunk on disk."""
        return self._chunk(part).is_file()

    def finished(self) -> list[IndexRange]:
        """Ranges with a chunk on disk, sorted; nothing is opened."""
        return finished_ranges(self.chunks)

    def ever_finished(self) -> list[IndexRange]:
        """The same, with chunks whose images were deleted after all wanted of them was kept."""
        return sorted({*self.finished(), *finished_ranges(self.dropped, ".json")})

    def finished_or_scored(self, networks: Sequence[str]) -> list[IndexRange]:
        """The same, with those whose features of all ``networks`` stand in for deleted images."""
        return sorted({*self.finished(), *self._scored(networks)})

    def _scored(self, networks: Sequence[str]) -> list[IndexRange]:
        """Ranges whose images were deleted and whose features of all ``networks`` are there."""
        found = finished_ranges(self.dropped, ".json")
        for network in networks:
            there = set(finished_ranges(self.features(network)))
            found = [part for part in found if part in there]
        return found if networks else []

    def drop_images(self, part: IndexRange) -> None:
        """Delete a chunk's images, whose features are there; what they cost is kept."""
        try:
            about = read_about(self._chunk(part))
        except CorruptFile:
            if not self._chunk(part).is_file():
                return  # another process was faster
            raise
        write_json(self._dropped(part), about)
        self._chunk(part).unlink(missing_ok=True)

    def spent(self, part: IndexRange) -> Spent:
        """What a chunk's images cost, read without them.

        Raises CorruptChunk if its file is damaged: it is set aside then.
        """
        path = self._kept(part)
        found = seen(path)
        try:
            return _read_spent(path)
        except CorruptFile as error:
            raise CorruptChunk(f"{error}; {self._set_aside(path, found)}") from error

    def recorded_spent(self, part: IndexRange) -> Spent:
        """Like :meth:`spent`, for those who only look: nothing is set aside.

        Raises CorruptFile if the file is damaged, gone, or not to be read by this user.
        """
        try:
            return _read_spent(self._kept(part))
        except StorageError as error:
            raise CorruptFile(str(error)) from error

    def set_aside_corrupt(self) -> list[str]:
        """Put chunks aside that are cut off or cannot be opened; what is wrong with each.

        Contents are not read here, but whenever images are.
        """
        complaints = []
        for part in self.finished():
            path = self._chunk(part)
            found = seen(path)
            try:
                read_about(path)
            except CorruptFile as error:
                if path.is_file():  # else another process was faster
                    complaints.append(f"{error}; {self._set_aside(path, found)}")
        return complaints

    def tidy(self) -> None:
        """Remove pieces whose images are in chunks, left by a process that was killed."""
        finished = self.finished() if self.parts.is_dir() else []
        for part in finished_ranges(self.parts):
            if covers(finished, part):
                self._part(part).unlink(missing_ok=True)

    def features(self, network: str) -> Path:
        """Folder of the features that ``network`` (an identifier) gave."""
        return self.path / "features" / network

    def write_failure(self, reason: str, details: str, launch: str) -> None:
        """Leave a failure's reason, where it happened, and in which launch.

        Other launches that it failed in stay named: none of them tries it again.
        """
        launches = dict.fromkeys([*self._failed_in(), launch])
        named = "".join(f"{LAUNCH}{one}\n" for one in launches)
        write_text(self.error_file, f"{reason}\n\n{details}\n{named}")

    def failure(self, launch: str | None = None) -> str | None:
        """Why the variant failed, in one line; None if it did not, or not in ``launch``."""
        lines = self._failure_lines()
        if lines is None or (launch is not None and launch not in self._failed_in()):
            return None
        return lines[0] if lines else "unknown reason"

    def forget_failure(self, but: str | None = None) -> None:
        """Remove the record of a failure, unless it is of the launch ``but`` or a process of it."""
        launches = [one.partition(",")[0] for one in self._failed_in()]
        if self.failure() is not None and (but is None or but not in launches):
            self.error_file.unlink(missing_ok=True)

    def _failure_lines(self) -> list[str] | None:
        try:
            return self.error_file.read_text().splitlines()
        except OSError:
            return None

    def _failed_in(self) -> list[str]:
        """The launches that the last lines of the failure's record name."""
        lines = reversed(self._failure_lines() or [])
        last = takewhile(lambda line: line.startswith(LAUNCH), lines)
        return [line.removeprefix(LAUNCH) for line in last]

    def _set_aside(self, path: Path, found: tuple[int, int] | None) -> str:
        """Rename a damaged file, unless another one has taken its place."""
        with suppress(FileNotFoundError):  # another process was faster
            if seen(path) == found:
                path.rename(path.with_suffix(".corrupt"))
        return f"set aside as {path.with_suffix('.corrupt').name}, to be made again"

    def _chunk(self, part: IndexRange) -> Path:
        return self.chunks / f"{part.stem}.safetensors"

    def _part(self, part: IndexRange) -> Path:
        return self.parts / f"{part.stem}.safetensors"

    def _kept(self, part: IndexRange) -> Path:
        """The file that tells what a chunk cost; a folder that cannot be looked into has none."""
        return self._chunk(part) if isfile(self._chunk(part)) else self._dropped(part)

    def _dropped(self, part: IndexRange) -> Path:
        return self.dropped / f"{part.stem}.json"


class RunFolder:
    """The folder of a run; also where calibrated artifacts are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Make the folder and check that it can be written.

        Raises StorageError if not, ConfigError if it is a file.
        """
        self.check()
        write_text(self.path / ".writable", "")
        (self.path / ".writable").unlink(missing_ok=True)  # another process may do the same

    def check(self) -> None:
        """Raise ConfigError if a file is where the folder or one above it should be."""
        # unlike those of Path, these call what they may not look at absent
        above = (path for path in (self.path, *self.path.parents) if exists(path))
        there = next(above, None)
        if there is not None and not isdir(there):
            raise ConfigError(f"{there}: is a file, wanted a folder")

    def tidy(self) -> None:
        """Remove what processes that were killed left half-written."""
        remove_leftovers(self.path)

    def claims(self, timeout: float = TIMEOUT, launch: str | None = None) -> Claims:
        """The claims of this process, as one of ``launch``, on this run's work."""
        return Claims(self.path / "claims", timeout, processes.this_process(launch))

    def variant(self, name: str, fingerprint: str) -> VariantFolder:
        """The folder of a variant: its name made safe, and its fingerprint's start."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "variant"
        return VariantFolder(self.path / f"{slug}-{fingerprint[:8]}")

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The artifact under ``key``; a damaged or foreign one is removed and missing."""
        path = self._artifact(key)
        found = seen(path)
        try:
            return self._read(key)
        except CorruptFile as error:
            if found is not None and seen(path) == found:  # else another process was faster
                processes.say(f"{error}; it is calibrated again")
                path.unlink(missing_ok=True)
            return None

    def _read(self, key: str) -> dict[str, Tensor]:
        path = self._artifact(key)
        tensors, about = read_tensors(path)
        if about != {"key": key, "content": content_digest(tensors)}:
            raise CorruptFile(f"{path}: its content does not match its checksum")
        return tensors

    def save(self, key: str, artifact: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
        """Keep an artifact with a description of what it is."""
        seal = {"key": key, "content": content_digest(artifact)}
        write_tensors(self._artifact(key), artifact, seal)
        write_json(self._artifact(key).with_suffix(".json"), {**about, **seal})

    def discard(self, key: str) -> None:
        """Remove an artifact, if it is there."""
        self._artifact(key).unlink(missing_ok=True)
        self._artifact(key).with_suffix(".json").unlink(missing_ok=True)

    def has(self, key: str) -> bool:
        """Whether the artifact is there and whole; nothing is changed."""
        try:
            self._read(key)
        except CorruptFile:
            return False
        return True

    def _artifact(self, key: str) -> Path:
        return self.path / "artifacts" / f"{key[:32]}.safetensors"


def calibration_claim(key: str) -> str:
    """What whoever calibrates the artifact with that key claims."""
    return f"calibration.{key[:32]}"


def finished_ranges(folder: Path, suffix: str = ".safetensors") -> list[IndexRange]:
    """Ranges that have a file in ``folder``, sorted."""
    ranges = (IndexRange.parse(path.stem) for path in folder.glob(f"*{suffix}"))
    return sorted(part for part in ranges if part is not None)


def missing_ranges(finished: Iterable[IndexRange], count: int, chunk_size: int) -> list[IndexRange]:
    """What of images 0..count-1 is not covered, cut at multiples of ``chunk_size``.

    Works whatever sizes the finished files have, so count and chunk size may change between runs.
    """
    missing, position = [], 0
    for part in [*sorted(finished), IndexRange(count, count)]:
        stop = min(part.start, count)
        while position < stop:
            edge = min((position // chunk_size + 1) * chunk_size, stop)
            missing.append(IndexRange(position, edge))
            position = edge
        position = max(position, part.stop)
    return missing


def covers(ranges: Iterable[IndexRange], part: IndexRange) -> bool:
    """Whether ``ranges`` together hold all of ``part``."""
    return not missing_ranges([IndexRange(0, part.start), *ranges], part.stop, part.stop)


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


def _write_images(path: Path, chunk: Chunk) -> None:
    tensors = {"images": chunk.images, "indices": torch.tensor(chunk.range.indices)}
    write_sealed(path, tensors, asdict(chunk.spent))


def _read_spent(path: Path) -> Spent:
    try:
        about = json.loads(path.read_text()) if path.suffix == ".json" else read_about(path)
        found = Spent(**{name: about[name] for name in asdict(NOTHING_SPENT)})
        return NOTHING_SPENT + found  # what is no number cannot be added
    except (CorruptFile, FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: does not say what its images cost ({error})") from error
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"cannot read {path}: {reason}; run it again") from error


def _read_images(path: Path, part: IndexRange) -> Chunk:
    tensors, about = read_sealed(path)
    try:
        images, indices = tensors["images"], tensors["indices"].tolist()
        if indices != list(part.indices) or len(images) != len(part):
            raise CorruptFile(f"{path}: holds other images than its name says")
        return Chunk(part, images, Spent(**about))
    except (KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: is not a chunk of images ({error})") from error
