"""From an experiment's names to built and checked objects.

Everything that can be wrong is found here, before weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from iec_eval.calibration import (
    CPU,
    ArtifactStore,
    Bench,
    Draft,
    draft_key,
    next_key,
    obtain,
    root_key,
)
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.metrics.base import Metric
from iec_eval.models.base import DiffusionModel
from iec_eval.options import validated
from iec_eval.plugins import Registry
from iec_eval.progress import Progress
from iec_eval.samplers.base import Sampler
from iec_eval.storage import RunFolder
from iec_eval.study import Experiment, Part, Study


@dataclass(frozen=True)
class Plan:
    """One experiment with its parts built: everything but the weights."""

    experiment: Experiment
    model: DiffusionModel
    sampler: Sampler
    methods: Sequence[EfficiencyMethod]
    callbacks: Sequence[DenoisingCallback]
    fingerprint: str

    @property
    def simulated(self) -> bool:
        """Whether any method only simulates what it saves."""
        return any(method.simulated for method in self.parts())

    def parts(self) -> list[EfficiencyMethod]:
        """The methods' stages, in order."""
        return [part for method in self.methods for part in method.parts()]

    def planned_full_steps(self) -> frozenset[int]:
        """Steps that run the whole network, as far as known before calibration.

        Their number is right; a schedule that calibration finds may choose others.

        Raises Incompatible if a method leaves step 0 out.
        """
        total = len(self.sampler.timesteps)
        steps = frozenset(range(total))
        for part in self.parts():
            steps &= frozenset(part.full_steps(total, {}))
        if 0 not in steps:
            raise Incompatible("an efficiency method leaves out step 0, which must be full")
        return steps


@dataclass(frozen=True)
class Assembly:
    """A plan with its network: ready to denoise."""

    plan: Plan
    network: nn.Module
    clock: Clock


def plan_study(study: Study, registry: Registry) -> list[Plan]:
    """Plans for every row of a study, models and samplers shared where they are equal.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    model = build(registry, "model", study.model, "model")
    identity = model.identity()
    run = study.execution
    batching = {"batch_size": run.batch_size, "chunk_size": run.chunk_size}
    return [_plan(row, model, identity, batching, registry) for row in study.experiments()]


def plan_metrics(study: Study, registry: Registry, image_shape: Sequence[int]) -> list[Metric]:
    """The study's metrics, prepared for its number of images and their shape."""
    metrics: list[Metric] = []
    for position, part in enumerate(study.metrics):
        metric = build(registry, "metric", part, f"metrics[{position}]")
        metric.prepare(study.images.count)
        if metric.network is not None:
            metric.network.check(image_shape)
        metrics.append(metric)
    return metrics


def build(registry: Registry, kind: str, part: Part, where: str, *more: Any) -> Any:
    """One part from its name and options.

    Raises UnknownName for an unknown name, ConfigError for wrong options.
    """
    if not isinstance(part.get("name"), str):
        raise ConfigError(f"{where}: wanted a name, got {part!r}")
    cls = registry.get(kind, part["name"])
    given = {key: value for key, value in part.items() if key != "name"}
    options = validated(cls.Options, given, f"{where}: {part['name']}")
    return cls(options, *more)


def assemble(plan: Plan, store: ArtifactStore | None = None) -> Assembly:
    """Read the weights and apply the methods in order.

    Raises MissingArtifact if one of them has not been calibrated yet.
    """
    return _apply(plan, plan.model.load(), store)


def assemble_skeleton(plan: Plan) -> Assembly:
    """The same on the meta device, for counting: nothing is calibrated or looked up."""
    clock = Clock(len(plan.sampler.timesteps))
    network = plan.model.skeleton()
    for part in plan.parts():
        clock.full_steps &= frozenset(part.full_steps(clock.total, {}))
        network = part.apply(network, clock, {})
    return Assembly(plan, network.eval(), clock)


