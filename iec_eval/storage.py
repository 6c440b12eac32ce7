"""Files: written whole or not at all, read without running code; and the layout of a run.

<out>/study.yaml
<out>/<variant>-<fingerprint8>/chunks/000000-000255.safetensors     uint8 images, their indices
<out>/<variant>-<fingerprint8>/features/<network>/000000-000255.safetensors
<out>/artifacts/<key>.safetensors
<out>/results.json  table.md  report.html  gallery.png  manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile, StorageError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block succeeds.

    Raises StorageError if the file system refuses.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place, "
            "then run the same command again: everything finished is kept"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file atomically; ``about`` becomes its JSON-valued metadata."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in (about or {}).items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except Exception as error:  # safetensors wraps the system's error in its own type
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file that :func:`write_tensors` wrote.

    Raises CorruptFile if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors raises its own type, json another
        raise CorruptFile(f"{path}: cannot be read ({error})") from error


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of named tensors: names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors from a safetensors file, or from a torch file without code in it.

    Raises ConfigError if the file is missing, CorruptFile if it is damaged or holds more than
    tensors: a pickle could run anything, so it is never unpickled.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # both loaders raise a zoo of types for a damaged file
        reason = str(error).splitlines()[0]
        raise CorruptFile(
            f"weights {path}: cannot be read ({reason}); wanted a whole safetensors file or a "
            "torch file of plain tensors, files that contain pickled code are refused"
        ) from error


@dataclass(frozen=True, order=True)
class IndexRange:
    """Images ``start`` to ``stop - 1``, the content of one file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

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
class Chunk:
    """Finished images of one range, with what they cost.

    ``images`` is uint8 ``[n, C, H, W]``. The cost is over the whole chunk: evaluations per image
    summed over images, and seconds of one process.
    """

    range: IndexRange
    images: Tensor
    evaluations_full: int
    evaluations_cached: int
    seconds: float


class VariantFolder:
    """The files of one variant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks = path / "chunks"
        self.error_file = path / "error.txt"

    def write_chunk(self, chunk: Chunk) -> None:
        """Keep a finished chunk, atomically."""
        about = {
            "evaluations_full": chunk.evaluations_full,
            "evaluations_cached": chunk.evaluations_cached,
            "seconds": chunk.seconds,
        }
        tensors = {"images": chunk.images, "indices": torch.tensor(chunk.range.indices)}
        write_tensors(self.chunks / f"{chunk.range.stem}.safetensors", tensors, about)

    def read_chunk(self, part: IndexRange) -> Chunk:
        """Read a chunk back.

        Raises CorruptFile if it is damaged or its images are not those its name says.
        """
        path = self.chunks / f"{part.stem}.safetensors"
        tensors, about = read_tensors(path)
        try:
            images, indices = tensors["images"], tensors["indices"].tolist()
            if indices != list(part.indices) or len(images) != len(part):
                raise CorruptFile(f"{path}: holds other images than its name says")
            return Chunk(part, images, **about)
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: is not a chunk of images ({error})") from error

    def finished(self) -> list[IndexRange]:
        """Ranges with a chunk on disk, sorted; nothing is opened."""
        return finished_ranges(self.chunks)

    def set_aside_corrupt(self) -> list[Path]:
        """Rename chunks that cannot be read, so that they are made again; their new names."""
        moved = []
        for part in self.finished():
            try:
                self.read_chunk(part)
            except CorruptFile:
                path = self.chunks / f"{part.stem}.safetensors"
                with suppress(FileNotFoundError):  # another process was faster
                    moved.append(path.rename(path.with_suffix(".corrupt")))
        return moved

    def features(self, network: str) -> Path:
        """Folder of the features that ``network`` (an identifier) gave."""
        return self.path / "features" / network


class RunFolder:
    """The folder of a run; also where calibrated artifacts are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Make the folder and check that it can be written.

        Raises StorageError if not.
        """
        write_text(self.path / ".writable", "")
        (self.path / ".writable").unlink(missing_ok=True)  # another process may do the same

    def variant(self, name: str, fingerprint: str) -> VariantFolder:
        """The folder of a variant: its name made safe, and its fingerprint's start."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "variant"
        return VariantFolder(self.path / f"{slug}-{fingerprint[:8]}")

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The artifact under ``key``; a damaged or foreign one is removed and missing."""
        path = self._artifact(key)
        if not path.is_file():
            return None
        with suppress(CorruptFile):
            tensors, about = read_tensors(path)
            if about == {"key": key, "content": content_digest(tensors)}:
                return tensors
        path.unlink(missing_ok=True)
        return None

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
        """Whether the artifact is there and whole."""
        return self.load(key) is not None

    def _artifact(self, key: str) -> Path:
        return self.path / "artifacts" / f"{key[:32]}.safetensors"


def finished_ranges(folder: Path) -> list[IndexRange]:
    """Ranges that have a safetensors file in ``folder``, sorted."""
    ranges = (IndexRange.parse(path.stem) for path in folder.glob("*.safetensors"))
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


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
