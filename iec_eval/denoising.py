"""The one denoising loop. Sampling, calibration and analysis all go through :func:`denoise`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.noise import Draw, Noise

if TYPE_CHECKING:
    from iec_eval.callbacks.base import DenoisingCallback
    from iec_eval.samplers.base import Sampler, State


@dataclass(frozen=True)
class Condition:
    """What the network is told beside the sample, as a function of the image index.

    ``inputs`` are keyword arguments of the network, each ``[B, ...]``. With ``scale`` other than 1
    the prediction is guided (Ho & Salimans 2022, classifier-free guidance):
    ``e_u + scale (e_c - e_u)``, with ``unconditional`` inputs for e_u, in one doubled batch.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    unconditional: Mapping[str, Tensor] | None = None
    scale: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether the network runs a doubled batch."""
        return self.unconditional is not None and self.scale != 1.0

    def to(self, device: torch.device) -> Condition:
        """The same condition on ``device``."""
        move = {name: value.to(device) for name, value in self.inputs.items()}
        if self.unconditional is None:
            return Condition(move, None, self.scale)
        other = {name: value.to(device) for name, value in self.unconditional.items()}
        return Condition(move, other, self.scale)


class Denoiser:
    """A network with its condition and clock: the guided prediction for a batch of images.

    Evaluations are counted per image, also under guidance: a guided evaluation is one, of twice
    the cost.
    """

    def __init__(self, network: nn.Module, condition: Condition, clock: Clock) -> None:
        self.network, self.condition, self.clock = network, condition, clock

    def __call__(self, sample: Tensor, timestep: float, *, rows: Tensor | None = None) -> Tensor:
        """Predict for ``sample [b, C, H, W]``, the batch's images ``rows`` (None: all of them)."""
        if self.condition.guided:
            return self._guided(sample, timestep, rows)
        return self._run(sample, timestep, _select(self.condition.inputs, rows), rows, len(sample))

    def _guided(self, sample: Tensor, timestep: float, rows: Tensor | None) -> Tensor:
        assert self.condition.unconditional is not None
        half = _select(self.condition.inputs, rows)
        other = _select(self.condition.unconditional, rows)
        inputs = {name: torch.cat([other[name], half[name]]) for name in half}
        images = len(next(iter(self.condition.inputs.values())))
        doubled = None if rows is None else torch.cat([rows, rows + images])
        output = self._run(torch.cat([sample, sample]), timestep, inputs, doubled, len(sample))
        unconditional, conditional = output.chunk(2)
        return unconditional + self.condition.scale * (conditional - unconditional)

    def _run(
        self,
        sample: Tensor,
        timestep: float,
        inputs: Mapping[str, Tensor],
        rows: Tensor | None,
        images: int,
    ) -> Tensor:
        clock = self.clock
        clock.rows = rows
        if rows is None:
            clock.batch = len(sample)
        if clock.full:
            clock.evaluations.full += images
        else:
            clock.evaluations.cached += images
        when = torch.full((len(sample),), timestep, device=sample.device)
        output = self.network(sample, when, **inputs)
        return output if isinstance(output, Tensor) else output[0]


class Step:
    """One step of the trajectory, as a callback sees it.

    Attributes:
        index: position in sampling order, 0 is the noisiest.
        total: number of steps.
        timestep: what the network is told at this step.
        sample: ``[B, C, H, W]``, the state before the step.
        images: indices of the batch's images.
        full: whether this step's evaluations run the whole network.
        draw: the noise the sampler will add; shared by every preview.
        caches: whether some steps of the run do not run the whole network.
    """

    def __init__(
        self, index: int, state: State, sampler: Sampler, denoiser: Denoiser, noise: Noise
    ) -> None:
        self._state, self._sampler, self._denoiser, self._noise = state, sampler, denoiser, noise
        self.index, self.total = index, len(sampler.timesteps)
        self.images = noise.images
        self.full = denoiser.clock.is_full(index)
        self.draw: Draw = noise.draw(index)
        self._evaluations = 0
        self.caches = len(denoiser.clock.full_steps) < denoiser.clock.total

    def begin(self) -> Tensor:
        """The sampler's prediction for this step, which callbacks refine."""
        self._state, prediction = self._sampler.evaluate(self._state, self)
        return prediction

    def finish(self, prediction: Tensor) -> State:
        """The state after the step, taken with ``prediction``."""
        return self._sampler.step(self._state, self.index, prediction, self.draw)

    @property
    def timestep(self) -> float:
        return self._sampler.timesteps[self.index]

    @property
    def sample(self) -> Tensor:
        return self._state.sample

    @property
    def last(self) -> bool:
        """Whether the next state is the finished image."""
        return self.index == self.total - 1

    def predict(
        self,
        sample: Tensor,
        *,
        rows: Tensor | None = None,
        timestep: Literal["same", "next"] = "same",
        full: bool | None = None,
        store: bool = True,
    ) -> Tensor:
        """Evaluate the (guided) network at ``sample [b, C, H, W]``.

        Args:
            sample: where to evaluate; may differ from ``self.sample``.
            rows: positions in the batch that ``sample`` belongs to; None for the whole batch.
            timestep: this step's timestep or the next one's (not at the last step).
            full: run the whole network or the cheap path; None follows the method's schedule.
            store: whether a full evaluation may refresh what a cache holds.
        """
        at = self.index + (timestep == "next")
        clock = self._denoiser.clock
        clock.step, clock.evaluation = self.index, self._evaluations
        clock.full, clock.store = self.full if full is None else full, store
        self._evaluations += 1
        shown = self._sampler.network_input(self._state, at, sample)
        return self._denoiser(shown, self._sampler.timesteps[at], rows=rows)

    def preview(self, prediction: Tensor) -> Tensor:
        """The sample the sampler would take with ``prediction``; commits nothing."""
        return self.finish(prediction).sample

    def fresh_draw(self) -> Draw:
        """Noise of this step that no earlier evaluation has used."""
        return self._noise.draw(self.index, self._evaluations)


def denoise(
    sampler: Sampler,
    denoiser: Denoiser,
    noise: Noise,
    callbacks: Sequence[DenoisingCallback] = (),
    *,
    between_steps: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the sampler from pure noise to the final latents ``[B, C, H, W]``.

    ``between_steps(done)`` is called after each step, for progress and interruption.
    """
    state = sampler.start(noise.initial())
    for index in range(len(sampler.timesteps)):
        step = Step(index, state, sampler, denoiser, noise)
        prediction = step.begin()
        for callback in callbacks:
            prediction = callback.refine(step, prediction)
        state = step.finish(prediction)
        if between_steps is not None:
            between_steps(index + 1)
    return state.sample


def _select(inputs: Mapping[str, Tensor], rows: Tensor | None) -> Mapping[str, Tensor]:
    if rows is None:
        return inputs
    return {name: value[rows] for name, value in inputs.items()}
