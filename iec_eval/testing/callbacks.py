"""The contract of denoising callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler
from iec_eval.samplers.ddim import DDIM
from iec_eval.schedule import NoiseSchedule
from iec_eval.testing.checks import (
    STEPS,
    Options,
    build,
    check_declaration,
    ensure,
    ensure_same,
    prefix,
    run_checks,
)
from iec_eval.testing.efficiency import ToyCacher
from iec_eval.testing.tiny import TinyModel
from iec_eval.testing.trajectories import Run, ensure_batch_free, ensure_latents, ensure_repeats


def check_callback(
    cls: type[DenoisingCallback],
    options: Options | None = None,
    *,
    neutral: Options | None = None,
    samplers: Sequence[Sampler] | None = None,
    model: DiffusionModel | None = None,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that a callback is a function of the image alone, on every built-in sampler.

    Properties: ``declaration``, ``finite``, ``neutral`` (with the options ``neutral``, bit-equal
    to no callback), ``inputs`` (changes nothing it was given), ``second trajectory``, ``batch``,
    ``cached network`` (works when every other step is cached). ``samplers`` replaces the built-in
    ones.
    """
    chosen = model or TinyModel()
    runs = _builtin_samplers(chosen.schedule) if samplers is None else samplers
    case = _CallbackCase(cls, options or {}, neutral, chosen, runs, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "finite": case.finite,
        "neutral": case.neutral_options,
        "inputs": case.inputs,
        "second trajectory": case.second_trajectory,
        "batch": case.batch,
        "cached network": case.cached_network,
    }
    run_checks(cls, checks, skip)


@dataclass(frozen=True)
class _CallbackCase:
    cls: type[DenoisingCallback]
    options: Options
    neutral: Options | None
    model: DiffusionModel
    samplers: Sequence[Sampler]
    tolerance: float

    def declaration(self) -> None:
        check_declaration(self.cls)

    def finite(self) -> None:
        def check(run: Run) -> None:
            ensure_latents(run.latents([_Guard(self.callback(run))]), self.model)

        self.everywhere(check)

    def neutral_options(self) -> None:
        if self.neutral is not None:
            self.everywhere(self._check_neutral)

    def inputs(self) -> None:
        def check(run: Run) -> None:
            guard = _Guard(self.callback(run))
            run.latents([guard])
            ensure(not guard.changed, f"refine() changed {guard.changed} in place")

        self.everywhere(check)

    def second_trajectory(self) -> None:
        self.everywhere(lambda run: ensure_repeats(run, [self.callback(run)]))

    def batch(self) -> None:
        self.everywhere(lambda run: ensure_batch_free(run, [self.callback(run)], self.tolerance))

    def cached_network(self) -> None:
        def check(run: Run) -> None:
            toy = ToyCacher(BaseOptions())
            run.clock.full_steps = frozenset(toy.full_steps(run.clock.total, {}))
            network = toy.apply(run.network, run.clock, {})
            cached = Run(run.sampler, network, run.clock, self.model)
            callbacks = [self.callback(cached)]
            ensure_latents(cached.latents(callbacks), self.model)
            ensure_repeats(cached, callbacks)

        self.everywhere(check)

    def _check_neutral(self, run: Run) -> None:
        callback = build(self.cls, self.neutral or {})
        callback.check(run.sampler, run.clock)
        ensure_same(
            run.latents([callback]),
            run.latents(),
            f"with {self.neutral} the result differs from that without a callback",
        )

    def callback(self, run: Run) -> DenoisingCallback:
        callback: DenoisingCallback = build(self.cls, self.options)
        callback.check(run.sampler, run.clock)
        return callback

    def everywhere(self, check: Callable[[Run], None]) -> None:
        """``check`` a fresh run on every sampler; failures say on which."""
        for sampler in self.samplers:
            clock = Clock(len(sampler.timesteps))
            with prefix(f"on sampler {sampler.name} {sampler.options.model_dump()}: "):
                check(Run(sampler, self.model.load(), clock, self.model))


class _Guard(DenoisingCallback):
    """Watches another callback: what it changes in place, and the form of what it returns."""

    name = "guard"

    def __init__(self, inner: DenoisingCallback) -> None:
        super().__init__(BaseOptions())
        self._inner, self.changed = inner, ""

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        sample, given = step.sample.clone(), prediction.clone()
        refined = self._inner.refine(step, prediction)
        if not torch.equal(sample, step.sample):
            self.changed = "step.sample"
        if not torch.equal(given, prediction):
            self.changed = "the prediction"
        ensure(
            refined.shape == given.shape and refined.dtype == given.dtype,
            f"refine() gives {refined.dtype} {list(refined.shape)}, wanted {given.dtype} "
            f"{list(given.shape)}",
        )
        return refined


def _builtin_samplers(schedule: NoiseSchedule) -> list[Sampler]:
    from iec_eval.samplers.hooks import iec_eval_samplers

    plain: list[Sampler] = [build(cls, {"steps": STEPS}, schedule) for cls in iec_eval_samplers()]
    special: list[dict[str, Any]] = [{"spacing": "quad"}, {"eta": 1.0}]
    return plain + [build(DDIM, {"steps": STEPS, **more}, schedule) for more in special]
