"""What metrics share that compare the images' features with features kept in the reference."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.metrics.base import FeatureOptions
from iec_eval.metrics.features import PACKAGED, Features
from iec_eval.metrics.referenced import ReferenceMetric
from iec_eval.metrics.statistics import (
    KeptFeatures,
    check_protocols,
)


class FeatureSetOptions(FeatureOptions):
    """Options of metrics that compare sets of features."""

    reference: str = Field(
        description="reference made with --keep-features: a file or a packaged set"
    )
    seed: int = Field(0, ge=0, description="which images are drawn")


class FeatureSetMetric(ReferenceMetric):
    """Collects the features of all images, 4 D bytes each, to compare them with the reference's.

    Subclasses say with :attr:`needed` how many features they need of either side, and read them
    with :meth:`images_features` and :meth:`reference_features`.
    """

    Options = FeatureSetOptions
    features: list[Tensor]
    indices: list[Tensor]

    def __init__(self, options: FeatureSetOptions) -> None:
        super().__init__(options, options.reference)
        self._seed = options.seed
        self._features, self._weights = options.features, options.weights
        self.add_state("features", [], "cat")
        self.add_state("indices", [], "cat")

    @property
    @abstractmethod
    def needed(self) -> tuple[int, str]:
        """Features needed of either side, and the option that lowers the number."""

    def prepare(self, count: int) -> None:
        super().prepare(count)
        theirs, ours = self.reference.protocol, self.network.identity()
        check_protocols(self.name, self._reference, theirs, ours, "")
        needed, option = self.needed
        if count < needed:
            raise ConfigError(
                f"{self.name}: {count} images, wanted {needed} or more; use more images or set "
                f"{option}: {count}"
            )
        kept = self.reference.kept
        if kept is None or kept.count < needed:
            raise ConfigError(
                f"{self.name}: reference {self._reference!r} holds the features of "
                f"{kept.count if kept else 'no'} images, wanted {needed} or more; "
                f"make it with {self._command(needed)}"
            )

    def protocol(self) -> dict[str, Any]:
        kept = self._kept()
        reference = {
            "digest": kept.digest,
            "count": kept.count,
            "source": self.reference.source,
        }
        return {
            **super().protocol(),
            "reference": reference,
            "seed": self._seed,
            "accumulation": "float64",
        }

    def update(self, features: Features, indices: Tensor) -> None:
        self.features.append(features.features)
        self.indices.append(indices)

    def images_features(self) -> tuple[Tensor, list[int]]:
        """Features ``[N, D]`` of the images, sorted by index, and the indices.

        Raises ValueError if an image was counted twice.
        """
        indices, order = torch.sort(dim_zero_cat(self.indices))
        if len(indices.unique()) < len(indices):
            raise ValueError("an image was counted twice")
        return dim_zero_cat(self.features)[order].cpu(), indices.tolist()

    def reference_features(self) -> Tensor:
        """Features ``[M, D]`` kept in the reference, read anew."""
        features = self._kept().read()
        if features.shape[1:] != (self.network.dimensions,):
            raise CorruptFile(
                f"reference {self._reference}: wanted features of {self.network.dimensions} "
                f"dimensions, got {tuple(features.shape[1:])}; make the reference again"
            )
        return features

    def _kept(self) -> KeptFeatures:
        if self.reference.kept is None:
            raise ConfigError(f"{self.name}: reference {self._reference!r} holds no features")
        return self.reference.kept

    def _command(self, needed: int) -> str:
        """The command line that makes the reference with enough features."""
        source = self.reference.source
        own = "images" in source and self._reference not in PACKAGED
        words = ["iec-eval", "reference", str(source.get("images", "IMAGES"))]
        words += [self._reference if own else "OUT"]
        given = {
            "features": self._features,
            "weights": self._weights,
            **source.get("preparation", {}),
            "count": source.get("count") if own else None,
            "keep-features": needed,
        }
        flags = [word for key, value in given.items() if value for word in (f"--{key}", str(value))]
        return shlex.join([*words, *flags])
