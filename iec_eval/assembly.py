"""From an experiment's names to built and checked objects.

Everything that can be wrong is found here, before weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from iec_eval.calibration import (
    CPU,
    ArtifactStore,
    Bench,
    Calibrated,
    Draft,
    draft_key,
    next_key,
    obtain,
    root_key,
)
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import evaluator_of
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.fingerprints import digest, identity, model_identity, row_fingerprint
from iec_eval.metrics.base import Metric, PairedMetric
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions, validated
from iec_eval.plugins import Registry
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder
from iec_eval.samplers.base import Sampler
from iec_eval.study import Experiment, Part, Study, full_precision


@dataclass(frozen=True)
class Plan:
    """One experiment with its parts built: everything but the weights.

    ``identity`` is the model's, asked for once: it takes hashing every file. ``batching`` are the
    sizes that decide images where a part lets those of a batch depend on each other.
    """

    experiment: Experiment
    model: DiffusionModel
    identity: Mapping[str, str]
    batching: Mapping[str, int]
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


@dataclass(frozen=True)
class Planner:
    """Plans the rows of one study, which share the model; those with equal samplers share it too.

    ``identity`` is the model's, empty where its files are not there; ``batching`` as in a plan.
    """

    registry: Registry
    model: DiffusionModel
    identity: Mapping[str, str]
    batching: Mapping[str, int]
    _samplers: dict[str, Sampler] = field(default_factory=dict)

    def plan(self, row: Experiment) -> Plan:
        """The plan of a row, its parts built anew and checked but for the network they fit.

        Raises UnknownName, ConfigError or Incompatible, naming the row.
        """
        sampler = self.sampler(row.sampler, f"{row.name}: sampler")
        methods = [
            build(self.registry, "efficiency method", part, f"{row.name}: efficiency[{i}]")
            for i, part in enumerate(row.efficiency)
        ]
        callbacks = [
            build(self.registry, "callback", part, f"{row.name}: callbacks[{i}]")
            for i, part in enumerate(row.callbacks)
        ]
        fingerprint = self._fingerprint(row, sampler, methods, callbacks)
        plan = Plan(
            row, self.model, self.identity, self.batching, sampler, methods, callbacks, fingerprint
        )
        _check(plan)
        return plan

    def sampler(self, part: Part, where: str) -> Sampler:
        """A sampler on the model's noise schedule; steps are pure, so rows can share it.

        Raises UnknownName or ConfigError.
        """
        key = repr(part)
        if key not in self._samplers:
            self._samplers[key] = build(self.registry, "sampler", part, where, self.model.schedule)
        return self._samplers[key]

    def _fingerprint(
        self,
        row: Experiment,
        sampler: Sampler,
        methods: Sequence[EfficiencyMethod],
        callbacks: Sequence[DenoisingCallback],
    ) -> str:
        calibrates = bool(methods) or any(callback.needs_calibration for callback in callbacks)
        mixed = any(callback.depends_on_batch for callback in callbacks)
        return row_fingerprint(
            model_identity(self.model, self.identity),
            sampler,
            [part for method in methods for part in method.parts()],
            callbacks,
            row.images.seed,
            calibration=row.calibration.identity() if calibrates else None,
            batching=self.batching if mixed else None,
        )


def planner(study: Study, registry: Registry, lacking: list[str] | None = None) -> Planner:
    """What plans the rows of a study.

    What a model id names is downloaded. With a list ``lacking`` nothing is, and files that are
    not there are no error but noted in it; such plans can be shown, not run.

    Raises UnknownName or ConfigError for a model that cannot be had.
    """
    model = _model(registry, study.model, download=lacking is None)
    missing = model.missing() if lacking is not None else []
    identity = {} if missing else model.identity()
    if lacking is not None:
        lacking.extend(missing)
    run = study.execution
    batching = {"batch_size": run.batch_size, "chunk_size": run.chunk_size}
    return Planner(registry, model, identity, batching)


def plan_rows(planner: Planner, rows: Iterable[Experiment]) -> list[Plan]:
    """Plans for rows, whose methods fit the model's network.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    plans = [planner.plan(row) for row in rows]
    for plan in distinct_networks(plans).values():
        check_fit(plan)
    return plans


