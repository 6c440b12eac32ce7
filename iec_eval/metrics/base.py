"""What a metric is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torchmetrics
from pydantic import Field
from torch import Tensor

from iec_eval.metrics.features import FeatureNetwork, feature_network
from iec_eval.options import BaseOptions


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

    Attributes:
        name: what studies call it.
        higher_is_better: whether a larger result is a better one.
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

    def prepare(self, count: int) -> None:
        """Cheap checks before ``count`` images are made: files, protocols, numbers.

        Raises ConfigError, Incompatible or CorruptFile.
        """

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

    def prepare(self, count: int) -> None:
        self._network.identity()

    def protocol(self) -> dict[str, Any]:
        return {"features": self._network.identity()}

    def result(self, name: str) -> str:
        """``name`` as it appears in tables: with the network's tag, if it has one."""
        return f"{name}-{self._network.tag}" if self._network.tag else name
