"""What a denoising callback is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from lightning.pytorch import Callback
from torch import Tensor

from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.fingerprints import ReadsFiles
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler

if TYPE_CHECKING:
    from iec_eval.calibration import Bench


class DenoisingCallback(ReadsFiles, Callback):
    """Sees every prediction before the sampler does, and may refine it.

    It is a Lightning callback too, so it may also follow the run as a whole. Attributes:

        name: what studies call it.
        version: raise it when the same options would give other images than before.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    version: ClassVar[int] = 1

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

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate` must run before :meth:`refine`, with these options."""
        return type(self).calibrate is not DenoisingCallback.calibrate

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """Measure what :meth:`refine` needs, on the network as it is deployed.

        All efficiency methods are applied to the bench's network, and the callbacks before this
        one take part in its trajectories. Returns named tensors, which are saved.
        """
        return {}

    def use(self, artifact: Mapping[str, Tensor]) -> None:
        """Take what :meth:`calibrate` has measured; called before any image is made.

        What a run would cost is counted without it: until then :meth:`refine` spends as many
        evaluations as it will, and of its numbers nothing is read.
        """

    @property
    def evaluates(self) -> bool:
        """Whether it may make the steps' own evaluations; a run has room for one that does."""
        return type(self).evaluate is not DenoisingCallback.evaluate

    def evaluate(self, step: Step) -> Tensor | None:
        """Make the step's own evaluation in another way than ``step.predict(step.sample)``.

        Called where the sampler wants the network's prediction ``[B, C, H, W]`` at
        ``step.sample``, before any callback refines it; None leaves it to the step.
        """
        return None

    @abstractmethod
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        """The prediction ``[B, C, H, W]`` to use instead; return it unchanged to only observe.

        Nothing may be reduced over the batch: an image must not depend on its neighbours.
        """
