"""What a denoising callback is."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from lightning.pytorch import Callback
from torch import Tensor

from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler


class DenoisingCallback(Callback):
    """Sees every prediction before the sampler does, and may refine it.

    It is a Lightning callback too, so it may also follow the run as a whole. Attributes:

        name: what studies call it.
        breaks_with_clipping: whether its mathematics assume a sampler that does not clip.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    breaks_with_clipping: ClassVar[bool] = False

    def __init__(self, options: BaseOptions) -> None:
        self.options = options

    @property
    def depends_on_batch(self) -> bool:
        """Whether the options make an image depend on its neighbours in the batch."""
        return False

    def check(self, sampler: Sampler, clock: Clock) -> None:
        """Raise Incompatible or ConfigError if the options do not fit this run.

        Called once, before anything expensive.
        """

    @abstractmethod
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        """The prediction ``[B, C, H, W]`` to use instead; return it unchanged to only observe.

        Nothing may be reduced over the batch: an image must not depend on its neighbours.
        """
