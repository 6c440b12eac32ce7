"""Controls: the rows that a study needs beside its own for its numbers to mean something.

A correction that takes extra evaluations has to be worth them. For each row with one, rivals are
added that spend the same multiply-accumulates otherwise (``equal-cost``), that spend none
(``zero-cost``), or that do one half of what it does (``halves``); for each method that combines a
cache and a quantizer, the two merely stacked (``naive-stacking``). A row that is there already is
not made twice: it is told whom it judges. The full-precision controls are ``study``'s own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from iec_eval.assembly import Plan, Planner, check_fit, plan_rows, planner
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.cost import EvaluationCost, evaluation_cost, expected_evaluations, interval
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.errors import ConfigError, Incompatible, complaints
from iec_eval.plugins import Registry
from iec_eval.study import (
    Control,
    Experiment,
    Part,
    Relation,
    Study,
    free_name,
    full_precision,
)

Options = tuple[str, dict[str, Any]]
Settings = tuple[list[Options], list[Options], list[Options]]

TOLERANCE = 0.02  # costs this near each other are equal
JUST_ABOVE = 0.1  # what a rival may cost more, where nothing between is to be had
ZERO_COST = {
    "epsilon-scaling": "epsilon scaling",
    "time-shift": "time shift",
    "scale-matched": "scale-matched",
    "self-consistent": "self-consistent",
}


def plan_with_controls(
    study: Study, registry: Registry, lacking: list[str] | None = None
) -> list[Plan]:
    """Plans for every row of a study: those it names, each followed by the controls it needs.

    With a list ``lacking``, files of the model that are not there are noted in it; such plans can
    be shown, not run.

    Raises UnknownName, ConfigError or Incompatible, saying in which row. A control that cannot be
    had is no error: the row that lacks it says so.
    """
    with_parts = planner(study, registry, lacking)
    rows, refused = _possible(study, with_parts)
    table = _Table(with_parts, [_Row(plan) for plan in plan_rows(with_parts, rows)])
    table.own[0].lacks.extend(refused)
    wanted = study.wanted_controls()
    if "full-precision" in wanted:
        table.compare_with_full_precision()
    for row in table.own:
        table.add_controls(row, wanted)
    return [row.planned() for row in table.rows()]


def _possible(study: Study, planner: Planner) -> tuple[list[Experiment], list[str]]:
    """The rows of a study without corrected controls that nobody has listed and a part refuses."""
    rows, refused = list[Experiment](), list[str]()
    for row in study.experiments():
        if study.controls is None and row.control and row.callbacks:
            found = complaints(partial(planner.plan, row))
            refused += [f"the control {complaint}" for complaint in found]
            if found:
                continue
        rows.append(row)
    return rows, refused


@dataclass
class _Row:
    """A row of the table: its plan, whom it judges, what it lacks, the controls added for it."""

    plan: Plan
    judge_of: dict[str, Relation] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)
    added: list[_Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.plan.experiment.name

    @cached_property
    def settings(self) -> Settings:
        """Equal for rows of a study that make the same images."""
        return _settings(self.plan)

    def planned(self) -> Plan:
        """The plan, which says what has been found out about the row."""
        found = {"judge_of": self.judge_of, "lacks": self.lacks}
        return replace(self.plan, experiment=self.plan.experiment.model_copy(update=found))


@dataclass
class _Table:
    """The rows of a study, and what is added to them."""

    planner: Planner
    own: list[_Row]

    def rows(self) -> Iterator[_Row]:
        """All rows in order: each of the study's own, then those added for it."""
        for row in self.own:
            yield row
            yield from row.added

    def compare_with_full_precision(self) -> None:
        """Have the full-precision row judge the efficient rows of the same sampler."""
        base = full_precision(row.plan.experiment for row in self.own)
        judge = next((row for row in self.own if row.plan.experiment is base), None)
        for row in self.own if judge else []:
            plain = row.plan.methods and not row.plan.callbacks
            if judge and plain and _options(row.plan.sampler) == _options(judge.plan.sampler):
                judge.judge_of[row.name] = "full-precision"

    def add_controls(self, row: _Row, wanted: Sequence[Control]) -> None:
        """Add the controls of one of the study's own rows, of the kinds that are wanted."""
        if row.plan.callbacks:
            self._add_for_correction(row, wanted)
        if "naive-stacking" in wanted:
            bases = [added for added in row.added if "base" in added.judge_of.values()]
            for plain in [row, *bases]:
                self._add_stacking(row, plain)

    def _add_for_correction(self, row: _Row, wanted: Sequence[Control]) -> None:
        base = _without_callbacks(row.plan.experiment)
        self._judge(row, "base", base, only_existing=True)
        if not {"equal-cost", "zero-cost", "halves"} & set(wanted):
            return
        corrected = self._corrected(row, base.model_copy(update={"name": self._base_name(row)}))
        if corrected is None:
            return
        rivals = [
            *(_equal_cost(corrected) if "equal-cost" in wanted else []),
            *(_zero_cost(corrected) if "zero-cost" in wanted else []),
            *(_halves(corrected) if "halves" in wanted else []),
        ]
        plain = self._judge(row, "base", base) if rivals else None
        for rival in rivals:
            try:
                found = self._judge(row, rival.relation, rival.make())
                if plain and found and found.plan.callbacks:
                    plain.judge_of.setdefault(found.name, "base")
            except Exception as error:  # nobody has asked for this row: a part may refuse it
                row.lacks.append(f"{rival.name}: {error}")

    def _base_name(self, row: _Row) -> str:
        """What rivals that are made of the base are called after: it, or the row if it is new."""
        known = (other.name for other in self.rows() if other.judge_of.get(row.name) == "base")
        return next(known, row.name)

    def _corrected(self, row: _Row, base: Experiment) -> Corrected | None:
        """The row, if its callbacks take extra evaluations; else None.

        They are counted on a plan of its own: a callback may keep what it is shown.
        """
        try:
            plan, plain = self.planner.plan(row.plan.experiment), self.planner.plan(base)
            cost = evaluation_cost(plain)
            target = _macs(plan, cost)
        except Exception as error:  # a callback that cannot be counted can still be run
            row.lacks.append(f"all rivals: what the row costs cannot be counted: {error}")
            return None
        corrected = Corrected(self.planner, plan, plain, cost, target)
        return corrected if target > corrected.macs(plain) else None

    def _add_stacking(self, owner: _Row, row: _Row) -> None:
        stacked = None if row.plan.callbacks else _stacked(row.plan)
        if stacked is None:
            return
        name = f"{row.name}: naive stacking"
        experiment = _control(row.plan.experiment, name, efficiency=stacked)
        try:
            self._judge(row, "stacking", experiment, owner)
        except ConfigError as error:
            row.lacks.append(f"naive stacking: {error}")

    def _judge(
        self,
        row: _Row,
        relation: Relation,
        experiment: Experiment,
        owner: _Row | None = None,
        *,
        only_existing: bool = False,
    ) -> _Row | None:
        """Have the row with these settings judge ``row``; add it after ``owner`` if there is none.

        Gives that row. Raises ConfigError if it cannot be had.
        """
        plan = self.planner.plan(experiment)
        settings = _settings(plan)
        found = next((other for other in self.rows() if other.settings == settings), None)
        if found is None and not only_existing:
            name = free_name(experiment.name, [other.name for other in self.rows()])
            found = _Row(replace(plan, experiment=experiment.model_copy(update={"name": name})))
            self._check_fit(found.plan)
            (owner or row).added.append(found)
        if found is not None and found is not row:
            found.judge_of.setdefault(row.name, relation)
        return found

    def _check_fit(self, plan: Plan) -> None:
        """Once for each list of methods: the network they give does not depend on the steps."""
        methods = plan.experiment.efficiency
        if all(row.plan.experiment.efficiency != methods for row in self.rows()):
            check_fit(plan)