def own_plans(study: Study, planner: Planner) -> tuple[list[Plan], dict[str, str]]:
    """Plans for a study's own rows, and why others cannot be had, by name.

    Without a list of controls, one that the study has as a row of its own is left out, and so is a
    corrected one that a part refuses.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    rows = study.experiments()
    controls = [row for row in rows if row.control]
    named = plan_rows(planner, [row for row in rows if not row.control])
    there = {plan.fingerprint for plan in named}
    kept, refused = list[Plan](), dict[str, str]()
    for row in controls:
        try:
            plan = planner.plan(row)
        except ConfigError as error:
            if study.controls is not None or not row.callbacks:
                raise
            refused[row.name] = str(error)
            continue
        if study.controls is not None or plan.fingerprint not in there:
            kept.append(plan)
    return [*kept, *named], refused


def plan_like(plan: Plan, registry: Registry, **changes: Any) -> Plan:
    """The plan of the same row with other ``efficiency``, ``callbacks`` or ``images``, say.

    Raises UnknownName, ConfigError or Incompatible, as :func:`plan_study`.
    """
    row = plan.experiment.model_copy(update=changes)
    return Planner(registry, plan.model, plan.identity, plan.batching).plan(row)


def plan_study(study: Study, registry: Registry, lacking: list[str] | None = None) -> list[Plan]:
    """Plans for the rows that the study names and its full-precision controls.

    The other controls are added by ``controls.plan_with_controls``, which takes the same.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    plans, _ = own_plans(study, planner(study, registry, lacking))
    return plans


def _model(registry: Registry, part: Part, *, download: bool) -> DiffusionModel:
    cls, options = chosen(registry, "model", part, "model")
    if download:
        cls.fetch(options)
    model: DiffusionModel = cls(options)
    return model


def distinct_networks(plans: Iterable[Plan]) -> dict[str, Plan]:
    """One plan for each network that rows run, under the key that :func:`network_key` gives."""
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(network_key(plan), plan)
    return found


def network_key(plan: Plan) -> str:
    """Equal for rows of one study whose methods, and so whose networks, are the same."""
    return digest([[identity(part) for part in plan.parts()], identity(plan.sampler)])


def plan_metrics(
    study: Study, registry: Registry, plans: Sequence[Plan], lacking: list[str] | None = None
) -> list[Metric]:
    """The study's metrics, prepared for its model's images, their number and the rows there are.

    With a list ``lacking``, files that are not there are no error but noted in it.

    Raises UnknownName, ConfigError, Incompatible or CorruptFile for a metric that cannot be had.
    """
    model = plans[0].model
    metrics: list[Metric] = []
    for position, part in enumerate(study.metrics):
        metric = build(registry, "metric", part, f"metrics[{position}]")
        if isinstance(metric, PairedMetric):
            reference = _reference(plans, study, metric.name)
            metric.reference_row = reference.experiment.name
            metric.reference_digest = digest(
                [model_identity(model, reference.identity), identity(reference.sampler)]
            )
        _prepare(metric, study.images.count, model, lacking)
        if metric.network is not None:
            metric.network.check(model.image_shape)
        metrics.append(metric)
    return metrics


def _prepare(metric: Metric, count: int, model: DiffusionModel, lacking: list[str] | None) -> None:
    if lacking is not None:
        missing = metric.missing()  # hashes weights: asked for once
        lacking += [line for line in missing if line not in lacking]
        if missing or model.missing():
            return
    metric.bind(model)
    metric.prepare(count)


