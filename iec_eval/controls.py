"""Controls: the rows that a study needs beside its own for its numbers to mean something.

A correction that takes extra evaluations has to be worth them. For each row with one, rivals are
added that spend the same multiply-accumulates otherwise (``equal-cost``), that spend none
(``zero-cost``), or that do one half of what it does (``halves``); for each method that combines a
cache and a quantizer, the two merely stacked (``naive-stacking``). A row that is there already is
not made twice: it is told whom it judges. The full-precision controls are ``study``'s own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from iec_eval.assembly import check_fit
from iec_eval.callbacks.iec import corrected_steps
from iec_eval.cost import evaluation_cost, known_before_calibration
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.fingerprints import Identified, digest, identity
from iec_eval.planning import Plan, Planner, planner
from iec_eval.plugins import Registry
from iec_eval.rivals import (
    Corrected,
    Counted,
    Rival,
    control,
    equal_cost,
    expected_macs,
    halves,
    heun,
    iecs,
    stacked,
    zero_cost,
)
from iec_eval.study import (
    ROLES,
    Control,
    Experiment,
    Lack,
    Relation,
    Study,
    free_name,
    full_precision,
)
from iec_eval.study_plans import own_plans


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
    plans, refused = own_plans(study, with_parts)
    table = _Table(with_parts, [_Row(plan) for plan in plans])
    for name, reason in refused.items():
        table.own[0].lack("full-precision", f"the control {name}", reason)
    study.check_remarks([*(row.name for row in table.own), *refused])
    wanted = study.wanted_controls()
    for row in table.own:
        table.add_controls(row, wanted)
    if "full-precision" in wanted:
        table.compare_with_full_precision()
    table.compare_corrected_alike()
    return [row.planned() for row in table.rows()]


@dataclass
class _Row:
    """A row of the table: its plan, whom it judges, what it lacks, the controls added for it."""

    plan: Plan
    judge_of: dict[str, Relation] = field(default_factory=dict)
    lacks: list[Lack] = field(default_factory=list)
    added: list[_Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.plan.experiment.name

    def lack(self, relation: Relation, what: str, reason: object) -> None:
        """Note a row that should be there beside this one and cannot be had."""
        self.lacks.append(Lack(relation=relation, what=what, reason=str(reason)))

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
        """Have the full-precision row judge all others of the same sampler, corrected or not."""
        base = full_precision(row.plan.experiment for row in self.own)
        judge = next((row for row in self.own if row.plan.experiment is base), None)
        if judge is None:
            return
        sampler = identity(judge.plan.sampler)
        for row in self.rows():
            plain = not row.plan.methods and not row.plan.callbacks
            if not plain and identity(row.plan.sampler) == sampler:
                judge.judge_of.setdefault(row.name, "full-precision")

    def compare_corrected_alike(self) -> None:
        """Have full precision with a correction judge every method with the same one, step by step.

        What the method loses with the correction on both sides, beside what it loses without, says
        whether the correction mends the method or does the same to any network.
        """
        judges = {_correction(row.plan): row for row in self.own if not row.plan.methods}
        for row in self.rows():
            judge = judges.get(_correction(row.plan)) if row.plan.callbacks else None
            if judge is not None and row.plan.methods:
                judge.judge_of.setdefault(row.name, "corrected-alike")

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
        known = self._judge(row, "base", base, only_existing=True)
        if not {"equal-cost", "heun", "zero-cost", "halves"} & set(wanted):
            return
        # rivals made of the base are called after it, or after the row if the base is new
        name = known.name if known else row.name
        corrected = self._corrected(row, base.model_copy(update={"name": name}), wanted)
        if corrected is None:
            if "equal-cost" in wanted:
                self._judge(row, "base", base)  # which costs as much, as far as is known
            return
        counted = corrected if isinstance(corrected, Counted) else None
        rivals = [
            *(_spending(counted, wanted) if counted else []),
            *(zero_cost(corrected) if "zero-cost" in wanted else []),
            *(halves(corrected) if "halves" in wanted else []),
        ]
        plain = self._judge(row, "base", base) if rivals or "equal-cost" in wanted else None
        for rival in rivals:
            try:
                found = self._judge(row, rival.relation, rival.make())
                if plain and found and found is not plain:
                    self._compare_with_base(found, plain)
            except Exception as error:  # nobody has asked for this row: a part may refuse it
                row.lack(rival.relation, f"{ROLES[rival.relation]} {rival.name}", error)

    def _compare_with_base(self, rival: _Row, base: _Row) -> None:
        """Have the base judge a rival too: one that was added, and that has no base yet."""
        based = any(row.judge_of.get(rival.name) == "base" for row in self.rows())
        if not based and all(rival is not own for own in self.own):
            base.judge_of.setdefault(rival.name, "base")

    def _corrected(
        self, row: _Row, base: Experiment, wanted: Sequence[Control]
    ) -> Corrected | None:
        """The row, if its callbacks take extra evaluations or nobody can tell; else None.

        They are counted on a plan of its own: a callback may keep what it is shown.
        """
        corrected = None
        try:
            plan, plain = self.planner.plan(row.plan.experiment), self.planner.plan(base)
            corrected = Corrected(self.planner, plan, plain)
            cost = evaluation_cost(plain)
            if not known_before_calibration(plan):
                raise Incompatible("it depends on which steps calibration will choose as full ones")
            counted = Counted(self.planner, plan, plain, cost, expected_macs(plan, cost))
            return counted if counted.target > counted.macs(plain) else None
        except Exception as error:  # a part that cannot be counted can still be run
            if {"equal-cost", "heun"} & set(wanted):
                reason = f"what the row costs cannot be counted: {error}"
                row.lack("equal-cost", "equal-cost rivals", reason)
            return corrected

    def _add_stacking(self, owner: _Row, row: _Row) -> None:
        parts = None if row.plan.callbacks else stacked(row.plan)
        if parts is None:
            return
        name = f"{row.name}: naive stacking"
        experiment = control(row.plan.experiment, name, efficiency=parts)
        try:
            self._judge(row, "stacking", experiment, owner)
        except ConfigError as error:
            row.lack("stacking", "naive stacking", error)

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
        same = (other for other in self.rows() if other.plan.fingerprint == plan.fingerprint)
        found = next(same, None)
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


def _spending(row: Counted, wanted: Sequence[Control]) -> list[Rival]:
    """The wanted rivals of equal cost; none where the base itself is one."""
    if not row.costs_more:
        return []
    if "equal-cost" in wanted:
        return equal_cost(row)
    return [heun(row)] if "heun" in wanted else []


def _correction(plan: Plan) -> str:
    """The callbacks, the sampler whose steps they correct, and which of these IEC does.

    Full steps are all at full precision, and some of a cached row: not the same correction.
    """
    parts: list[Identified] = [plan.sampler, *plan.callbacks]
    total, full = len(plan.sampler.timesteps), plan.planned_full_steps()
    steps = [sorted(corrected_steps(iec.where, total, full)) for iec in iecs(plan).values()]
    return digest([*(identity(part) for part in parts), steps])


def _without_callbacks(row: Experiment) -> Experiment:
    return control(row, f"{row.name}: uncorrected", callbacks=[])
