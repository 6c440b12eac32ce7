"""From a row's names to built and checked parts: everything but the weights.

What can be wrong with the parts alone is found here; whether they fit the model's network, in
``assembly``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import evaluator_of
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.errors import ConfigError, Incompatible, failing_as_configuration
from iec_eval.fingerprints import (
    digest,
    fingerprint_over_seeds,
    identity,
    model_identity,
    row_fingerprint,
)
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions, validated
from iec_eval.plugins import Registry
from iec_eval.samplers.base import Sampler
from iec_eval.study import Experiment, Part, Study


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

    @property
    def depends_on_batch(self) -> bool:
        """Whether a callback lets the images of a batch depend on each other."""
        return any(callback.depends_on_batch for callback in self.callbacks)

    def parts(self) -> list[EfficiencyMethod]:
        """The methods' stages, in order."""
        return [part for method in self.methods for part in method.parts()]

    def planned_full_steps(self) -> frozenset[int]:
        """Steps that run the whole network, as far as known before calibration.

        Their number is right; a schedule that calibration finds may choose others.

        Raises Incompatible if a method leaves step 0 out.
        """
        return self.full_steps({})

    def full_steps(self, artifacts: Mapping[int, Artifact]) -> frozenset[int]:
        """The same after calibration: ``artifacts`` of the parts that schedule, by position.

        Raises Incompatible if a method leaves step 0 out.
        """
        total = len(self.sampler.timesteps)
        steps = frozenset(range(total))
        for i, part in enumerate(self.parts()):
            steps &= frozenset(part.full_steps(total, artifacts.get(i, {})))
        if 0 not in steps:
            raise Incompatible("an efficiency method leaves out step 0, which must be full")
        return steps


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
            # the last chunk's company is decided by how many images there are
            batching={**self.batching, "count": row.images.count} if mixed else None,
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


def _model(registry: Registry, part: Part, *, download: bool) -> DiffusionModel:
    cls, options = chosen(registry, "model", part, "model")
    if download:
        cls.fetch(options)
    model: DiffusionModel = cls(options)
    return model


def plan_like(plan: Plan, registry: Registry, **changes: Any) -> Plan:
    """The plan of the same row with other ``efficiency``, ``callbacks`` or ``images``, say.

    Raises UnknownName, ConfigError or Incompatible, as :func:`plan_study`.
    """
    row = plan.experiment.model_copy(update=changes)
    return Planner(registry, plan.model, plan.identity, plan.batching).plan(row)


def plans_of_seeds(plan: Plan, registry: Registry) -> list[Plan]:
    """The plans of the same row for each seed of its study."""
    return [
        plan if images == plan.experiment.images else plan_like(plan, registry, images=images)
        for images in plan.experiment.images.each()
    ]


def fingerprint_in_results(of_seeds: Sequence[Plan]) -> str:
    """That of a row in results, from its plans for each seed."""
    found = [plan.fingerprint for plan in of_seeds]
    several = of_seeds[0].experiment.images.seeds is not None
    return fingerprint_over_seeds(found) if several else found[0]


def distinct_networks(plans: Iterable[Plan]) -> dict[str, Plan]:
    """One plan for each network that rows run, under the key that :func:`network_key` gives."""
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(network_key(plan), plan)
    return found


def network_key(plan: Plan) -> str:
    """Equal for rows of one study whose methods, and so whose networks, are the same."""
    return digest([[identity(part) for part in plan.parts()], identity(plan.sampler)])


def build(registry: Registry, kind: str, part: Part, where: str, *more: Any) -> Any:
    """One part from its name and options.

    Raises UnknownName for an unknown name, ConfigError for wrong options or if it cannot be made.
    """
    cls, options = chosen(registry, kind, part, where)
    with failing_as_configuration(f"{where}: {part['name']}"):
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


def _check(plan: Plan) -> None:
    name = plan.experiment.name
    if plan.model.prediction not in plan.sampler.predictions:
        raise Incompatible(
            f"{name}: the model predicts {plan.model.prediction!r}, sampler {plan.sampler.name!r} "
            f"understands {', '.join(sorted(plan.sampler.predictions))}; take a scheduler with "
            f"{{name: diffusers, scheduler: ..., prediction: {plan.model.prediction}}}"
        )
    _check_slots(plan)
    with failing_as_configuration(f"{name}: sampler {plan.sampler.name}"):
        total = len(plan.sampler.timesteps)
    try:
        clock = Clock(total, plan.planned_full_steps())
        evaluator_of(plan.callbacks)
        for callback in plan.callbacks:
            with failing_as_configuration(callback.name):
                callback.check(plan.sampler, clock)
    except ConfigError as error:
        error.args = (f"{name}: {error}",)
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