def _reference(plans: Iterable[Plan], study: Study, metric: str) -> Plan:
    rows = {plan.experiment.name: plan for plan in plans}
    row = full_precision(plan.experiment for plan in rows.values())
    if row is None:
        raise Incompatible(
            f"{metric}: compares rows with the full-precision one, but study {study.study!r} has "
            "no row without efficiency methods and callbacks; add controls: [full-precision]"
        )
    return rows[row.name]


def build(registry: Registry, kind: str, part: Part, where: str, *more: Any) -> Any:
    """One part from its name and options.

    Raises UnknownName for an unknown name, ConfigError for wrong options.
    """
    cls, options = chosen(registry, kind, part, where)
    return cls(options, *more)


def chosen(registry: Registry, kind: str, part: Part, where: str) -> tuple[Any, BaseOptions]:
    """The class that a part names, and its options.

    Raises UnknownName for an unknown name, ConfigError for wrong options.
    """
    if not isinstance(part.get("name"), str):
        raise ConfigError(f"{where}: wanted a name, got {part!r}")
    cls = registry.get(kind, part["name"])
    given = {key: value for key, value in part.items() if key != "name"}
    return cls, validated(cls.Options, given, f"{where}: {part['name']}")


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


def artifact_keys(plan: Plan) -> list[tuple[Calibrated, str]]:
    """What has to be calibrated for a row, with the keys of the artifacts, in order."""
    return [(part, key) for part, key in _keyed(plan) if part.needs_calibration]


def _keyed(plan: Plan) -> list[tuple[EfficiencyMethod | DenoisingCallback, str]]:
    """The methods' parts, then the callbacks, each with the key of what it may calibrate."""
    row = plan.experiment
    model = model_identity(plan.model, plan.identity)
    key = root_key(model, plan.sampler, row.calibration.identity())
    parts: list[EfficiencyMethod | DenoisingCallback] = [*plan.parts(), *plan.callbacks]
    keyed = []
    for part in parts:
        key = next_key(key, part)
        keyed.append((part, key))
    return keyed


def missing_artifacts(plan: Plan, store: RunFolder) -> list[str]:
    """Keys of the artifacts that are not calibrated yet, in order."""
    return [key for _, key in artifact_keys(plan) if not store.has(key)]


@dataclass(frozen=True)
class Calibrator:
    """Makes the bench of each part."""

    device: torch.device
    progress: Progress | None

    def bench(
        self,
        plan: Plan,
        network: nn.Module,
        clock: Clock,
        key: str,
        store: ArtifactStore | None,
        callbacks: Sequence[DenoisingCallback],
    ) -> Bench:
        progress = self.progress or Progress("steps", visible=False)
        plan.model.to(self.device)
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
            callbacks=tuple(callbacks),
        )


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
        evaluator_of(plan.callbacks)
        for callback in plan.callbacks:
            callback.check(plan.sampler, clock)
    except ConfigError as error:
        error.args = (f"{name}: {error}",)
        raise


def check_fit(plan: Plan) -> None:
    """Apply the parts to the network without weights.

    Raises ConfigError or Incompatible, naming the row, if they do not fit it.
    """
    try:
        if plan.methods:
            assemble_skeleton(plan)
    except ConfigError as error:
        error.args = (f"{plan.experiment.name}: {error}",)
        raise


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
    earlier: list[DenoisingCallback] = []
    for part, key in _keyed(plan):
        bench = None
        if calibrator is not None and part.needs_calibration:
            bench = calibrator.bench(plan, network, clock, key, store, earlier)
            bench.progress.describe(f"{plan.experiment.name}: calibrating {part.name}")
        artifact = obtain(part, key, bench, store)
        if isinstance(part, DenoisingCallback):
            part.use(artifact)
            earlier.append(part)
        else:
            clock.full_steps &= frozenset(part.full_steps(clock.total, artifact))
            network = part.apply(network, clock, artifact)
    clock.reset()
    return Assembly(plan, network.eval(), clock)
