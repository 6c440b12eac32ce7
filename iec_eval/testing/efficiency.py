"""The contract of efficiency methods, and toy methods to combine them with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, Step
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler
from iec_eval.samplers.ddim import DDIM
from iec_eval.testing.checks import (
    SEED,
    STEPS,
    Options,
    build,
    check_declaration,
    check_version,
    difference,
    ensure,
    ensure_same,
    prefix,
    run_checks,
    same,
    saved_and_loaded,
)
from iec_eval.testing.tiny import TinyModel
from iec_eval.testing.trajectories import (
    Run,
    ensure_batch_free,
    ensure_latents,
    ensure_repeats,
    ensure_untouched_by_evaluations,
)


def check_efficiency_method(
    cls: type[EfficiencyMethod],
    options: Options | None = None,
    *,
    before: Sequence[EfficiencyMethod] = (),
    after: Sequence[EfficiencyMethod] = (),
    model: DiffusionModel | None = None,
    sampler: Sampler | None = None,
    images: int = 8,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that an efficiency method keeps no state beside its artifact and the clock.

    Properties: ``declaration``, ``full steps``, ``skeleton`` (without weights and artifacts, as
    costs are read: it runs, and has as many full steps), ``finite``, ``artifact`` (after saving
    and loading bit-equal), ``calibration`` (repeats bit-equal), ``second trajectory``, ``extra
    evaluations`` (with store=False, they change no later step), ``iec`` (finite and repeatable
    under IEC, whose evaluations leave no trace with refresh_cache off), ``rows`` (some images of
    a batch alone), ``batch``, ``composition`` (before and after a toy method of every other slot).

    With ``before`` or ``after`` all of them but ``declaration`` are about the whole chain: so
    pairs and orders are checked, and methods that need another one underneath.

    Args:
        cls: the method to check.
        options: to build it with; the defaults unless given.
        before: methods that are calibrated and applied before it.
        after: methods that are calibrated and applied after it.
        model: a guided, class-conditional UNet2DModel unless given, see :class:`TinyModel`.
        sampler: DDIM with a few steps unless given.
        images: number of calibration images.
        tolerance: of ``rows`` and ``batch``, as a share of the largest value.
        skip: properties to leave out.

    Raises AssertionError for the first property that does not hold.
    """
    chosen = model or TinyModel()
    run = sampler or build(DDIM, {"steps": STEPS}, chosen.schedule)
    case = _MethodCase(cls, options or {}, before, after, chosen, run, images, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "full steps": case.full_steps,
        "skeleton": case.skeleton,
        "finite": case.finite,
        "artifact": case.artifact,
        "calibration": case.calibration,
        "second trajectory": case.second_trajectory,
        "extra evaluations": case.extra_evaluations,
        "iec": case.iec,
        "rows": case.rows,
        "batch": case.batch,
        "composition": case.composition,
    }
    run_checks(cls, checks, skip)


