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
    check_version,
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
    ``purity`` (evaluation and step called again give the same and change nothing they were given;
    an evaluation leaves the sample),
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
        check_version(self.cls)
        sampler = self.run().sampler
        kinds = sampler.predictions
        ensure(
            bool(kinds) and kinds <= PREDICTIONS,
            f"predictions: wanted some of {', '.join(sorted(PREDICTIONS))}, got {set(kinds)}",
        )
        timesteps = sampler.timesteps
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
            _check_step(run, index, done)
            _check_evaluation(run, index, done)

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


def _check_step(run: Run, index: int, done: _Done) -> None:
    given = deepcopy((done.state, done.prediction))
    again = run.sampler.step(done.state, index, done.prediction, done.draw)
    ensure(same(again, done.after), f"step {index} called again gives another result")
    shown = [run.sampler.network_input(done.state, index, done.state.sample) for _ in range(2)]
    ensure(same(shown[0], shown[1]), f"network_input {index} differs when called again")
    after = done.after.sample
    ahead = run.sampler.network_input(done.state, index + 1, after)
    ensure(
        ahead.shape == after.shape and bool(ahead.isfinite().all()),
        f"network_input {index + 1} from the state before step {index} is not finite or has "
        "another shape; corrections look there, after the last step too",
    )
    now = (done.state, done.prediction)
    ensure(same(now, given), f"step {index} changed the state or prediction it was given")


def _check_evaluation(run: Run, index: int, done: _Done) -> None:
    given = deepcopy(done.before)
    state, prediction, _ = _evaluate(run, index, done.before)
    ensure(same(done.before, given), f"evaluate {index} changed the state it was given")
    ensure(
        same((state, prediction), (done.state, done.prediction)),
        f"evaluate {index} called again gives another result",
    )
    ensure(same(state.sample, given.sample), f"evaluate {index} gives a state with another sample")


class _NeedlessPreviews(DenoisingCallback):
    """Looks at samples that are never taken."""

    name = "needless-previews"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        for factor in (1.0, -2.0, 0.0):
            step.preview(factor * prediction)
        return prediction


@dataclass(frozen=True)
class _Done:
    """A step that was taken: what went in, what was evaluated and what came out."""

    before: State
    state: State
    prediction: Tensor
    draw: Draw
    after: State


def _steps_by_hand(run: Run) -> list[_Done]:
    """The loop without :func:`denoise`, keeping every step."""
    before = run.sampler.start(Noise(SEED, IMAGES, run.model.shape).initial())
    done = list[_Done]()
    for index in range(len(run.sampler.timesteps)):
        state, prediction, draw = _evaluate(run, index, before)
        after = run.sampler.step(state, index, prediction, draw)
        done.append(_Done(before, state, prediction, draw, after))
        before = after
    return done


def _evaluate(run: Run, index: int, state: State) -> tuple[State, Tensor, Draw]:
    """The first half of a step, and the noise for the second."""
    denoiser = Denoiser(run.network, run.model.condition(IMAGES), run.clock)
    step = Step(index, state, run.sampler, denoiser, Noise(SEED, IMAGES, run.model.shape))
    return *run.sampler.evaluate(state, step), step.draw
