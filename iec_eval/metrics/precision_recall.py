"""Precision and recall of sets of features (Kynkäänniemi et al. 2019, eq. 1 and 2)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from iec_eval.metrics.feature_sets import FeatureSetMetric, FeatureSetOptions
from iec_eval.metrics.inception_score import shuffled

BLOCK = 1000  # rows of distances in memory at once


class PrecisionRecallOptions(FeatureSetOptions):
    """Options of precision and recall."""

    neighbours: int = Field(3, ge=1, description="k: each ball reaches to the k-th neighbour")
    samples: int = Field(10_000, ge=2, description="features of either side to compare")

    @model_validator(mode="after")
    def _enough_neighbours(self) -> PrecisionRecallOptions:
        if self.neighbours >= self.samples:
            raise ValueError(
                f"wanted fewer neighbours than samples, got {self.neighbours} and {self.samples}"
            )
        return self


class PrecisionRecall(FeatureSetMetric):
    """How many images are among the real ones, and how many real ones among the images.

    Each side covers the balls around its features that reach to their k-th nearest neighbour.
    ``precision`` is the share of images that the reference covers, ``recall`` the share of the
    reference that the images cover; for any network but InceptionV3 they are called
    ``precision-<tag>`` and ``recall-<tag>``. Both depend on how many features are compared, which
    is one number for both sides. Memory grows with that number, not with its square.
    """

    name = "precision-recall"
    Options = PrecisionRecallOptions
    higher_is_better = True

    def __init__(self, options: PrecisionRecallOptions) -> None:
        super().__init__(options)
        self._neighbours, self._samples = options.neighbours, options.samples

    @property
    def needed(self) -> tuple[int, str]:
        return self._samples, "samples"

    def protocol(self) -> dict[str, Any]:
        samples = {"count": self._samples, "rule": "first by blake2b(seed:index)"}
        return {**super().protocol(), "samples": samples, "neighbours": self._neighbours}

    def compute(self) -> dict[str, float]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        fake, indices = self.images_features()
        real = self.reference_features()
        some_fake = shuffled(indices, self._seed)[: self._samples]
        some_real = shuffled(range(len(real)), self._seed)[: self._samples]
        found = prc_features_to_metric(
            fake[some_fake].double(),
            real[some_real].double(),
            prc_neighborhood=self._neighbours,
            prc_batch_size=BLOCK,
            save_cpu_ram=True,
            verbose=False,
        )
        return {self.result(name): float(found[name]) for name in ("precision", "recall")}