def calibrate(
    plan: Plan,
    store: ArtifactStore | None,
    *,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Assembly:
    """Assemble, calibrating what is not in the store, part by part; one process at a time."""
    return _apply(plan, plan.model.load(), store, Calibrator(device, progress))


def artifact_keys(plan: Plan) -> list[tuple[EfficiencyMethod, str]]:
    """The parts with the keys of their artifacts, in order."""
    row = plan.experiment
    key = root_key(
        {**row.model, "files": plan.model.identity()}, row.sampler, row.calibration.model_dump()
    )
    keyed = []
    for part in plan.parts():
        key = next_key(key, part)
        keyed.append((part, key))
    return keyed


def missing_artifacts(plan: Plan, store: RunFolder) -> list[str]:
    """Names of the parts that are not calibrated yet."""
    return [
        part.name
        for part, key in artifact_keys(plan)
        if part.needs_calibration and not store.has(key)
    ]


@dataclass(frozen=True)
class Calibrator:
    """Makes the bench of each part."""

    device: torch.device
    progress: Progress | None

    def bench(
        self, plan: Plan, network: nn.Module, clock: Clock, key: str, store: ArtifactStore | None
    ) -> Bench:
        progress = self.progress or Progress("steps", visible=False)
        return Bench(
            network=network.to(self.device).eval(),
            clock=clock,
            model=plan.model,
            sampler=plan.sampler,
            seed=plan.experiment.calibration.seed,
            images=plan.experiment.calibration.images,
            device=self.device,
            progress=progress,
            draft=Draft(store, draft_key(key)),
        )


def _plan(
    row: Experiment,
    model: DiffusionModel,
    identity: Mapping[str, str],
    batching: Mapping[str, int],
    registry: Registry,
) -> Plan:
    sampler = build(registry, "sampler", row.sampler, f"{row.name}: sampler", model.schedule)
    methods = [
        build(registry, "efficiency method", part, f"{row.name}: efficiency[{i}]")
        for i, part in enumerate(row.efficiency)
    ]
    callbacks = [
        build(registry, "callback", part, f"{row.name}: callbacks[{i}]")
        for i, part in enumerate(row.callbacks)
    ]
    mixed = any(callback.depends_on_batch for callback in callbacks)
    versions = {part.name: part.version for method in methods for part in method.parts()}
    fingerprint = row.fingerprint(identity, batching if mixed else None, versions)
    plan = Plan(row, model, sampler, methods, callbacks, fingerprint)
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    name = plan.experiment.name
    if plan.model.prediction not in plan.sampler.predictions:
        raise Incompatible(
            f"{name}: the model predicts {plan.model.prediction!r}, sampler {plan.sampler.name!r} "
            f"understands {', '.join(sorted(plan.sampler.predictions))}"
        )
    _check_slots(plan)
    total = len(plan.sampler.timesteps)
    try:
        clock = Clock(total, plan.planned_full_steps())
        for callback in plan.callbacks:
            callback.check(plan.sampler, clock)
        _check_fit(plan)
    except ConfigError as error:
        error.args = (f"{name}: {error}",)
        raise


def _check_fit(plan: Plan) -> None:
    """Apply the parts to the network without weights."""
    if plan.methods:
        assemble_skeleton(plan)


def _check_slots(plan: Plan) -> None:
    holders: dict[str, str] = {}
    for part in plan.parts():
        if part.slot is None:
            continue
        if part.slot in holders:
            raise Incompatible(
                f"{plan.experiment.name}: {holders[part.slot]!r} and {part.name!r} are both "
                f"{part.slot}s; a run has room for one"
            )
        holders[part.slot] = part.name


def _apply(
    plan: Plan,
    network: nn.Module,
    store: ArtifactStore | None,
    calibrator: Calibrator | None = None,
) -> Assembly:
    clock = Clock(len(plan.sampler.timesteps))
    for part, key in artifact_keys(plan):
        bench = calibrator.bench(plan, network, clock, key, store) if calibrator else None
        if bench is not None:
            bench.progress.describe(f"{plan.experiment.name}: calibrating {part.name}")
        artifact = obtain(part, key, bench, store)
        clock.full_steps &= frozenset(part.full_steps(clock.total, artifact))
        network = part.apply(network, clock, artifact)
    clock.reset()
    return Assembly(plan, network.eval(), clock)
