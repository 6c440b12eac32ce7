"""Reference statistics: the mean and covariance of a data set's features, in one small file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.images import ImageCollection, ImagePreparation
from iec_eval.metrics.features import PACKAGED, FeatureNetwork
from iec_eval.storage import atomic_path

SCHEMA = "iec_eval reference 1"
FILE = "reference.safetensors"


@dataclass(frozen=True)
class ReferenceStatistics:
    """What FID compares with.

    Attributes:
        mu: mean feature, float64 ``[D]``.
        sigma: unbiased covariance, float64 ``[D, D]``.
        count: number of images.
        protocol: identity of the feature network.
        source: which images, how prepared, and the hash of their pixels; JSON values.
    """

    mu: Tensor
    sigma: Tensor
    count: int
    protocol: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Hex sha256 of the numbers and the protocol: equal exactly if scores are comparable."""
        digest = hashlib.sha256(json.dumps([self.count, self.protocol], sort_keys=True).encode())
        for tensor in (self.mu, self.sigma):
            digest.update(tensor.double().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; everything but mu and sigma is its metadata."""
        description = {"count": self.count, "protocol": self.protocol, "source": self.source}
        metadata = {"schema": SCHEMA, "description": json.dumps(description, sort_keys=True)}
        tensors = {"mu": self.mu.contiguous(), "sigma": self.sigma.contiguous()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read what :meth:`save` wrote.

        Raises ConfigError if there is no such file, CorruptFile if it is something else.
        """
        if not path.is_file():
            raise ConfigError(
                f"reference {path}: no such file; make it with iec-eval reference IMAGES {path}"
            )
        try:
            return cls(**_read_statistics(path))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"reference {path}: not reference statistics ({error}); "
                f"make them again with iec-eval reference IMAGES {path}"
            ) from error


class Moments:
    """Mean and covariance of a stream of vectors, in float64.

    Batches are merged by their means and scatter matrices (Chan et al. 1979, eq. 2.1), which
    stays accurate where the mean is large beside the spread.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Take in ``vectors [B, D]``."""
        batch = vectors.double()
        mean = batch.mean(dim=0)
        centred, gap = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(gap, gap) * (self.count * len(batch) / total)
        self.mean += gap * (len(batch) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Unbiased, ``[D, D]``; of two vectors or more."""
        return self._scatter / (self.count - 1)


def open_reference(spec: str) -> ReferenceStatistics:
    """The statistics that ``spec`` names: a packaged set (``fashion-mnist``) or a file.

    Raises ConfigError if there is no such file, CorruptFile if it cannot be read.
    """
    if spec in PACKAGED:
        return ReferenceStatistics.load(PACKAGED[spec] / FILE)
    if not Path(spec).is_file():
        raise ConfigError(
            f"reference {spec!r}: wanted a file or one of {', '.join(PACKAGED)}, found neither; "
            "make a file with iec-eval reference IMAGES OUT"
        )
    return ReferenceStatistics.load(Path(spec))


def reference_from_images(
    images: ImageCollection,
    preparation: ImagePreparation,
    network: FeatureNetwork,
    *,
    source: str,
    batch_size: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceStatistics:
    """Statistics of all ``images``, prepared, as ``network`` sees them.

    ``source`` is the string that names the images, kept for the record. ``progress(done, total)``
    is called after every batch. Raises ConfigError for fewer than two images, Incompatible if
    the network cannot read them.
    """
    if len(images) < 2:
        raise ConfigError(f"reference of {source}: wanted two images or more, got {len(images)}")
    moments, pixels = Moments(network.dimensions), hashlib.sha256()
    for batch in _prepared_batches(images, preparation, batch_size):
        pixels.update(batch.contiguous().numpy().tobytes())
        moments.update(network.extract(batch).features)
        if progress is not None:
            progress(moments.count, len(images))
    record = {
        "images": source,
        "count": len(images),
        "preparation": asdict(preparation),
        "shape": list(batch.shape[1:]),
        "pixels": pixels.hexdigest(),
    }
    return ReferenceStatistics(
        moments.mean, moments.covariance(), moments.count, network.identity(), record
    )


def _prepared_batches(
    images: ImageCollection, preparation: ImagePreparation, size: int
) -> Iterator[Tensor]:
    shape: tuple[int, ...] | None = None
    for start in range(0, len(images), size):
        indices = range(start, min(start + size, len(images)))
        batch = [preparation(images.image(index)) for index in indices]
        shape = shape or tuple(batch[0].shape)
        for index, image in zip(indices, batch, strict=True):
            if tuple(image.shape) != shape:
                raise ConfigError(
                    f"image {index} has shape {tuple(image.shape)}, the first {shape}: "
                    "give a size and channels"
                )
        yield torch.stack(batch)


def _read_statistics(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"wanted schema {SCHEMA!r}, got {metadata.get('schema')!r}")
        values = dict(json.loads(metadata["description"]))
        values["mu"], values["sigma"] = file.get_tensor("mu"), file.get_tensor("sigma")
    if values["sigma"].shape != (len(values["mu"]), len(values["mu"])):
        raise ValueError(f"mu {tuple(values['mu'].shape)}, sigma {tuple(values['sigma'].shape)}")
    return values