@dataclass(frozen=True)
class Corrected:
    """A row whose callbacks take extra evaluations, and the same without callbacks.

    ``base`` has the name that rivals made of it are called after. ``cost`` is that of an
    evaluation, ``target`` the row's expected multiply-accumulates an image.
    """

    planner: Planner
    plan: Plan
    base: Plan
    cost: EvaluationCost
    target: float

    @property
    def name(self) -> str:
        return self.plan.experiment.name

    @property
    def iec(self) -> tuple[int, DenoisingCallback] | None:
        """The place of IEC among the callbacks, and IEC itself; None without."""
        named = [(i, one) for i, one in enumerate(self.plan.callbacks) if one.name == "iec"]
        return named[0] if named else None

    @property
    def cached(self) -> bool:
        """Whether some steps do not run the whole network."""
        return len(self.base.planned_full_steps()) < len(self.base.sampler.timesteps)

    def macs(self, plan: Plan) -> float:
        """Multiply-accumulates of another row with the base's network."""
        return _macs(plan, self.cost)

    def near(self, macs: float) -> bool:
        """Whether a cost is the row's within the tolerance, or just above."""
        return (1 - TOLERANCE) * self.target <= macs <= (1 + JUST_ABOVE) * self.target

    def without(self, label: str, **changes: Any) -> Experiment:
        """A control made of the base, with some of its settings changed."""
        return _control(self.base.experiment, f"{self.base.experiment.name}: {label}", **changes)

    def with_iec(self, label: str, part: Part) -> Experiment:
        """A control made of the row, with another part in the place of IEC."""
        place, _ = self.iec or (0, None)
        callbacks = list(self.plan.experiment.callbacks)
        callbacks[place] = part
        return _control(self.plan.experiment, f"{self.name}: {label}", callbacks=callbacks)


@dataclass(frozen=True)
class _Rival:
    """A control that may be had: ``make`` raises Incompatible or ConfigError if it cannot."""

    name: str
    relation: Relation
    make: Callable[[], Experiment]


