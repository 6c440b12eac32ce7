"""The contract of samplers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, Step
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Draw, Noise
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.testing.checks import (
    IMAGES,
    PREDICTIONS,
    SEED,
    Options,
    build,
    check_declaration,
    ensure,
    ensure_same,
    run_checks,
    same,
)
from iec_eval.testing.tiny import TinyModel
from iec_eval.testing.trajectories import Run, ensure_batch_free, ensure_latents, ensure_repeats


def check_sampler(
    cls: type[Sampler],
    options: Options | None = None,
    *,
    model: DiffusionModel | None = None,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that a sampler is pure and treats every image alike.

    Properties: ``declaration``, ``finite``, ``previews`` (needless ones leave no trace),
    ``purity`` (a step called again gives the same and changes nothing it was given),
    ``second trajectory``, ``fresh instance`` (the loop by hand on a new one), ``batch`` (five
    images together are five alone, up to ``tolerance`` of the largest value).
    """
    case = _SamplerCase(cls, options or {}, model or TinyModel(), tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "finite": case.finite,
        "previews": case.previews,
        "purity": case.purity,
        "second trajectory": case.second_trajectory,
        "fresh instance": case.fresh_instance,
        "batch": case.batch,
    }
    run_checks(cls, checks, skip)


@dataclass(frozen=True)
class _SamplerCase:
    cls: type[Sampler]
    options: Options
    model: DiffusionModel
    tolerance: float

    def declaration(self) -> None:
        check_declaration(self.cls)
        kinds = self.cls.predictions
        ensure(
            bool(kinds) and kinds <= PREDICTIONS,
            f"predictions: wanted some of {', '.join(sorted(PREDICTIONS))}, got {set(kinds)}",
        )
        timesteps = self.run().sampler.timesteps
        ensure(len(timesteps) > 0, "timesteps is empty")
        ensure(
            all(isinstance(t, int | float) and t >= 0 for t in timesteps),
            f"timesteps: wanted numbers from 0, got {list(timesteps)}",
        )

    def finite(self) -> None:
        ensure_latents(self.run().latents(), self.model)

    def previews(self) -> None:
        run = self.run()
        ensure_same(
            run.latents([_NeedlessPreviews(BaseOptions())]),
            run.latents(),
            "needless previews changed the result: step() leaves something behind",
        )

    @torch.inference_mode()
    def purity(self) -> None:
        run = self.run()
        for index, done in reversed(list(enumerate(_steps_by_hand(run)))):
            given = deepcopy((done.state, done.prediction))
            again = run.sampler.step(done.state, index, done.prediction, done.draw)
            ensure(same(again, done.after), f"step {index} called again gives another result")
            shown = [
                run.sampler.network_input(done.state, index, done.state.sample) for _ in range(2)
            ]
            ensure(same(shown[0], shown[1]), f"network_input {index} differs when called again")
            now = (done.state, done.prediction)
            ensure(same(now, given), f"step {index} changed the state or prediction it was given")

    def second_trajectory(self) -> None:
        ensure_repeats(self.run())

    @torch.inference_mode()
    def fresh_instance(self) -> None:
        by_hand = _steps_by_hand(self.run())[-1].after.sample
        ensure_same(
            by_hand, self.run().latents(), "a new instance gives another result than the last one"
        )

    def batch(self) -> None:
        ensure_batch_free(self.run(), [], self.tolerance)

    def run(self) -> Run:
        sampler = build(self.cls, self.options, self.model.schedule)
        return Run(sampler, self.model.load(), Clock(len(sampler.timesteps)), self.model)


class _NeedlessPreviews(DenoisingCallback):
    """Looks at samples that are never taken."""

    name = "needless-previews"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        for factor in (1.0, -2.0, 0.0):
            step.preview(factor * prediction)
        return prediction


@dataclass(frozen=True)
class _Done:
    """A step that was taken: what went in and what came out."""

    state: State
    prediction: Tensor
    draw: Draw
    after: State


def _steps_by_hand(run: Run) -> list[_Done]:
    """The loop without :func:`denoise`, keeping every step."""
    noise = Noise(SEED, IMAGES, run.model.shape)
    denoiser = Denoiser(run.network, run.model.condition(IMAGES), run.clock)
    state, done = run.sampler.start(noise.initial()), list[_Done]()
    for index, timestep in enumerate(run.sampler.timesteps):
        shown = run.sampler.network_input(state, index, state.sample)
        prediction, draw = denoiser(shown, timestep), noise.draw(index)
        after = run.sampler.step(state, index, prediction, draw)
        done.append(_Done(state, prediction, draw, after))
        state = after
    return done
