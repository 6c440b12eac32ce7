"""Inception Score (Salimans et al. 2016, section 4) with splits that do not depend on chance."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.image import inception
from torchmetrics.utilities import dim_zero_cat

from iec_eval.errors import ConfigError
from iec_eval.intervals import Estimate
from iec_eval.metrics.base import FeatureMetric, FeatureOptions
from iec_eval.metrics.features import Features


class InceptionScoreOptions(FeatureOptions):
    """Options of Inception Score."""

    splits: int = Field(10, ge=1, description="parts to score one by one and average")
    seed: int = Field(0, ge=0, description="which images share a part")


class InceptionScore(FeatureMetric):
    """``exp E_x KL(p(y|x) || p(y))``, mean and standard deviation over the splits.

    The results are called ``is`` and ``is-std``, for any network but InceptionV3 ``is-<tag>`` and
    ``is-std-<tag>``. The deviation is that of the population (0 for one split), as in the
    original code.
    """

    name = "is"
    Options = InceptionScoreOptions
    higher_is_better = True
    logits: list[Tensor]
    indices: list[Tensor]

    def __init__(self, options: InceptionScoreOptions) -> None:
        super().__init__(options)
        self._splits, self._seed = options.splits, options.seed
        self.add_state("logits", [], "cat")
        self.add_state("indices", [], "cat")

    def prepare(self, count: int) -> None:
        super().prepare(count)
        if count < self._splits:
            raise ConfigError(
                f"is: {count} images in {self._splits} splits leaves some empty; "
                "use more images or fewer splits"
            )

    def protocol(self) -> dict[str, Any]:
        rule = {"count": self._splits, "seed": self._seed, "rule": "ranks of blake2b(seed:index)"}
        return {**super().protocol(), "splits": rule, "accumulation": "float64"}

    def update(self, features: Features, indices: Tensor) -> None:
        self.logits.append(features.logits)
        self.indices.append(indices)

    def compute(self) -> dict[str, float]:
        logits, shuffle = self._shuffled()
        parts = split_evenly(logits[shuffle].double(), self._splits)
        scores = torch.tensor([inception_score(part) for part in parts], dtype=torch.float64)
        return {
            self.result("is"): float(scores.mean()),
            self.result("is-std"): float(scores.std(correction=0)),
        }

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        logits, shuffle = self._shuffled()
        parts = split_evenly(logits[shuffle].double(), self._splits)
        influence = torch.empty(len(logits), dtype=torch.float64)
        shares = [len(logits) / (self._splits * len(part)) for part in parts]
        influence[shuffle] = torch.cat(
            [share * score_influence(part) for share, part in zip(shares, parts, strict=True)]
        )
        found, name = super().estimates(again), self.result("is")
        return {**found, name: replace(found[name], influence=influence)}

    def _shuffled(self) -> tuple[Tensor, list[int]]:
        """The logits in the order of their indices, and the order in which they are split."""
        indices, order = torch.sort(dim_zero_cat(self.indices))
        return dim_zero_cat(self.logits)[order], shuffled(indices.tolist(), self._seed)


def inception_score(logits: Tensor) -> float:
    """Inception Score of ``logits [N, K]`` as one split; torchmetrics computes it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # on memory, and on the deviation of one split
        torch.manual_seed(0)  # it shuffles: changes the order of a sum, not what is summed
        metric = inception.InceptionScore(feature=nn.Identity(), splits=1)
        metric.update(logits)
        mean, _ = inception.InceptionScore.compute(metric)
    return float(mean)


def score_influence(logits: Tensor) -> Tensor:
    """Influence ``[N]`` of each image on the Inception Score of ``logits [N, K]`` as one split.

    log IS = mean_i KL(p_i || p) has the derivative KL(p_i || p) - log IS with respect to the
    weight of image i: what p changes by adds nothing, as it is at its best for the mean.
    """
    log_p = logits.log_softmax(dim=1)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(logits))
    divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
    log_score = divergence.mean()
    return log_score.exp() * (divergence - log_score)


def split_evenly(rows: Tensor, parts: int) -> list[Tensor]:
    """``rows [N, ...]`` cut at i N / parts, rounded down, as torch-fidelity cuts them."""
    cuts = [part * len(rows) // parts for part in range(parts + 1)]
    return [rows[start:stop] for start, stop in pairwise(cuts)]


def shuffled(indices: Sequence[int], seed: int) -> list[int]:
    """Positions of ``indices`` in an order that depends on the seed and the indices alone.

    Raises ValueError if an index comes twice.
    """
    if len(set(indices)) < len(indices):
        raise ValueError("an image was counted twice")
    return sorted(range(len(indices)), key=lambda position: _rank(indices[position], seed))


def _rank(index: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()
