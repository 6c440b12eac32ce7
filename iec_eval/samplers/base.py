"""What a sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from iec_eval.errors import Incompatible
from iec_eval.fingerprints import ReadsFiles
from iec_eval.noise import Draw
from iec_eval.options import BaseOptions
from iec_eval.schedule import NoiseSchedule

if TYPE_CHECKING:
    from iec_eval.denoising import Step


@dataclass(frozen=True)
class State:
    """A point of the trajectory: the noisy sample ``[B, C, H, W]`` and the solver's memory.

    Memory is a value: a step returns a new one and never changes the old.
    """

    sample: Tensor
    memory: Any = None


class Sampler(ReadsFiles, ABC):
    """Turns predictions into samples, one pure step at a time.

    A sampler is one class with a ``name``, an ``Options`` class, ``timesteps`` and :meth:`step`:

        class Halving(Sampler):
            name = "halving"

            class Options(BaseOptions):
                steps: int = Field(10, ge=1, description="timesteps 512, 256, ... that are taken")

            def __init__(self, options, schedule):
                super().__init__(options, schedule)
                self.timesteps = tuple(512 // 2**i for i in range(options.steps))

            def step(self, state, index, prediction, draw): ...

    Attributes:
        name: what studies call it.
        version: raise it when the same options would give other images than before.
        predictions: the kinds of network output it understands; with options that say which one it
            is, that one alone, for callbacks ask it what the run predicts.
        clips: whether its options make it clip the predicted image.
        uncorrectable: why refining its predictions makes no sense; empty: it does.
        timesteps: what the network is told at each step, noisiest first.
        levels: abar of the sample before each step and after the last, where the options make it
            follow the deterministic path of the forward process; empty: it does not, or says not.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    version: ClassVar[int] = 1
    predictions: frozenset[str] = frozenset({"epsilon"})
    clips: bool = False
    uncorrectable: str = ""
    timesteps: Sequence[float]
    levels: Sequence[float] = ()

    def __init__(self, options: BaseOptions, schedule: NoiseSchedule) -> None:
        self.options, self.schedule = options, schedule

    def other_steps(self, number: int) -> Mapping[str, Any]:
        """The options to change for ``number`` steps over the same stretch of noise.

        For rivals that spend a correction's work on more steps. It is ``steps``; a sampler that
        needs more than that overrides this. Raises Incompatible if it has no such option.
        """
        if type(getattr(self.options, "steps", None)) is not int:
            raise Incompatible(f"sampler {self.name!r} has no option called steps")
        return {"steps": number}

    def start(self, noise: Tensor) -> State:
        """The state before the first step, from standard normal ``noise``."""
        return State(noise)

    def network_input(self, state: State, index: int, sample: Tensor) -> Tensor:
        """``sample``, as noisy as before step ``index``, as the network wants to see it.

        ``index`` may be the number of steps: ``sample`` is as free of noise as the finished one.
        """
        return sample

    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        """The prediction for a step, and the state that :meth:`step` is to be given with it.

        One evaluation of the network at the state's sample. A method that needs more for one
        prediction overrides this, and may leave in the state's memory what it found on the way.
        The evaluation at the sample is ``step.evaluate()``, others are ``step.predict(...)``.
        """
        return state, step.evaluate()

    @abstractmethod
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        """The state after step ``index``. Pure: calling it leaves no trace anywhere.

        ``draw.value`` is the step's noise; a deterministic step does not touch it.
        """
