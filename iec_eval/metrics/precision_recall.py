"""Precision and recall of sets of features (Kynkäänniemi et al. 2019, eq. 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from iec_eval.intervals import FEWEST, GROUPS, Estimate, groups_of
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

        fake, real, _ = self._compared()
        found = prc_features_to_metric(
            fake,
            real,
            prc_neighborhood=self._neighbours,
            prc_batch_size=BLOCK,
            save_cpu_ram=True,
            verbose=False,
        )
        return {self.result(name): float(found[name]) for name in ("precision", "recall")}

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        """Precision, a mean over images, with influence values; recall without groups of images.

        Recall is a step function of the images' weights, which has no derivative. Its groups are
        those of the images that are compared: others would take the place of those left out. Where
        fewer than :data:`~iec_eval.intervals.FEWEST` are compared, neither tells how sure it is.
        """
        found = super().estimates(again)
        fake, real, chosen = self._compared()
        count = sum(len(part) for part in self.indices)
        inside = covered(fake, real, radii(real, self._neighbours)).double()
        influence = torch.zeros(count, dtype=torch.float64)
        influence[chosen] = (inside - inside.mean()) * (count / len(fake))
        precision, recall = self.result("precision"), self.result("recall")
        if len(fake) < FEWEST:  # so few values are no interval, of whatever number of images
            return {name: found[name].unsure() for name in (precision, recall)}
        found[precision] = replace(found[precision], influence=influence)
        if len(fake) * (GROUPS - 1) > GROUPS * self._neighbours * 2:
            without = recall_without(fake, real, groups_of(chosen), self._neighbours)
            found[recall] = replace(found[recall], without=without)
        return found

    def _compared(self) -> tuple[Tensor, Tensor, list[int]]:
        """Features ``[S, D]`` compared, the images' and the reference's, float64.

        And the images' positions among all images, in the order of their indices.
        """
        fake, indices = self.images_features()
        real = self.reference_features()
        chosen = shuffled(indices, self._seed)[: self._samples]
        some_real = shuffled(range(len(real)), self._seed)[: self._samples]
        return fake[chosen].double(), real[some_real].double(), chosen


def radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance ``[S]`` of each of ``features [S, D]`` to its k-th nearest other one."""
    found = [
        torch.cdist(part, features).kthvalue(neighbours + 1).values
        for part in features.split(BLOCK)
    ]
    return torch.cat(found)


def covered(features: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """Which of ``features [S, D]`` are in a ball around one of ``centres [T, D]``, bool ``[S]``."""
    parts = features.split(BLOCK)
    return torch.cat([(torch.cdist(part, centres) <= reach).any(dim=1) for part in parts])


def recall_without(fake: Tensor, real: Tensor, group: Tensor, neighbours: int) -> Tensor:
    """Recall, float64 ``[G]``, without the images of each group; ``group [S]`` is that of each."""
    reach = torch.empty(GROUPS, len(fake), dtype=fake.dtype)
    for rows in torch.arange(len(fake)).split(BLOCK):
        distances = torch.cdist(fake[rows], fake)
        for left_out in range(GROUPS):
            others = distances.masked_fill(group == left_out, torch.inf)
            reach[left_out, rows] = others.kthvalue(neighbours + 1).values
    # a centre that is left out covers nothing (its own distance is masked with its group's)
    reach[group, torch.arange(len(fake))] = -1.0
    counts = torch.zeros(GROUPS, dtype=torch.float64)
    for part in real.split(BLOCK):
        distances = torch.cdist(part, fake)
        counts += torch.stack([(distances <= one).any(dim=1).sum() for one in reach])
    return counts / len(real)
