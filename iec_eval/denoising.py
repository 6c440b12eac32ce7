"""The one denoising loop. Sampling, calibration and analysis all go through :func:`denoise`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.errors import Incompatible
from iec_eval.noise import Draw, Noise

if TYPE_CHECKING:
    from iec_eval.callbacks.base import DenoisingCallback
    from iec_eval.samplers.base import Sampler, State
    from iec_eval.schedule import NoiseSchedule

Timestep = float | Tensor  # one for all rows of an evaluation, or ``[b]``


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

    def __call__(self, sample: Tensor, timestep: Timestep, *, rows: Tensor | None = None) -> Tensor:
        """Predict for ``sample [b, C, H, W]``, the batch's images ``rows`` (None: all of them)."""
        if self.condition.guided:
            return self._guided(sample, timestep, rows)
        return self._run(sample, timestep, _select(self.condition.inputs, rows), rows, len(sample))

    def _guided(self, sample: Tensor, timestep: Timestep, rows: Tensor | None) -> Tensor:
        assert self.condition.unconditional is not None
        half = _select(self.condition.inputs, rows)
        other = _select(self.condition.unconditional, rows)
        inputs = {name: torch.cat([other[name], half[name]]) for name in half}
        images = len(next(iter(self.condition.inputs.values())))
        doubled = None if rows is None else torch.cat([rows, rows + images])
        when = torch.cat([timestep, timestep]) if isinstance(timestep, Tensor) else timestep
        output = self._run(torch.cat([sample, sample]), when, inputs, doubled, len(sample))
        unconditional, conditional = output.chunk(2)
        return unconditional + self.condition.scale * (conditional - unconditional)

    def _run(
        self,
        sample: Tensor,
        timestep: Timestep,
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
        if isinstance(timestep, Tensor):
            when = timestep.to(sample.device)
        else:
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
        self,
        index: int,
        state: State,
        sampler: Sampler,
        denoiser: Denoiser,
        noise: Noise,
        evaluator: DenoisingCallback | None = None,
    ) -> None:
        self._state, self._sampler, self._denoiser, self._noise = state, sampler, denoiser, noise
        self.index, self.total = index, len(sampler.timesteps)
        self.images = noise.images
        self.full = denoiser.clock.is_full(index)
        self.draw: Draw = noise.draw(index)
        self._evaluations, self._evaluator, self._evaluated = 0, evaluator, False
        self.caches = len(denoiser.clock.full_steps) < denoiser.clock.total

    def begin(self) -> Tensor:
        """The sampler's prediction for this step, which callbacks refine.

        Raises Incompatible if a callback makes the steps' evaluations and the sampler does not
        ask for them with :meth:`evaluate`.
        """
        self._state, prediction = self._sampler.evaluate(self._state, self)
        if self._evaluator is not None and not self._evaluated:
            raise Incompatible(
                f"sampler {self._sampler.name} makes its own evaluations, so "
                f"{self._evaluator.name} has no effect; let it call step.evaluate()"
            )
        return prediction

    def evaluate(self) -> Tensor:
        """The network's prediction at the step's sample, for samplers to ask for once a step.

        A callback may make it in its own way (:meth:`DenoisingCallback.evaluate`).
        """
        self._evaluated = True
        made = None if self._evaluator is None else self._evaluator.evaluate(self)
        return self.predict(self.sample) if made is None else made

    def finish(self, prediction: Tensor) -> State:
        """The state after the step, taken with ``prediction``."""
        return self._sampler.step(self._state, self.index, prediction, self.draw)

    @property
    def timestep(self) -> float:
        return self._sampler.timesteps[self.index]

    @property
    def schedule(self) -> NoiseSchedule:
        """The forward process of the model."""
        return self._sampler.schedule

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
        timestep: Literal["same", "next"] | Tensor = "same",
        level: Literal["same", "next"] = "same",
        full: bool | None = None,
        store: bool = True,
    ) -> Tensor:
        """Evaluate the (guided) network at ``sample [b, C, H, W]``.

        Args:
            sample: where to evaluate; may differ from ``self.sample``.
            rows: positions in the batch that ``sample`` belongs to; None for the whole batch.
            timestep: this step's timestep, the next one's (not at the last step), or ``[b]``, one
                for each row, which only the network sees: quantizers and caches stay at the step.
            level: how noisy ``sample`` is: as before this step, or ``next``, as the step leaves it,
                which a preview is. Samplers that scale the network's input scale it by this.
            full: run the whole network or the cheap path; None follows the method's schedule.
            store: whether a full evaluation may refresh what a cache holds.
        """
        told = self.index + (isinstance(timestep, str) and timestep == "next")
        when = timestep if isinstance(timestep, Tensor) else self._sampler.timesteps[told]
        clock = self._denoiser.clock
        clock.step, clock.evaluation = self.index, self._evaluations
        clock.full, clock.store = self.full if full is None else full, store
        self._evaluations += 1
        return self._denoiser(self.shown(sample, level=level), when, rows=rows)

    def shown(self, sample: Tensor, *, level: Literal["same", "next"] = "same") -> Tensor:
        """``sample`` as the network sees it: scaled for its noise ``level``, with some samplers."""
        at = self.index + (level == "next")
        return self._sampler.network_input(self._state, at, sample)

    def preview(self, prediction: Tensor) -> Tensor:
        """The sample the sampler would take with ``prediction``; commits nothing."""
        return self.finish(prediction).sample

    def move(self, sample: Tensor, prediction: Tensor) -> Tensor:
        """The same from another ``sample``, with the solver's memory as it is."""
        state = replace(self._state, sample=sample)
        return self._sampler.step(state, self.index, prediction, self.draw).sample

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

    Raises Incompatible if two callbacks want to make the steps' own evaluations.
    """
    evaluator = evaluator_of(callbacks)
    state = sampler.start(noise.initial())
    for index in range(len(sampler.timesteps)):
        step = Step(index, state, sampler, denoiser, noise, evaluator)
        prediction = step.begin()
        for callback in callbacks:
            prediction = callback.refine(step, prediction)
        state = step.finish(prediction)
        if between_steps is not None:
            between_steps(index + 1)
    return state.sample


def evaluator_of(callbacks: Sequence[DenoisingCallback]) -> DenoisingCallback | None:
    """The one callback that makes the steps' own evaluations, if any does.

    Raises Incompatible if there are several.
    """
    found = [callback for callback in callbacks if callback.evaluates]
    if len(found) > 1:
        names = " and ".join(callback.name for callback in found)
        raise Incompatible(f"{names} each make the steps' own evaluation; a run has room for one")
    return found[0] if found else None


def _select(inputs: Mapping[str, Tensor], rows: Tensor | None) -> Mapping[str, Tensor]:
    if rows is None:
        return inputs
    return {name: value[rows] for name, value in inputs.items()}
