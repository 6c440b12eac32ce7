"""Statistics that others published: npz files with the moments of InceptionV3's features.

All three formats hold ``mu [2048]`` and ``sigma [2048, 2048]`` of the InceptionV3 of the original
FID code. What differs is how the images were enlarged to 299 pixels before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.images import NpzImages
from iec_eval.metrics.features import FeatureNetwork, InceptionV3
from iec_eval.metrics.statistics import KeptFeatures, ReferenceStatistics, spread
from iec_eval.storage import sha256

PYTORCH_FID_RESIZE = "torch bilinear to 299, align_corners=False, antialias=False, on [0, 1]"
# What the identity of our InceptionV3 has to say otherwise, by format. Guided-diffusion and EDM
# enlarge with TensorFlow 1's filter, as it does.
FORMATS: dict[str, dict[str, str]] = {
    "pytorch-fid": {"resize": PYTORCH_FID_RESIZE},
    "guided-diffusion": {},
    "edm": {},
}
KEYS = ("mu", "sigma")
BATCH = 100  # images at a time
ROUNDING = 1e-5  # relative; published files are float32 or float64


def import_statistics(
    path: Path,
    form: str,
    network: FeatureNetwork,
    *,
    count: int | None = None,
    keep: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceStatistics:
    """The statistics in an npz file of another project, checked.

    Args:
        path: the file, of which ``mu`` and ``sigma`` are read.
        form: who wrote it: ``pytorch-fid``, ``guided-diffusion`` or ``edm``.
        network: InceptionV3, whose weights file stands for theirs, so it must be there.
        count: how many images they are of; the files do not say.
        keep: of how many of the images in the file, which only guided-diffusion's have, to keep
            the features.
        progress: called with how many of those are done, and ``keep``.

    Raises ConfigError for other arrays, another network, or a missing file; CorruptFile for a
    damaged one and for numbers that are no mean and covariance.
    """
    if form not in FORMATS:
        raise ConfigError(f"statistics: wanted one of {', '.join(FORMATS)}, got {form!r}")
    if not isinstance(network, InceptionV3):
        raise Incompatible(
            f"statistics {path}: those of {form} are of InceptionV3, got features "
            f"{network.tag!r}; leave --features out"
        )
    if count is not None and count < 2:
        raise ConfigError(f"statistics {path}: wanted a count of two images or more, got {count}")
    mu, sigma = _read(path)
    _check_shapes(path, mu, sigma, network.dimensions)
    _check_covariance(path, sigma)
    source = {
        "statistics": str(path),
        "format": form,
        "sha256": sha256(path),
        "count": count,
        "published_weights": network.published,
    }
    protocol = {**network.identity(), **FORMATS[form]}
    statistics = ReferenceStatistics(mu, sigma, count, protocol, source)
    kept = _kept(path, form, network, keep, progress) if keep else None
    return replace(statistics, kept=kept)


def _kept(
    path: Path,
    form: str,
    network: FeatureNetwork,
    count: int,
    progress: Callable[[int, int], None] | None,
) -> KeptFeatures:
    """Features of the images that guided-diffusion stores beside the statistics of all."""
    if form != "guided-diffusion":
        raise ConfigError(
            f"statistics {path}: files of {form} hold no images to keep features of; leave "
            "--keep-features out, or make a reference from the images themselves"
        )
    images = NpzImages(path, beside_statistics=True)
    chosen, features = spread(len(images), count), list[Tensor]()
    for start in range(0, count, BATCH):
        batch = [images.image(index) for index in chosen[start : start + BATCH]]
        features.append(network.extract(torch.stack(batch)).features)
        if progress is not None:
            progress(start + len(batch), count)
    return KeptFeatures.of(torch.cat(features))


def _read(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise ConfigError(f"statistics {path}: no such file; wanted an npz file of mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as data:
            names = list(data.files)
            arrays = [data[name] for name in KEYS if name in names]
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise CorruptFile(f"statistics {path}: not a readable npz file ({error})") from error
    if len(arrays) < len(KEYS):
        raise ConfigError(
            f"statistics {path}: wanted the arrays {' and '.join(KEYS)}, got "
            f"{', '.join(names) or 'none'}; if these are images, leave --statistics out"
        )
    return _as_float64(path, "mu", arrays[0]), _as_float64(path, "sigma", arrays[1])


def _as_float64(path: Path, name: str, array: Any) -> Tensor:
    if array.dtype.kind != "f":
        raise ConfigError(
            f"statistics {path}: wanted {name} of floating-point numbers, got {array.dtype}"
        )
    tensor = torch.from_numpy(array.astype(np.float64))
    if not bool(tensor.isfinite().all()):
        raise CorruptFile(f"statistics {path}: {name} holds numbers that are not finite")
    return tensor


def _check_shapes(path: Path, mu: Tensor, sigma: Tensor, dimensions: int) -> None:
    if mu.shape != (dimensions,) or sigma.shape != (dimensions, dimensions):
        raise ConfigError(
            f"statistics {path}: wanted mu {(dimensions,)} and sigma {(dimensions, dimensions)}, "
            f"got {tuple(mu.shape)} and {tuple(sigma.shape)}; only those of InceptionV3's pooled "
            "features can be used"
        )


def _check_covariance(path: Path, sigma: Tensor) -> None:
    """Symmetric and positive semidefinite, both within rounding."""
    scale = float(sigma.abs().max())
    gap = float((sigma - sigma.T).abs().max())
    if gap > ROUNDING * scale:
        raise CorruptFile(
            f"statistics {path}: wanted a symmetric sigma, got one whose halves differ by "
            f"{gap:.3g} (largest entry {scale:.3g}); get the file again"
        )
    eigenvalues = torch.linalg.eigvalsh((sigma + sigma.T) / 2)
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    if lowest < -ROUNDING * highest or highest <= 0:
        raise CorruptFile(
            f"statistics {path}: wanted a covariance, got a sigma with eigenvalues from "
            f"{lowest:.3g} to {highest:.3g}; get the file again"
        )
