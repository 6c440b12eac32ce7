"""From an experiment's names to built and checked objects.

Everything that can be wrong is found here, before weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from iec_eval.calibration import ArtifactStore, Bench, next_key, obtain, root_key
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.metrics.base import Metric
from iec_eval.models.base import DiffusionModel
from iec_eval.options import validated
from iec_eval.plugins import Registry
from iec_eval.samplers.base import Sampler
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

    def full_steps(self, artifacts: Sequence[Artifact]) -> frozenset[int]:
        """Steps that run the whole network: those every part wants full.

        Raises PluginError if a method leaves step 0 out.
        """
        total = len(self.sampler.timesteps)
        steps = frozenset(range(total))
        for part, artifact in zip(self.parts(), artifacts, strict=True):
            steps &= frozenset(part.full_steps(total, artifact))
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
    """Read the weights, calibrate what is missing, apply the methods in order."""
    return _apply(plan, plan.model.load(), store)


def assemble_skeleton(plan: Plan) -> Assembly:
    """The same on the meta device, for counting; methods must not need calibration."""
    return _apply(plan, plan.model.skeleton(), None)


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
    fingerprint = row.fingerprint(identity, batching if mixed else None)
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
        clock = Clock(total, plan.full_steps([{} for _ in plan.parts()]))
        for callback in plan.callbacks:
            callback.check(plan.sampler, clock)
        _check_fit(plan, clock)
    except ConfigError as error:
        error.args = (f"{name}: {error}",)
        raise


def _check_fit(plan: Plan, clock: Clock) -> None:
    """Apply the parts to the network without weights, up to the first that must be calibrated."""
    if not plan.methods:
        return
    network = plan.model.skeleton()
    for part in plan.parts():
        if type(part).calibrate is not EfficiencyMethod.calibrate:
            return
        network = part.apply(network, clock, {})


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


def _apply(plan: Plan, network: nn.Module, store: ArtifactStore | None) -> Assembly:
    row, total = plan.experiment, len(plan.sampler.timesteps)
    key = root_key(
        {**row.model, "files": plan.model.identity()}, row.sampler, row.calibration.model_dump()
    )
    clock, artifacts = Clock(total), list[Artifact]()
    for part in plan.parts():
        key = next_key(key, part)
        bench = Bench(
            network, clock, plan.model, plan.sampler, row.calibration.seed, row.calibration.images
        )
        artifact = obtain(part, key, bench, store)
        artifacts.append(artifact)
        clock.full_steps &= frozenset(part.full_steps(total, artifact))
        network = part.apply(network, clock, artifact)
    clock.reset()
    return Assembly(plan, network.eval(), clock)
