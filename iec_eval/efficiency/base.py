"""What an efficiency method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.fingerprints import ReadsFiles
from iec_eval.options import BaseOptions

if TYPE_CHECKING:
    from iec_eval.calibration import Bench

Slot = Literal["cacher", "quantizer"]
Artifact = Mapping[str, Tensor]


class EfficiencyMethod(ReadsFiles, ABC):
    """Replaces a network by a cheaper one.

    What a method would cost is shown before it is calibrated: with an empty artifact and the
    network on the meta device, ``apply`` gives a network of the same structure, and
    ``full_steps`` as many steps, as after calibration. No other number is read from it. A module
    of that network may declare ``bits_per_mac``, the product of its operands' bits, and
    ``stored_bytes``, what its tensors take at their bits; others count as they are, at 32 bits.

    A method that caches says in :meth:`full_steps` which steps run the whole network, and its
    network obeys ``clock.full``, never a count of its own calls: evaluations beyond the steps' own
    would shift that. It keeps a feature where ``clock.store`` or ``clock.evaluation == 0``, under
    ``clock.rows`` if these are not None (see :class:`iec_eval.clock.Clock`; a small example is
    ``iec_eval.testing.efficiency.ToyCacher``). It has an option ``interval`` if every N-th step is
    full, at least on average; it says no more than that. Equal-cost rivals of a corrected row are
    given a smaller one.

    Attributes:
        name: what studies call it.
        version: raise it when the same options would give other images than before.
        slot: at most one method of a run may hold each slot; None holds none.
        simulated: True where the arithmetic that is saved on paper is still done in fact.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    version: ClassVar[int] = 1
    slot: ClassVar[Slot | None] = None
    simulated: ClassVar[bool] = False

    def __init__(self, options: BaseOptions) -> None:
        self.options = options

    def parts(self) -> Sequence[EfficiencyMethod]:
        """The stages, in order; a composite returns its own, a plain method itself."""
        return [self]

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate` must run before :meth:`apply`, with these options."""
        return type(self).calibrate is not EfficiencyMethod.calibrate

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """Measure what :meth:`apply` needs, on the network with the earlier parts applied.

        Returns named tensors, which are saved. The bench's network is left as it was.
        """
        return {}

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        """Steps of ``range(total)`` that run the whole network; step 0 must be one."""
        return range(total)

    @abstractmethod
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        """The cheaper network, called as the given one is; it may change the given one.

        Raises Incompatible for a network it cannot handle.
        """


class CompositeMethod(EfficiencyMethod):
    """A method that is nothing but its parts, which are calibrated and applied one by one."""

    @abstractmethod
    def parts(self) -> Sequence[EfficiencyMethod]:
        """The stages, in order of application, none of them a composite."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> NoReturn:
        raise TypeError(f"{self.name} is applied part by part: see parts()")
