"""The contract of denoising callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.efficiency.base import Artifact
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler
from iec_eval.samplers.ddim import DDIM
from iec_eval.schedule import NoiseSchedule
from iec_eval.testing.checks import (
    SEED,
    STEPS,
    Options,
    build,
    check_declaration,
    check_version,
    ensure,
    ensure_same,
    prefix,
    run_checks,
    same,
    saved_and_loaded,
)
from iec_eval.testing.efficiency import ToyCacher
from iec_eval.testing.tiny import TinyModel
from iec_eval.testing.trajectories import Run, ensure_batch_free, ensure_latents, ensure_repeats

CALIBRATED = 4  # images that a callback calibrates on


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

    Properties: ``declaration``, ``calibration`` (repeats bit-equal), ``artifact`` (after saving
    and loading bit-equal), ``expected evaluations`` (as many before it is calibrated as after),
    ``finite``, ``neutral`` (with the options ``neutral``, bit-equal to no callback), ``inputs``
    (changes nothing it was given), ``second trajectory``, ``batch``, ``cached network`` (works
    when every other step is cached). ``samplers`` replaces the built-in ones.
    """
    chosen = model or TinyModel()
    runs = _builtin_samplers(chosen.schedule) if samplers is None else samplers
    case = _CallbackCase(cls, options or {}, neutral, chosen, runs, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "calibration": case.calibration,
        "artifact": case.artifact,
        "expected evaluations": case.expected_evaluations,
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
        check_version(self.cls)

    def calibration(self) -> None:
        def check(run: Run) -> None:
            first, second = self.measured(run), self.measured(run)
            ensure(same([first], [second]), "calibrating again gives another result")

        self.everywhere(check)

    def artifact(self) -> None:
        def check(run: Run) -> None:
            callback, artifact = self.uncalibrated(run), self.measured(run)
            callback.use(artifact)
            direct = run.latents([callback])
            callback.use(saved_and_loaded(artifact))
            ensure_same(
                run.latents([callback]),
                direct,
                "the artifact, saved and loaded, gives another result than direct from calibration",
            )

        self.everywhere(check)

    def expected_evaluations(self) -> None:
        def check(run: Run) -> None:
            callback = self.uncalibrated(run)
            if not callback.needs_calibration:
                return
            planned = self.evaluations(run, callback)
            callback.use(self.measured(run))
            spent = self.evaluations(run, callback)
            ensure(
                planned == spent,
                f"takes {planned} evaluations before it is calibrated, {spent} after; costs are "
                "read from the former",
            )

        self.everywhere(check)

    def evaluations(self, run: Run, callback: DenoisingCallback) -> tuple[int, int]:
        """Full and cached evaluations of a trajectory."""
        run.clock.reset()
        run.latents([callback])
        return run.clock.evaluations.full, run.clock.evaluations.cached

    def measured(self, run: Run, options: Options | None = None) -> Artifact:
        """What calibration on this run gives; nothing for a callback that needs none."""
        callback = self.uncalibrated(run, options)
        bench = Bench(run.network, run.clock, self.model, run.sampler, SEED + 1, CALIBRATED)
        return callback.calibrate(bench) if callback.needs_calibration else {}

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
        callback = self.callback(run, self.neutral)
        ensure_same(
            run.latents([callback]),
            run.latents(),
            f"with {self.neutral} the result differs from that without a callback",
        )

    def callback(self, run: Run, options: Options | None = None) -> DenoisingCallback:
        """Checked and calibrated."""
        callback = self.uncalibrated(run, options)
        callback.use(self.measured(run, options))
        return callback

    def uncalibrated(self, run: Run, options: Options | None = None) -> DenoisingCallback:
        chosen = self.options if options is None else options
        callback: DenoisingCallback = build(self.cls, chosen)
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

    def evaluate(self, step: Step) -> Tensor | None:
        return self._inner.evaluate(step)

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
