"""Rivals of a corrected row: what else its work could buy, and parts of what it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from iec_eval.cost import EvaluationCost, expected_evaluations, interval
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.equal_work import JUST_ABOVE, TOLERANCE, is_near
from iec_eval.errors import Incompatible
from iec_eval.planning import Plan, Planner
from iec_eval.samplers.base import Sampler
from iec_eval.study import Experiment, Part, Relation

ZERO_COST = {
    "epsilon-scaling": "epsilon scaling",
    "time-shift": "time shift",
    "scale-matched": "scale-matched",
    "self-consistent": "self-consistent",
}
HALVES: Mapping[str, Part] = {
    "refresh only": {"correct": False},
    "correction only": {"refresh_cache": False},
}


def iecs(plan: Plan) -> dict[int, Any]:
    """The options of each IEC among a row's callbacks, by its place; one may follow another."""
    return {i: one.options for i, one in enumerate(plan.callbacks) if one.name == "iec"}


@dataclass(frozen=True)
class Corrected:
    """A row whose callbacks take extra evaluations, and the same without callbacks.

    ``base`` has the name that rivals made of it are called after.
    """

    planner: Planner
    plan: Plan
    base: Plan

    @property
    def name(self) -> str:
        return self.plan.experiment.name

    @property
    def iec(self) -> dict[int, Any]:
        """The options of each IEC of the row, by its place."""
        return iecs(self.plan)

    @property
    def cached(self) -> bool:
        """Whether some steps do not run the whole network."""
        return len(self.base.planned_full_steps()) < len(self.base.sampler.timesteps)

    def without(self, label: str, **changes: Any) -> Experiment:
        """A control made of the base, with some of its settings changed."""
        return control(self.base.experiment, f"{self.base.experiment.name}: {label}", **changes)

    def with_iec(self, label: str, changed: Callable[[Part], Part]) -> Experiment:
        """A control made of the row, with each IEC replaced by what ``changed`` makes of it."""
        places = self.iec
        callbacks = [
            changed(part) if place in places else part
            for place, part in enumerate(self.plan.experiment.callbacks)
        ]
        return control(self.plan.experiment, f"{self.name}: {label}", callbacks=callbacks)


@dataclass(frozen=True)
class Counted(Corrected):
    """One whose work is known: ``cost`` of an evaluation, and ``target``, the row's MACs an image.

    MACs, multiply-accumulates, are expected ones.
    """

    cost: EvaluationCost
    target: float

    def macs(self, plan: Plan) -> float:
        """MACs of another row with the base's network."""
        return expected_macs(plan, self.cost)

    @property
    def costs_more(self) -> bool:
        """Whether the base costs less than the row, by more than the tolerance."""
        return self.target > (1 + TOLERANCE) * self.macs(self.base)

    def near(self, macs: float) -> bool:
        """Whether a cost is the row's within the tolerance, or just above."""
        return is_near(macs, self.target)


@dataclass(frozen=True)
class Rival:
    """A control that may be had: ``make`` raises Incompatible or ConfigError if it cannot."""

    name: str
    relation: Relation
    make: Callable[[], Experiment]


def equal_cost(row: Counted) -> list[Rival]:
    """What else the row's extra work could buy: steps, a fresher cache, Heun's evaluation."""
    rivals = [Rival("more steps", "equal-cost", lambda: more_steps(row))]
    if any(interval(method) is not None for method in row.base.methods):
        rivals.append(Rival("smaller interval", "equal-cost", lambda: smaller_interval(row)))
    return [*rivals, heun(row)]


def heun(row: Counted) -> Rival:
    """Of these the one that needs no calibration but the row's own: Heun's evaluation."""
    return Rival("Heun", "equal-cost", lambda: _heun(row))


def more_steps(row: Counted) -> Experiment:
    """The base with the number of sampler steps whose cost is nearest to the row's.

    Not the fewest that are near enough: such rivals would all be 2 % short. A sampler or method
    may refuse some numbers of steps, and those that begin nearer to the image than the row are
    passed over; where the rest leave none within the tolerance, the next that costs more is taken,
    up to 10 % more, or whatever it costs if it is the very next number.

    Raises Incompatible if there is no such number, or no option ``steps``.
    """
    sampler = row.base.sampler
    given = getattr(sampler.options, "steps", None)
    steps = given if type(given) is int else len(sampler.timesteps)
    sampler.other_steps(steps)  # one that cannot be asked says so
    below, last, refusal = row.base.experiment, steps, ""
    for number in range(steps + 1, _most_steps(row, steps) + 1):
        try:
            options = {**row.base.experiment.sampler, **sampler.other_steps(number)}
            experiment = row.without(f"{number} steps", sampler=options)
            _check_start(_sampler_of(row, experiment), sampler)
            macs = _macs_of_steps(row, experiment)
        except Exception as error:  # whatever a sampler says to a number it does not like
            refusal = f"; {error}"
            continue
        if macs < row.target:
            below, last = experiment, number
            continue
        nearer = macs - row.target <= row.target - _macs_of_steps(row, below)
        if (nearer or not _spends_as_much(row, below)) and (row.near(macs) or last == number - 1):
            return experiment
        break
    if _spends_as_much(row, below):
        return below
    raise Incompatible(
        f"no number of steps that the sampler takes costs as much: {last} cost too little, the "
        f"next that it takes more than {1 + JUST_ABOVE:g} times as much{refusal}"
    )


