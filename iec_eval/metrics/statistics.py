"""Reference statistics: the mean and covariance of a data set's features, in one small file.

The features of some of the images may be kept in it too, for metrics that compare sets.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.images import ImageCollection, ImagePreparation
from iec_eval.metrics.features import PACKAGED, FeatureNetwork
from iec_eval.storage import atomic_path

SCHEMA = "iec_eval reference 1"
FILE = "reference.safetensors"


@dataclass(frozen=True)
class KeptFeatures:
    """Features of some of the reference's images; they stay on disk until :meth:`read`.

    Attributes:
        count: their number N.
        digest: hex sha256 of their bytes.
        read: gives them, float32 ``[N, D]``, in the collection's order; raises CorruptFile if
            they are not those that the digest was made of.
    """

    count: int
    digest: str
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, features: Tensor) -> KeptFeatures:
        """Those of ``features [N, D]``, which are in memory."""
        plain = features.float().contiguous()
        return cls(len(plain), _digest(plain), lambda: plain)


@dataclass(frozen=True)
class ReferenceStatistics:
    """What FID compares with.

    Attributes:
        mu: mean feature, float64 ``[D]``.
        sigma: unbiased covariance, float64 ``[D, D]``.
        count: number of images; None if it is not known, as for most published statistics.
        protocol: identity of the feature network.
        source: which images, how prepared, and the hash of their pixels; JSON values.
        kept: the features of some of the images; None if none were kept.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    protocol: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)
    kept: KeptFeatures | None = None

    def digest(self) -> str:
        """Hex sha256 of the numbers and the protocol: equal exactly if scores are comparable."""
        digest = hashlib.sha256(json.dumps([self.count, self.protocol], sort_keys=True).encode())
        for tensor in (self.mu, self.sigma):
            digest.update(tensor.double().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; everything but the tensors is its metadata."""
        description = {"count": self.count, "protocol": self.protocol, "source": self.source}
        metadata = {"schema": SCHEMA, "description": json.dumps(description, sort_keys=True)}
        tensors = {"mu": self.mu.contiguous(), "sigma": self.sigma.contiguous()}
        if self.kept is not None:
            tensors["features"] = self.kept.read()
            metadata["kept"] = json.dumps({"count": self.kept.count, "digest": self.kept.digest})
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read what :meth:`save` wrote, but for kept features, which are read when asked for.

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
                f"delete it and make them again with iec-eval reference IMAGES {path}"
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


def check_protocols(
    metric: str, spec: str, reference: Mapping[str, str], network: Mapping[str, str], way_out: str
) -> None:
    """Raise Incompatible, naming the differences, unless both protocols are one.

    ``spec`` is what the user calls the reference; ``way_out`` ends the message.
    """
    if reference == network:
        return
    keys = [key for key in {**reference, **network} if reference.get(key) != network.get(key)]
    described = [
        f"{key}: {reference.get(key, 'nothing')!r} there, {network.get(key, 'nothing')!r} here"
        for key in keys
    ]
    raise Incompatible(
        f"{metric}: reference {spec!r} was made by another protocol than this metric's features "
        f"({'; '.join(described)}); use the features it was made with, or make a reference with "
        f"these{way_out}"
    )


def spread(total: int, count: int) -> list[int]:
    """``count`` of the indices 0..total-1, evenly spread: i total / count, rounded down.

    Raises ConfigError if there are fewer.
    """
    if not 0 <= count <= total:
        raise ConfigError(f"features of {count} images to be kept, there are {total} images")
    return [position * total // count for position in range(count)]


def reference_from_images(
    images: ImageCollection,
    preparation: ImagePreparation,
    network: FeatureNetwork,
    *,
    source: str,
    keep: int = 0,
    batch_size: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceStatistics:
    """Statistics of all ``images``, prepared, as ``network`` sees them.

    ``source`` is the string that names the images, kept for the record. The features of ``keep``
    images, evenly spread, are kept as well. ``progress(done, total)`` is called after every
    batch. Raises ConfigError for fewer than two images or fewer than ``keep``, Incompatible if
    the network cannot read them.
    """
    if len(images) < 2:
        raise ConfigError(f"reference of {source}: wanted two images or more, got {len(images)}")
    chosen, kept = spread(len(images), keep), list[Tensor]()
    moments, pixels = Moments(network.dimensions), hashlib.sha256()
    for batch in _prepared_batches(images, preparation, batch_size):
        pixels.update(batch.contiguous().numpy().tobytes())
        features = network.extract(batch).features
        kept.append(features[_rows(chosen, moments.count, len(batch))])
        moments.update(features)
        if progress is not None:
            progress(moments.count, len(images))
    record = {
        "images": source,
        "count": len(images),
        "preparation": preparation.record(),
        "shape": list(batch.shape[1:]),
        "pixels": pixels.hexdigest(),
    }
    return ReferenceStatistics(
        *(moments.mean, moments.covariance(), moments.count, network.identity(), record),
        kept=KeptFeatures.of(torch.cat(kept)) if keep else None,
    )


def _rows(chosen: Sequence[int], start: int, size: int) -> list[int]:
    """Which rows of the batch that begins at image ``start`` are chosen; ``chosen`` is sorted."""
    first, last = bisect_left(chosen, start), bisect_left(chosen, start + size)
    return [index - start for index in chosen[first:last]]


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
    if "kept" in metadata:
        about = json.loads(metadata["kept"])
        read = partial(_read_features, path, about["digest"])
        values["kept"] = KeptFeatures(about["count"], about["digest"], read)
    return values


def _read_features(path: Path, digest: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"reference {path}: its features cannot be read ({error})") from error
    if _digest(features) != digest:
        raise CorruptFile(f"reference {path}: its features are damaged; make the reference again")
    return features


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()