@dataclass(frozen=True)
class _MethodCase:
    cls: type[EfficiencyMethod]
    options: Options
    before: Sequence[EfficiencyMethod]
    after: Sequence[EfficiencyMethod]
    model: DiffusionModel
    sampler: Sampler
    images: int
    tolerance: float

    def declaration(self) -> None:
        check_declaration(self.cls)
        parts = self.method().parts()
        ensure(len(parts) > 0, "parts() is empty")
        for part in parts:
            ensure(
                part.slot in (None, "cacher", "quantizer"),
                f"slot: wanted 'cacher', 'quantizer' or None, got {part.slot!r}",
            )
            check_version(part)
        taken = [part.slot for part in parts if part.slot]
        ensure(len(set(taken)) == len(taken), f"its parts take one slot twice: {taken}")

    def full_steps(self) -> None:
        total = len(self.sampler.timesteps)
        for part, artifact in zip(self.parts(), self.applied()[1], strict=True):
            steps = set(part.full_steps(total, artifact))
            ensure(0 in steps, f"step 0 must be full, full_steps gives {sorted(steps)}")
            outside = sorted(steps - set(range(total)))
            ensure(not outside, f"full_steps gives {outside}, the run has 0..{total - 1}")
            again = set(part.full_steps(total, artifact))
            ensure(steps == again, "full_steps gives other steps when asked again")

    def skeleton(self) -> None:
        network, clock = self.model.skeleton(), Clock(len(self.sampler.timesteps))
        for part in self.parts():
            with _explained(f"{part.name} on the meta device, given an empty artifact,"):
                clock.full_steps &= frozenset(part.full_steps(clock.total, {}))
                network = part.apply(network, clock, {})
        some_cached = len(clock.full_steps) < clock.total
        for full in (True, False) if some_cached else (True,):
            self._check_skeleton(network.eval(), clock, full=full)
        for part, artifact in zip(self.parts(), self.applied()[1], strict=True):
            planned, found = (len(set(part.full_steps(clock.total, a))) for a in ({}, artifact))
            ensure(
                planned == found,
                f"{part.name}: full_steps gives {planned} steps for an empty artifact, {found} "
                "after calibration; costs are read from the former",
            )

    def _check_skeleton(self, network: nn.Module, clock: Clock, *, full: bool) -> None:
        sample = torch.empty((1, *self.model.shape), device="meta")
        denoiser = Denoiser(network, self.model.condition([0]).to(sample.device), clock)
        clock.full = full
        what = f"a {'full' if full else 'cached'} evaluation on the meta device"
        with torch.no_grad(), _explained(what):
            output = denoiser(sample, self.sampler.timesteps[0])
        ensure(
            output.shape == sample.shape,
            f"{what} gives shape {list(output.shape)}, wanted {list(sample.shape)}",
        )

    def finite(self) -> None:
        ensure_latents(self.applied()[0].latents(), self.model)

    def artifact(self) -> None:
        run, artifacts = self.applied()
        reloaded = [saved_and_loaded(artifact) for artifact in artifacts]
        ensure_same(
            self.applied(artifacts=reloaded)[0].latents(),
            run.latents(),
            "the artifact, saved and loaded, gives another result than direct from calibration",
        )
        ensure(same(reloaded, artifacts), "apply() changed the artifact it was given")

    def calibration(self) -> None:
        ensure(same(self.applied()[1], self.applied()[1]), "calibrating again gives another result")

    def second_trajectory(self) -> None:
        ensure_repeats(self.applied()[0])

    def extra_evaluations(self) -> None:
        ensure_untouched_by_evaluations(self.applied()[0])

    def iec(self) -> None:
        run, corrections = self.applied()[0], [build(IEC, {"preset": "paper"})]
        with prefix("under IEC "):
            ensure_latents(run.latents(corrections), self.model)
            ensure_repeats(run, corrections)
        # an evaluation that enters the result with weight zero
        idle = build(IEC, {"preset": "paper", "weights": [0.0], "refresh_cache": False})
        ensure_same(
            run.latents([idle]),
            run.latents(),
            "IEC of weight zero with refresh_cache off changed the result: mind Clock.store",
        )

    def rows(self) -> None:
        probe = _SomeRows(BaseOptions())
        self.applied()[0].latents([probe])
        ensure(
            probe.worst <= self.tolerance,
            f"evaluating some rows of the batch differs from the whole batch by {probe.worst:.2g} "
            f"of the largest value, wanted at most {self.tolerance:.2g}: mind Clock.rows",
        )

    def batch(self) -> None:
        ensure_batch_free(self.applied()[0], [], self.tolerance)

    def composition(self) -> None:
        alone = self.applied()[0].latents()
        taken = {part.slot for part in self.parts()} - {None}
        for toy in (toy for toy in TOYS if toy.slot not in taken):
            for first, last in (([toy(BaseOptions())], []), ([], [toy(BaseOptions())])):
                where = f"{'after' if first else 'before'} a {toy.slot or 'slotless method'}"
                with prefix(f"applied {where}: "):
                    self._check_composed(self.applied(first, last)[0], alone)

    def _check_composed(self, run: Run, alone: Tensor) -> None:
        latents = run.latents()
        ensure_latents(latents, self.model)
        ensure(not torch.equal(latents, alone), "the other method has no effect: it is bypassed")
        ensure_repeats(run)
        ensure_untouched_by_evaluations(run)
        ensure_batch_free(run, [], self.tolerance, positions=(0, 2))

    def method(self) -> EfficiencyMethod:
        method: EfficiencyMethod = build(self.cls, self.options)
        return method

    def parts(
        self, first: Sequence[EfficiencyMethod] = (), last: Sequence[EfficiencyMethod] = ()
    ) -> list[EfficiencyMethod]:
        """The stages of the whole chain, with more methods at its ends."""
        # copies, as what a method kept to itself must not reach the next application
        before, after = deepcopy([*self.before]), deepcopy([*self.after])
        methods = (*first, *before, self.method(), *after, *last)
        return [part for method in methods for part in method.parts()]

    def applied(
        self,
        first: Sequence[EfficiencyMethod] = (),
        last: Sequence[EfficiencyMethod] = (),
        *,
        artifacts: Sequence[Artifact] | None = None,
    ) -> tuple[Run, list[Artifact]]:
        """A new network with the chain applied, and its parts' artifacts."""
        network, clock = self.model.load(), Clock(len(self.sampler.timesteps))
        used: list[Artifact] = []
        for position, part in enumerate(self.parts(first, last)):
            bench = Bench(network, clock, self.model, self.sampler, SEED + 1, self.images)
            used.append(part.calibrate(bench) if artifacts is None else artifacts[position])
            clock.full_steps &= frozenset(part.full_steps(clock.total, used[-1]))
            network = part.apply(network, clock, used[-1])
        clock.reset()
        return Run(self.sampler, network.eval(), clock, self.model), used


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say of what raises within the block that it must not."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}: {error}") from error