def _most_steps(row: Counted, steps: int) -> int:
    """More are not looked at: they cost about twice what is wanted."""
    return 2 * math.ceil(steps * row.target / row.macs(row.base))


def _spends_as_much(row: Counted, experiment: Experiment) -> bool:
    """Whether other steps cost as much as the row; the base's own do not, however near."""
    changed = experiment is not row.base.experiment
    return changed and row.near(_macs_of_steps(row, experiment))


def _macs_of_steps(row: Counted, experiment: Experiment) -> float:
    """With the base's methods: they are the same, and building them again takes time."""
    return row.macs(replace(row.base, sampler=_sampler_of(row, experiment)))


def _sampler_of(row: Counted, experiment: Experiment) -> Sampler:
    return row.planner.sampler(experiment.sampler, f"{experiment.name}: sampler")


def _check_start(sampler: Sampler, own: Sampler) -> None:
    """Raise Incompatible if a sampler takes for noise what would be half an image already.

    Beginning later than the row by a timestep or two of a thousand is rounding.
    """
    first, wanted = sampler.timesteps[0], own.timesteps[0]
    span = wanted - own.timesteps[-1]  # below 0 for a sampler that counts upwards
    if (wanted - first) * math.copysign(1, span) > abs(span) / 500:
        raise Incompatible(
            f"{len(sampler.timesteps)} steps begin at timestep {first:g}, the row's at {wanted:g}"
        )


def smaller_interval(row: Counted) -> Experiment:
    """The base with the largest smaller interval of its cache that costs as much as the row.

    That is at least 98 % and at most 110 %. Raises Incompatible if there is none.
    """
    intervals = {i: interval(method) for i, method in enumerate(row.base.methods)}
    place, now = next(((i, n) for i, n in intervals.items() if n is not None), (0, 0))
    for smaller in range(now - 1, 0, -1):
        methods = list(row.base.experiment.efficiency)
        methods[place] = {**methods[place], "interval": smaller}
        experiment = row.without(f"interval {smaller}", efficiency=methods)
        try:
            macs = row.macs(row.planner.plan(experiment))
        except Exception:  # whatever a method says to an interval it does not like
            continue
        if row.near(macs):
            return experiment
    raise Incompatible(f"no interval below {now} costs as much")


def _heun(row: Counted) -> Experiment:
    """Heun's steps where the row corrects; the last step of all has no second evaluation.

    Raises Incompatible if that leaves more than this one evaluation unspent, or where it is not
    known that the row takes one more evaluation a step.
    """
    if not row.iec:
        raise Incompatible("only IEC says which steps it corrects")
    if any(len(options.weights) != 1 for options in row.iec.values()):
        raise Incompatible("it costs as much as one correction a step, not as several")
    experiment = row.with_iec("Heun", _heun_there)
    macs = row.macs(row.planner.plan(experiment))
    if macs <= row.macs(row.base) or macs < (1 - TOLERANCE) * row.target - row.cost.macs(1, 0):
        raise Incompatible("it evaluates too little: the last step has no second evaluation")
    return experiment


def _heun_there(given: Part) -> Part:
    kept: Part = {key: given[key] for key in ("where", "allow_clipping") if key in given}
    return {"name": "iec", "preset": "heun", **kept}


def zero_cost(row: Corrected) -> list[Rival]:
    """The registered ones, for a row that IEC corrects."""
    if not row.iec:
        return []
    given = [row.plan.experiment.callbacks[place] for place in row.iec]
    more: Mapping[str, Part] = {"scale-matched": {"of": given if len(given) > 1 else given[0]}}
    parts = {name: {"name": name, **more.get(name, {})} for name in ZERO_COST}
    known = row.planner.registry.names("callback")
    return [
        _fixed(label, "zero-cost", row.without(label, callbacks=[parts[name]]))
        for name, label in ZERO_COST.items()
        if name in known
    ]


def halves(row: Corrected) -> list[Rival]:
    """IEC's fresher cache without its correction, and its correction without the fresher cache."""
    if not row.iec or not row.cached:
        return []
    if not any(options.refresh_cache for options in row.iec.values()):
        return []
    return [
        _fixed(label, "half", row.with_iec(label, partial(_with, half)))
        for label, half in HALVES.items()
    ]


def _with(options: Part, given: Part) -> Part:
    return {**given, **options}


def _fixed(name: str, relation: Relation, experiment: Experiment) -> Rival:
    return Rival(name, relation, lambda: experiment)


def stacked(plan: Plan) -> list[Part] | None:
    """The row's methods with composites replaced by their cache and quantizer; None without any."""
    parts = list[Part]()
    for given, method in zip(plan.experiment.efficiency, plan.methods, strict=True):
        plain = [stage for stage in method.parts() if stage.slot is not None]
        combines = len(method.parts()) > 1 and len(plain) > 1
        parts += [_as_part(stage) for stage in plain] if combines else [given]
    return parts if parts != plan.experiment.efficiency else None


def _as_part(method: EfficiencyMethod) -> Part:
    options = method.options.model_dump(mode="json", exclude_unset=True)
    return {"name": method.name, **options}


def control(row: Experiment, name: str, **changes: Any) -> Experiment:
    """A row that the tool adds, made of another with some of its settings changed."""
    return row.model_copy(
        update={"name": name, "control": True, "judge_of": {}, "lacks": [], **changes}
    )


def expected_macs(plan: Plan, cost: EvaluationCost) -> float:
    """Expected multiply-accumulates of one image, with evaluations of that cost."""
    expected = expected_evaluations(plan)
    return cost.macs(expected.full, expected.cached)
