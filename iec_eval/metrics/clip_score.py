"""CLIP score (Hessel et al. 2021): how well an image shows what its caption says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics.functional import cosine_similarity

from iec_eval.errors import Incompatible, complaints
from iec_eval.metrics.base import PerImageMetric
from iec_eval.metrics.clip import ClipNetwork
from iec_eval.metrics.features import Features
from iec_eval.options import BaseOptions

if TYPE_CHECKING:
    from iec_eval.models.base import DiffusionModel


class ClipScoreOptions(BaseOptions):
    """Options of CLIP score."""

    model: str = Field(
        min_length=1,
        description="a transformers CLIP: a folder, or hub:owner/name[@revision] to download one",
    )


class ClipScore(PerImageMetric):
    """``100 max(cos(image, caption), 0)`` of CLIP's embeddings, mean of images (eq. 1, w = 100).

    The result is called ``clip-score-<model>-<first eight hex digits of the weights' sha256>``:
    scores of different CLIPs cannot be compared. Captions longer than the model reads are cut,
    and how many is part of the protocol. Scores are cut at zero image by image, as in the paper;
    torchmetrics cuts their mean, which differs only where some are negative.
    """

    name = "clip-score"
    Options = ClipScoreOptions
    higher_is_better = True

    def __init__(self, options: ClipScoreOptions) -> None:
        super().__init__(options)
        self._network = ClipNetwork(options.model)
        self._model: DiffusionModel | None = None
        self._count = 0
        self._cut: int | None = None
        self._texts: dict[str, Tensor] = {}

    @property
    def network(self) -> ClipNetwork:
        return self._network

    @property
    def result_name(self) -> str:
        model = self._network.tag.removeprefix("clip-")
        return f"{self.name}-{model}-{self._network.weights_hash[:8]}"

    def bind(self, model: DiffusionModel) -> None:
        if model.captions([0]) is None:
            raise Incompatible(
                f"clip-score: model {model.name!r} has no captions to compare its images with; "
                "remove clip-score, or use a model that draws from text"
            )
        self._model = model

    def missing(self) -> list[str]:
        return complaints(lambda: self._network.folder)

    def prepare(self, count: int) -> None:
        self._count, self._cut = count, None
        self._network.identity()
        _ = self._network.token_limit

    def protocol(self) -> dict[str, Any]:
        return {
            "features": self._network.identity(),
            "tokenizer": self._network.tokenizer_hash,
            "token_limit": self._network.token_limit,
            "truncated_captions": self.truncated(),
            "scale": 100,
        }

    def truncated(self) -> int:
        """How many of the images' captions are longer than the model reads."""
        if self._cut is None:
            self._cut = sum(self._network.too_long(self._captions(range(self._count))))
        return self._cut

    def update(self, features: Features, indices: Tensor) -> None:
        captions = self._captions(indices.tolist())
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if new:
            self._tell_truncated()
            self._texts.update(zip(new, self._network.embed_texts(new), strict=True))
        texts = torch.stack([self._texts[caption] for caption in captions])
        cosines = cosine_similarity(features.features.double(), texts.double(), reduction="none")
        self.keep(100 * cosines.clamp(min=0), indices)

    def _captions(self, images: Sequence[int]) -> list[str]:
        captions = None if self._model is None else self._model.captions(images)
        if captions is None:
            raise Incompatible("clip-score: not bound to a model with captions")
        return captions

    def _tell_truncated(self) -> None:
        if not self._texts and self.truncated():
            limit = self._network.token_limit
            print(
                f"iec-eval: clip-score: {self.truncated()} of {self._count} captions have more "
                f"than the {limit} tokens that {self._network.spec} reads; their ends are left out",
                file=sys.stderr,
            )