def _equal_cost(row: Corrected) -> list[_Rival]:
    if row.target <= (1 + TOLERANCE) * row.macs(row.base):
        return []  # the base itself is of equal cost
    rivals = [_Rival("more steps", "equal-cost", lambda: more_steps(row))]
    if any(interval(method) is not None for method in row.base.methods):
        rivals.append(_Rival("smaller interval", "equal-cost", lambda: smaller_interval(row)))
    options: Any = row.iec[1].options if row.iec else None
    if options and len(options.weights) == 1:
        rivals.append(_Rival("Heun", "equal-cost", lambda: _heun(row)))
    return rivals


def more_steps(row: Corrected) -> Experiment:
    """The base with the number of sampler steps whose cost is nearest to the row's.

    Not the fewest that are near enough: such rivals would all be 2 % short. A sampler or method
    may refuse some numbers of steps; where those it takes leave none within the tolerance, the
    next that costs more is taken, up to 10 % more.

    Raises Incompatible if there is no such number, or no option ``steps``.
    """
    steps = getattr(row.base.sampler.options, "steps", None)
    if type(steps) is not int:
        raise Incompatible(f"sampler {row.base.sampler.name!r} has no option called steps")
    below, last, refusal = row.base.experiment, steps, ""
    for number in range(steps + 1, _most_steps(row, steps) + 1):
        experiment = row.without(
            f"{number} steps", sampler={**row.base.experiment.sampler, "steps": number}
        )
        try:
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


def _most_steps(row: Corrected, steps: int) -> int:
    """More are not looked at: they cost about twice what is wanted."""
    return 2 * math.ceil(steps * row.target / row.macs(row.base))


def _spends_as_much(row: Corrected, experiment: Experiment) -> bool:
    """Whether other steps cost as much as the row; the base's own do not, however near."""
    changed = experiment is not row.base.experiment
    return changed and row.near(_macs_of_steps(row, experiment))


def _macs_of_steps(row: Corrected, experiment: Experiment) -> float:
    """With the base's methods: they are the same, and building them again takes time."""
    sampler = row.planner.sampler(experiment.sampler, f"{experiment.name}: sampler")
    return row.macs(replace(row.base, sampler=sampler))


def smaller_interval(row: Corrected) -> Experiment:
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


def _heun(row: Corrected) -> Experiment:
    """Heun's steps where the row corrects; the last step of all has no second evaluation.

    Raises Incompatible if that leaves more than this one evaluation unspent.
    """
    place, _ = row.iec or (0, None)
    given = row.plan.experiment.callbacks[place]
    kept: Part = {key: given[key] for key in ("where", "allow_clipping") if key in given}
    experiment = row.with_iec("Heun", {"name": "iec", "preset": "heun", **kept})
    macs = row.macs(row.planner.plan(experiment))
    if macs <= row.macs(row.base) or macs < (1 - TOLERANCE) * row.target - row.cost.macs(1, 0):
        raise Incompatible("it evaluates too little: the last step has no second evaluation")
    return experiment


def _zero_cost(row: Corrected) -> list[_Rival]:
    """The registered ones, for a row that IEC corrects."""
    if row.iec is None:
        return []
    given = row.plan.experiment.callbacks[row.iec[0]]
    more: Mapping[str, Part] = {"scale-matched": {"of": given}}
    parts = {name: {"name": name, **more.get(name, {})} for name in ZERO_COST}
    known = row.planner.registry.names("callback")
    return [
        _fixed(label, "zero-cost", row.without(label, callbacks=[parts[name]]))
        for name, label in ZERO_COST.items()
        if name in known
    ]


def _halves(row: Corrected) -> list[_Rival]:
    """IEC's fresher cache without its correction, and its correction without the fresher cache."""
    if row.iec is None or not row.cached:
        return []
    place, callback = row.iec
    options: Any = callback.options
    if not options.refresh_cache:
        return []
    given = row.plan.experiment.callbacks[place]
    halves = {"correction only": {**given, "refresh_cache": False}}
    if "correct" in type(options).model_fields:
        halves = {"refresh only": {**given, "correct": False}, **halves}
    return [_fixed(label, "half", row.with_iec(label, part)) for label, part in halves.items()]


def _fixed(name: str, relation: Relation, experiment: Experiment) -> _Rival:
    return _Rival(name, relation, lambda: experiment)


def _stacked(plan: Plan) -> list[Part] | None:
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


def _without_callbacks(row: Experiment) -> Experiment:
    return _control(row, f"{row.name}: uncorrected", callbacks=[])


def _control(row: Experiment, name: str, **changes: Any) -> Experiment:
    return row.model_copy(
        update={"name": name, "control": True, "judge_of": {}, "lacks": [], **changes}
    )


def _macs(plan: Plan, cost: EvaluationCost) -> float:
    """Expected multiply-accumulates of one image, with evaluations of that cost."""
    expected = expected_evaluations(plan)
    return cost.macs(expected.full, expected.cached)


def _settings(plan: Plan) -> Settings:
    """The parts with all of their options, those left out at their defaults."""
    return [_options(plan.sampler)], _all_options(plan.methods), _all_options(plan.callbacks)


def _all_options(parts: Iterable[Any]) -> list[Options]:
    return [_options(part) for part in parts]


def _options(part: Any) -> Options:
    return part.name, part.options.model_dump()