class _SomeRows(DenoisingCallback):
    """Evaluates some images of the batch again and compares."""

    name = "some-rows"
    worst = 0.0

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        rows = torch.tensor([3, 1])
        some = step.predict(step.sample[rows], rows=rows, store=False)
        self.worst = max(self.worst, difference(some, prediction[rows]))
        return prediction


class ToyCacher(EfficiencyMethod):
    """Repeats the whole prediction of the last full step on every other step."""

    name = "toy-cacher"
    slot = "cacher"

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return range(0, total, 2)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return _Repeater(network, clock)


class _Repeater(nn.Module):
    def __init__(self, network: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.network, self._clock = network, clock
        self._kept = torch.empty(0)

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        clock = self._clock
        if not clock.full:
            return self._kept if clock.rows is None else self._kept[clock.rows]
        output = self.network(sample, timestep, **inputs)
        tensor: Tensor = output if isinstance(output, Tensor) else output[0]
        if clock.store or clock.evaluation == 0:
            rows = clock.rows
            self._kept = tensor if rows is None else self._kept.index_copy(0, rows, tensor)
        return tensor


class ToyQuantizer(EfficiencyMethod):
    """Rounds weights to 8 bits, and inputs on a grid that depends on the step, in place."""

    name = "toy-quantizer"
    slot = "quantizer"
    simulated = True

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        def round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *rest = inputs
            return (first + 1e-3 * (1 + clock.step) * torch.sin(first), *rest)

        for module in _leaves(network):
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                # a tensor, not a number: there are none on the meta device
                scale = (weight.detach().abs().max() / 127).clamp(min=1e-12)
                weight.data = (weight.data / scale).round() * scale
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.register_forward_pre_hook(round_input)
        return network


class ToyScaler(EfficiencyMethod):
    """Takes no slot: scales what every layer gives by a factor that depends on the step."""

    name = "toy-scaler"

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        def scale(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output * (1 + 1e-3 * clock.step)

        for module in _leaves(network):
            module.register_forward_hook(scale)
        return network


TOYS: tuple[type[EfficiencyMethod], ...] = (ToyCacher, ToyQuantizer, ToyScaler)


def _leaves(network: nn.Module) -> list[nn.Module]:
    """Layers: modules without parts that have weights of their own."""
    modules = [m for m in network.modules() if not any(True for _ in m.children())]
    return [module for module in modules if module._parameters]
