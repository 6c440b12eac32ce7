"""What a metric is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torchmetrics
from pydantic import Field
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from iec_eval.errors import complaints
from iec_eval.intervals import Estimate
from iec_eval.metrics.features import FeatureNetwork, feature_network
from iec_eval.options import BaseOptions

if TYPE_CHECKING:
    from iec_eval.models.base import DiffusionModel


class Metric(torchmetrics.Metric):
    """Reads the images of a run, in any order and any batches, and gives named numbers.

    A metric is one class with a ``name``, an ``Options`` class, :meth:`update` and :meth:`compute`:

        class Confidence(Metric):
            name = "confidence"

            def __init__(self, options):
                super().__init__(options)
                self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
                self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")
            ...

    States are declared with the reductions "sum" or "cat", so that the metrics of two halves
    merge into that of the whole. Whoever lists things per image keeps their indices too and sorts
    by them. Construction reads configuration only; files are opened by :meth:`prepare`.

    Every number gets a confidence interval: from the influence values that :meth:`estimates` may
    give, else by computing it without one group of images after the other. A number whose name has
    the word ``std`` measures noise itself and gets none.

    Attributes:
        name: what studies call it.
        higher_is_better: whether a larger result is a better one, for every number it gives but
            spreads; results.json keeps it by the number's name. None: there is no better
            direction, unless the name is that of a known metric.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    full_state_update: bool | None = False

    def __init__(self, options: BaseOptions) -> None:
        # one process scores all images, from files: it must not wait for the others
        super().__init__(sync_on_compute=False)
        self.options = options

    @property
    def network(self) -> FeatureNetwork | None:
        """The network whose features :meth:`update` wants; None if it wants the images."""
        return None

    def bind(self, model: DiffusionModel) -> None:
        """Told once, before :meth:`prepare`, whose images will be scored.

        For metrics that read captions or must know the images' shape. Raises Incompatible if the
        metric means nothing for this model.
        """

    def prepare(self, count: int) -> None:
        """Cheap checks before ``count`` images are made: files, protocols, numbers.

        Raises ConfigError, Incompatible or CorruptFile.
        """

    def missing(self) -> list[str]:
        """What must be had before :meth:`prepare` can succeed, one line each."""
        return []

    def protocol(self) -> dict[str, Any]:
        """Everything a number depends on besides the images, as JSON values."""
        return {}

    @abstractmethod
    def update(self, features: Any, indices: Tensor) -> None:
        """Take in a batch.

        ``features`` are the :class:`Features` of :attr:`network`, or the uint8 images
        ``[B, C, H, W]`` of a metric without one; ``indices [B]`` say which images they are.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers, by the name they have in tables."""

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        """The numbers with their influence values, and numbers that take a second look.

        Called after the last :meth:`update`. ``again`` goes over what the updates got, batch by
        batch, whenever it is iterated, so nothing of the size of all images need be kept. By
        default what :meth:`compute` gives, without influence values.
        """
        return {name: Estimate(value) for name, value in self.compute().items()}


@dataclass(frozen=True)
class Pairs:
    """B images of a row, each with the full-precision row's image of the same index.

    ``images`` and ``reference`` are uint8 ``[B, C, H, W]``.
    """

    images: Tensor
    reference: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Tensor) -> Pairs:
        return Pairs(self.images[rows], self.reference[rows])


class PairedMetric(Metric):
    """Compares a row, image by image, with the full-precision row of its study.

    That row starts from the same noise under the same conditions. It is the first without
    efficiency methods and callbacks, controls first; it gets no value itself, and a study without
    one is refused. :meth:`update` gets :class:`Pairs`.

    Attributes:
        reference_row: name of the row compared with, set when a study is planned.
        reference_digest: of what decides its images but for the seed, set there too; rows that are
            called alike may have other steps.
    """

    reference_row: str | None = None
    reference_digest: str | None = None

    def protocol(self) -> dict[str, Any]:
        return {"reference": self.reference_row, "reference_digest": self.reference_digest}

    @abstractmethod
    def update(self, pairs: Pairs, indices: Tensor) -> None:
        """Take in a batch of pairs; ``indices [B]`` say which images they are."""


class PerImageMetric(Metric):
    """A metric that gives every image a number of its own; its result is their mean.

    The numbers are kept with their indices, so that rows can be compared image by image.
    """

    values: list[Tensor]
    indices: list[Tensor]

    def __init__(self, options: BaseOptions) -> None:
        super().__init__(options)
        self.add_state("values", [], "cat")
        self.add_state("indices", [], "cat")

    @property
    def result_name(self) -> str:
        """The result as it appears in tables."""
        return self.name

    def keep(self, values: Tensor, indices: Tensor) -> None:
        """Remember ``values [B]`` of the images ``indices [B]``."""
        self.values.append(values.double().cpu())
        self.indices.append(indices)

    def per_image(self) -> Tensor:
        """The numbers, float64 ``[N]``, in the order of the images' indices.

        Raises ValueError if an image was counted twice.
        """
        indices = dim_zero_cat(self.indices)
        if len(indices.unique()) < len(indices):
            raise ValueError("an image was counted twice")
        ordered: Tensor = dim_zero_cat(self.values)[torch.argsort(indices)]
        return ordered

    def compute(self) -> dict[str, float]:
        return {self.result_name: float(self.per_image().mean())}

    def estimates(self, again: Iterable[tuple[Any, Tensor]]) -> dict[str, Estimate]:
        values = self.per_image()
        mean = Estimate(float(values.mean()), values - values.mean())
        return {**super().estimates(again), self.result_name: mean}


class FeatureOptions(BaseOptions):
    """Options of every metric that reads features."""

    features: str = Field(
        "inception", description="inception, a packaged network (fashion-mnist) or a folder"
    )
    weights: str | None = Field(
        None, description="InceptionV3's weights file; null: where torch-fidelity keeps it"
    )


class FeatureMetric(Metric):
    """A metric on the features of the network that its options name."""

    Options: ClassVar[type[BaseOptions]] = FeatureOptions

    def __init__(self, options: FeatureOptions) -> None:
        super().__init__(options)
        self._network = feature_network(options.features, options.weights)

    @property
    def network(self) -> FeatureNetwork:
        return self._network

    def missing(self) -> list[str]:
        return complaints(self._network.identity)

    def prepare(self, count: int) -> None:
        self._network.identity()

    def protocol(self) -> dict[str, Any]:
        return {"features": self._network.identity()}

    def result(self, name: str) -> str:
        """``name`` as it appears in tables: with the network's tag, if it has one."""
        return f"{name}-{self._network.tag}" if self._network.tag else name
