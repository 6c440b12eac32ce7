"""Controls: which rows are added, that they cost what they must, and that they are real rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, Toy, installed_plugin

from iec_eval import cost
from iec_eval.assembly import artifact_keys
from iec_eval.callbacks.iec import IECOptions
from iec_eval.controls import plan_with_controls
from iec_eval.cost import evaluation_cost, expected_evaluations
from iec_eval.errors import Incompatible, UnknownName
from iec_eval.planning import Plan
from iec_eval.plugins import load_registry
from iec_eval.results import read_results
from iec_eval.storage import read_sealed
from iec_eval.study import full_precision, load

Part = dict[str, Any]
Plans = Callable[..., dict[str, Plan]]

IEC: Part = {"name": "iec"}
QUANTIZER: Part = {"name": "timestep-quantizer"}
STEPS, INTERVAL = 20, 5
CACHE: Part = {"name": "deepcache", "interval": INTERVAL, "cut": 2}
CACHEQUANT: Part = {"name": "cachequant", "interval": INTERVAL, "cut": 2}
METHODS: dict[str, list[Part]] = {
    "plain": [],
    "quantized": [QUANTIZER],
    "cached": [CACHE],
    "cachequant": [CACHEQUANT],
}

# Parts as others may write them.
PARTS = """
from iec_eval.api import (
    BaseOptions, CompositeMethod, DenoisingCallback, EfficiencyMethod, Sampler, State, hookimpl
)

class Twice(DenoisingCallback):
    name = "twice"

    def refine(self, step, prediction):
        return (prediction + step.predict(step.sample)) / 2

class Uncountable(DenoisingCallback):
    name = "uncountable"

    def refine(self, step, prediction):
        raise ValueError("not before it is told what to do")

class EveryOther(EfficiencyMethod):
    name = "every-other"
    slot = "cacher"

    def full_steps(self, total, artifact):
        return range(0, total, 2)

    def apply(self, network, clock, artifact):
        return network

class InnerCache(EveryOther):
    name = "inner-cache"

class InnerQuantizer(EveryOther):
    name, slot = "inner-quantizer", "quantizer"

class Combined(CompositeMethod):
    name = "combined"

    def parts(self):
        return [InnerCache(BaseOptions()), InnerQuantizer(BaseOptions())]

class Fixed(Sampler):
    name = "fixed"

    def __init__(self, options, schedule):
        super().__init__(options, schedule)
        self.timesteps = (90, 60, 30, 0)

    def step(self, state, index, prediction, draw):
        return State(state.sample - 0.1 * prediction)

@hookimpl
def iec_eval_callbacks():
    return [Twice, Uncountable]

@hookimpl
def iec_eval_efficiency_methods():
    return [EveryOther, Combined]

@hookimpl
def iec_eval_samplers():
    return [Fixed]
"""


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the parts above."""
    with installed_plugin(tmp_path_factory.mktemp("site"), "controlled_parts", PARTS):
        yield


@pytest.fixture
def plans(write_study: Callable[..., Path], tmp_path: Path) -> Plans:
    """``plans(variants, controls=..., **changes)``: every row by its name, in order."""

    def plan(variants: list[Part], *, controls: Any = None, **changes: Any) -> dict[str, Plan]:
        settings = {"sampler": {"name": "ddim", "steps": STEPS}, **changes}
        path = write_study(tmp_path, variants=variants, controls=controls, **settings)
        found = plan_with_controls(load(str(path)), load_registry())
        return {plan.experiment.name: plan for plan in found}

    return plan


def pair(name: str, callbacks: list[Part] | None = None, **more: Any) -> list[Part]:
    """A row with these methods, and one with IEC on top."""
    corrected = {"name": f"{name} + IEC", "extends": name, "callbacks": callbacks or [IEC]}
    return [{"name": name, "efficiency": METHODS[name], **more}, corrected]


def judges(plans: Mapping[str, Plan]) -> dict[str, dict[str, str]]:
    return {
        name: dict(plan.experiment.judge_of)
        for name, plan in plans.items()
        if plan.experiment.judge_of
    }


def rivals(plans: Mapping[str, Plan], row: str, relation: str = "equal-cost") -> list[str]:
    """What is said of the rows that have this relation to the row."""
    return [name for name, plan in plans.items() if plan.experiment.judge_of.get(row) == relation]


def lacks(plans: Mapping[str, Plan], row: str) -> list[str]:
    """What should be there beside the row and is not, and why."""
    return [str(lack) for lack in plans[row].experiment.lacks]


def macs(plan: Plan) -> float:
    expected = expected_evaluations(plan)
    return evaluation_cost(plan).macs(expected.full, expected.cached)


# --- what they cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_more_steps_and_a_smaller_interval_cost_the_same(name: str, plans: Plans) -> None:
    """The steps and the interval as found by hand, from the work of an evaluation alone."""
    found = plans(pair(name), controls=["equal-cost"])
    work = evaluation_cost(found[name])
    interval = INTERVAL if METHODS[name] and "interval" in METHODS[name][0] else 1

    def work_of(steps: int, interval: int = interval) -> float:
        full = math.ceil(steps / interval)
        return work.full.macs * full + work.cached.macs * (steps - full)

    target = work_of(STEPS) + math.ceil(STEPS / interval) * work.full.macs
    assert macs(found[f"{name} + IEC"]) == target
    steps = min(range(STEPS, 100), key=lambda n: (abs(work_of(n) - target), -n))
    fresher = [n for n in range(1, interval) if 0.98 <= work_of(STEPS, n) / target <= 1.1]
    labels = [f"{steps} steps", *[f"interval {n}" for n in fresher[-1:]]]
    wanted = [*[f"{name}: {label}" for label in labels], f"{name} + IEC: Heun"]
    assert rivals(found, f"{name} + IEC") == wanted
    more = found[f"{name}: {steps} steps"]
    assert macs(more) == work_of(steps)
    assert (more.experiment.efficiency, more.experiment.callbacks) == (METHODS[name], [])
    if fresher:
        less = found[f"{name}: interval {fresher[-1]}"]
        assert macs(less) == work_of(STEPS, fresher[-1])
        assert less.experiment.sampler == found[name].experiment.sampler
    assert fresher or interval == 1  # each cached row here has one


def test_more_steps_go_over_the_same_stretch_of_noise(plans: Plans) -> None:
    """Uniform ones, each a timestep after the other, would begin where the image shows already."""
    row = {"name": "row", "efficiency": [{**CACHE, "interval": 5}], "callbacks": [IEC]}
    found = plans([row], controls=["equal-cost"], sampler={"name": "ddim", "steps": 50})
    (more,) = (plan.sampler for name, plan in found.items() if name.endswith(" steps"))
    assert len(more.schedule) % len(more.timesteps)
    assert more.timesteps[0] >= found["row"].sampler.timesteps[0]


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_more_steps_of_a_library_go_over_the_same_stretch_of_noise(
    scheduler: str, plans: Plans
) -> None:
    """Of 100 timesteps: 13 steps cost the same, but begin at 84, as they leave out 100 mod 13."""
    found = of_a_library(scheduler, "leading", plans)
    assert found["row"].sampler.timesteps[0] == 90
    assert [name for name in found if name.endswith(" steps")] == ["row: 14 steps"]
    assert found["row: 14 steps"].sampler.timesteps[0] == 91


def test_steps_that_do_not_follow_each_other_are_no_rival(plans: Plans) -> None:
    """Evenly spaced ones of DDIMScheduler, each of which ends 100 // 13 timesteps on."""
    found = of_a_library("DDIMScheduler", "trailing", plans)
    assert not any(name.endswith(" steps") for name in found)
    (lack,) = (one for one in lacks(found, "row") if "more steps" in one)
    assert "steps of DDIMScheduler, each of 5 timesteps, do not follow each other" in lack
    assert "row: 13 steps" in of_a_library("EulerDiscreteScheduler", "trailing", plans)
    # its own 10 steps, at 99, 88, 77 .. and of 10 timesteps each, do not either: 13 are no worse
    assert "row: 13 steps" in of_a_library("DDIMScheduler", "linspace", plans)


def of_a_library(scheduler: str, spacing: str, plans: Plans) -> dict[str, Plan]:
    config = {"timestep_spacing": spacing}
    sampler = {"name": "diffusers", "scheduler": scheduler, "steps": 10, "config": config}
    row = {"name": "row", "callbacks": [{**IEC, "where": {"ends": "1/6"}}]}  # 3 of 10
    return plans([row], controls=["equal-cost"], sampler=sampler)


def test_of_several_numbers_of_steps_the_nearest_in_cost_is_taken(plans: Plans) -> None:
    """50 steps corrected cost 100; 98 cost the same within 2 %, and would be short of work."""
    found = plans(pair("plain"), controls=["equal-cost"], sampler={"name": "ddim", "steps": 50})
    assert rivals(found, "plain + IEC")[0] == "plain: 100 steps"


SHALLOW: Part = {"name": "deepcache", "cut": 1}  # a cached evaluation is an eighth of a full one


def test_of_several_intervals_the_largest_is_taken(plans: Plans) -> None:
    """Of 100 steps, two are full with N = 50, and four are with any N from 25 to 33."""
    row = {"name": "row", "efficiency": [{**SHALLOW, "interval": 50}], "callbacks": [IEC]}
    found = plans([row], controls=["equal-cost"], sampler={"name": "ddim", "steps": 100})
    assert [name for name in found if "interval" in name] == ["row: interval 33"]


def test_the_next_number_of_steps_is_near_enough(plans: Plans) -> None:
    """Where a step more is a full one, which costs more than 10 % of a short run."""
    twice = [{**IEC, "weights": [0.5, 0.5]}]
    row = {"name": "row", "efficiency": [{**SHALLOW, "interval": 5}], "callbacks": twice}
    found = plans([row], controls=["equal-cost"], sampler={"name": "ddim", "steps": 5})
    rival = found["row: 11 steps"]  # 3 full and 8 cached, against 3 full and 4 cached
    assert macs(rival) > 1.1 * macs(found["row"])
    wanted = "equal-cost rival smaller interval: no interval below 5 costs as much"
    assert wanted in lacks(found, "row")


def test_evaluations_are_counted_once_whatever_the_steps_and_the_interval(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = list[bool]()
    count = cost._count

    def noting(*arguments: Any, full: bool) -> Any:
        counted.append(full)
        return count(*arguments, full=full)

    monkeypatch.setattr(cost, "_count", noting)
    found = plans(pair("cached"))
    assert len(rivals(found, "cached + IEC")) == 3
    cost.evaluation_costs([*found.values()])
    assert counted == [True, True, False]  # full precision's; the cached model's, two kinds


def test_a_correction_of_some_steps_has_rivals_of_its_own_cost(plans: Plans) -> None:
    some = [{**IEC, "where": {"ends": "1/10"}}]
    found = plans(pair("plain", some), controls=["equal-cost"])
    assert rivals(found, "plain + IEC") == ["plain: 24 steps", "plain + IEC: Heun"]
    heun = found["plain + IEC: Heun"].experiment
    assert heun.callbacks == [{"name": "iec", "preset": "heun", "where": {"ends": "1/10"}}]


def test_a_row_that_costs_no_more_has_a_base_and_no_rivals(plans: Plans) -> None:
    found = plans(pair("cached", [{**IEC, "weights": []}]), controls=["equal-cost", "halves"])
    assert judges(found) == {"cached": {"cached + IEC": "base"}}


def test_callbacks_of_others_are_corrections_too(plans: Plans) -> None:
    found = plans(pair("cached", [{"name": "twice"}]), controls=["equal-cost", "zero-cost"])
    labels = [name.rpartition(": ")[2] for name in rivals(found, "cached + IEC")]
    assert labels[0].endswith("steps")
    assert labels[1:] == ["interval 1"]  # every evaluation of it twice; not IEC: no Heun
    wanted = "equal-cost rival Heun: only IEC says which steps it corrects"
    assert lacks(found, "cached + IEC") == [wanted]
    assert rivals(found, "cached + IEC", "zero-cost") == []


def test_a_method_without_an_interval_has_steps_only(plans: Plans) -> None:
    rows = [{"name": "a", "efficiency": [{"name": "every-other"}], "callbacks": [IEC]}]
    found = plans(rows, controls=["equal-cost"])
    # a cached evaluation of this one costs as much as a full one
    assert [*found] == ["a", "a: uncorrected", "a: 30 steps", "a: Heun"]


# --- what cannot be had -------------------------------------------------------------------------


def test_steps_that_a_sampler_refuses_are_passed_over(plans: Plans) -> None:
    """The toy has 100 timesteps, of which the spacing ``ldm`` wants a divisor."""
    found = plans(pair("plain"), controls=["equal-cost"], sampler=ldm(10))
    assert rivals(found, "plain + IEC")[0] == "plain: 20 steps"
    found = plans(pair("plain"), controls=["equal-cost"], sampler=ldm(20))
    assert rivals(found, "plain + IEC") == ["plain + IEC: Heun"]
    (lacking,) = lacks(found, "plain + IEC")
    assert lacking.startswith("equal-cost rival more steps: no number of steps")
    assert "25 cost too little" in lacking


def ldm(steps: int) -> Part:
    return {"name": "ddim", "spacing": "ldm", "steps": steps}


def test_a_sampler_without_steps_is_no_error(plans: Plans) -> None:
    found = plans(pair("plain"), controls=["equal-cost"], sampler={"name": "fixed"})
    assert lacks(found, "plain + IEC") == [
        "equal-cost rival more steps: sampler 'fixed' has no option called steps"
    ]


def test_two_callbacks_that_make_the_evaluations_are_refused_before_anything_runs(
    plans: Plans,
) -> None:
    row = {"name": "row", "callbacks": [{"name": "look-ahead"}, {"name": "time-shift"}]}
    with pytest.raises(Incompatible, match="row: look-ahead and time-shift each make the steps'"):
        plans([row], controls=[])


def test_a_row_that_cannot_be_counted_is_no_error(plans: Plans) -> None:
    found = plans(pair("plain", [{"name": "uncountable"}]), controls=["equal-cost"])
    assert [*found] == ["plain", "plain + IEC"]
    (lacking,) = lacks(found, "plain + IEC")
    assert lacking.endswith("cannot be counted: not before it is told what to do")


@pytest.mark.parametrize("where", [[7, 13], [19], [*range(0, STEPS, 3)], {"ends": "1/5"}])
def test_corrections_at_steps_that_may_turn_out_full_are_not_counted(
    where: Any, plans: Plans
) -> None:
    """A schedule that calibration chooses: is step 7 full, and how many are at the ends?"""
    cached = {"name": "cached", "efficiency": [{**CACHE, "schedule": "dps"}]}
    row = {"name": "row", "extends": "cached", "callbacks": [{**IEC, "where": where}]}
    found = plans([cached, row], controls=["equal-cost", "halves"])
    assert rivals(found, "row") == []
    wanted = "it depends on which steps calibration will choose as full ones"
    (lack,) = (one for one in lacks(found, "row") if one.startswith("equal-cost rivals"))
    assert lack.endswith(f"cannot be counted: {wanted}")
    assert rivals(found, "row", "half")
    for known in ("full", "first", "all", [0], list(range(STEPS))):
        other = {**row, "callbacks": [{**IEC, "where": known}]}
        assert rivals(plans([cached, other], controls=["equal-cost"]), "row"), known


def test_a_row_that_cannot_be_counted_has_the_rivals_that_need_no_count(
    plans: Plans, picky: None
) -> None:
    rows = [
        {"name": "picky", "efficiency": [CACHE, {"name": "picky"}]},
        {"name": "picky + IEC", "extends": "picky", "callbacks": [IEC]},
    ]
    found = plans(rows, controls=["zero-cost", "halves"])
    assert {"picky: epsilon scaling", "picky + IEC: refresh only"} <= found.keys()
    assert lacks(found, "picky + IEC") == []
    found = plans(rows, controls=["equal-cost", "zero-cost"])
    assert {"picky: epsilon scaling", "picky: time shift"} <= found.keys()
    (lacking,) = lacks(found, "picky + IEC")
    assert "what the row costs cannot be counted: Tensor.item() cannot" in lacking


def test_a_control_that_nobody_has_listed_and_the_sampler_refuses_is_no_error(plans: Plans) -> None:
    """IEC on a sampler that clips, where only the study's own row allows that."""
    clipping = {"name": "ddim", "steps": STEPS, "clip_sample": True}
    rows = pair("cached", [{**IEC, "allow_clipping": True}])
    found = plans(rows, sampler=clipping)
    assert "full precision + IEC" not in found
    (lacking,) = lacks(found, "full precision")
    assert lacking.startswith("the control full precision + IEC: iec: the sampler clips")
    assert found["cached + IEC: Heun"].experiment.callbacks[0]["allow_clipping"] is True
    with pytest.raises(Incompatible, match=r"full precision \+ IEC: iec: the sampler clips"):
        plans(rows, controls=["full-precision+iec"], sampler=clipping)


def test_stages_that_are_no_methods_of_their_own_are_not_stacked(plans: Plans) -> None:
    found = plans([{"name": "row", "efficiency": [{"name": "combined"}]}])
    assert [*found] == ["full precision", "row"]
    (lacking,) = lacks(found, "row")
    assert lacking.startswith("naive stacking: unknown efficiency method 'inner")


# --- Heun, zero cost, halves, stacking ----------------------------------------------------------


def test_heun_is_the_rival_of_one_correction_only(plans: Plans) -> None:
    twice = plans(
        pair("plain", [{**IEC, "weights": [0.5, 0.5]}]),
        controls=["equal-cost"],
        sampler={"name": "ddim", "steps": STEPS, "spacing": "quad"},
    )
    # 3 x 20, but for the two steps from a timestep to itself, which converge at once
    assert rivals(twice, "plain + IEC") == ["plain: 58 steps"]
    wanted = "equal-cost rival Heun: it costs as much as one correction a step, not as several"
    assert lacks(twice, "plain + IEC") == [wanted]
    heun = plans(pair("plain", [{**IEC, "preset": "heun"}]), controls=["equal-cost"])
    assert rivals(heun, "plain + IEC") == ["plain: 39 steps"]  # the last step has none


def test_heun_may_lack_the_one_evaluation_that_the_last_step_has_not(plans: Plans) -> None:
    found = plans(pair("plain"), controls=["equal-cost"])
    one = evaluation_cost(found["plain"]).full.macs
    assert macs(found["plain + IEC"]) - macs(found["plain + IEC: Heun"]) == one
    last = plans(pair("plain", [{**IEC, "where": [STEPS - 1]}]), controls=["equal-cost"])
    assert not any("Heun" in name for name in last)
    (lacking,) = last["plain + IEC"].experiment.lacks
    assert (lacking.relation, lacking.what) == ("equal-cost", "equal-cost rival Heun")


def test_heun_alone_is_the_rival_that_needs_no_other_calibration(plans: Plans) -> None:
    rows = pair("cachequant")
    found = plans(rows, controls=["heun"])
    assert rivals(found, "cachequant + IEC") == ["cachequant + IEC: Heun"]
    keys = {key for _, key in artifact_keys(found["cachequant"])}
    assert {key for _, key in artifact_keys(found["cachequant + IEC: Heun"])} == keys
    every = plans(rows, controls=["equal-cost", "heun"])
    assert len(rivals(every, "cachequant + IEC")) == 3
    cheap = pair("plain", [{**IEC, "weights": []}])
    assert rivals(plans(cheap, controls=["heun"]), "plain + IEC") == []


def test_each_of_several_iecs_is_replaced(plans: Plans) -> None:
    """As the analysis recommends them: one for each lambda, at its steps."""
    parts = [
        {"name": "iec", "weights": [0.3], "where": [0, 5]},
        {"name": "epsilon-scaling"},
        {"name": "iec", "weights": [0.9], "where": [10, 15]},
    ]
    found = plans(pair("cached", parts))
    heun = [{"name": "iec", "preset": "heun", "where": part.get("where")} for part in parts]
    added = {
        "Heun": [heun[0], parts[1], heun[2]],
        "refresh only": [{**part, "correct": False} for part in parts],
        "correction only": [{**part, "refresh_cache": False} for part in parts],
    }
    for label, wanted in added.items():
        row = found[f"cached + IEC: {label}"]
        assert row.experiment.callbacks == [wanted[0], parts[1], wanted[2]]
        assert macs(row) == macs(found["cached + IEC"])
    (scaled,) = found["cached: scale-matched"].experiment.callbacks
    assert scaled == {"name": "scale-matched", "of": [parts[0], parts[2]]}


def test_a_row_that_costs_no_more_gets_a_base_too(plans: Plans) -> None:
    row = {"name": "row", "efficiency": [CACHE], "callbacks": [{"name": "epsilon-scaling"}]}
    assert judges(plans([row], controls=["equal-cost"])) == {"row: uncorrected": {"row": "base"}}
    assert [*plans([row], controls=["zero-cost"])] == ["row"]


def test_rivals_without_callbacks_are_compared_with_what_they_start_from(plans: Plans) -> None:
    found = plans(pair("cached"), controls=["equal-cost"])
    steps = f"cached: {found_steps(found, 'cached + IEC')} steps"
    made = {"cached + IEC", "cached + IEC: Heun", steps, *(n for n in found if "interval" in n)}
    assert found["cached"].experiment.judge_of == dict.fromkeys(made, "base")
    assert len(made) == 4


def test_a_row_of_the_study_that_is_a_rival_is_on_no_trial(plans: Plans) -> None:
    """Else an uncorrected row would be told to be better than the other's base, and counted."""
    added = plans(pair("cached"), controls=["equal-cost"])
    (name,) = (name for name in rivals(added, "cached + IEC") if "interval" in name)
    assert added["cached"].experiment.judge_of[name] == "base"
    own = {"name": "mine", "efficiency": added[name].experiment.efficiency}
    found = plans([own, *pair("cached")], controls=["equal-cost"])
    assert "mine" in rivals(found, "cached + IEC")
    assert "mine" not in found["cached"].experiment.judge_of


def test_full_precision_that_is_a_rival_too_has_no_base(plans: Plans) -> None:
    row = {"name": "short + IEC", "sampler": {"steps": STEPS // 2}, "callbacks": [IEC]}
    found = plans([row], controls=["full-precision", "equal-cost"])
    assert "full precision" in rivals(found, "short + IEC")
    judged = {name for plan in found.values() for name in plan.experiment.judge_of}
    assert "full precision" not in judged


def test_a_rival_of_two_rows_is_held_against_one_base(plans: Plans) -> None:
    """Numbers and verdicts would name different ones."""
    rows = [
        row
        for interval in (5, 6)
        for row in (
            {"name": f"N{interval}", "efficiency": [{**CACHE, "interval": interval}]},
            {
                "name": f"N{interval} + IEC",
                "efficiency": [{**CACHE, "interval": interval}],
                "callbacks": [{**IEC, "where": [0]}],
            },
        )
    ]
    found = plans(rows, controls=["equal-cost"])
    shared = [one for one in found.values() if len(one.experiment.judge_of) > 1]
    assert any([*one.experiment.judge_of.values()].count("equal-cost") > 1 for one in shared)
    for name in found:
        bases = [one for one in found if found[one].experiment.judge_of.get(name) == "base"]
        assert len(bases) <= 1


def test_a_correction_of_less_than_2_percent_gets_a_base_of_its_own(plans: Plans) -> None:
    row = {"name": "row", "callbacks": [{**IEC, "where": "first"}]}
    found = plans([row], controls=["equal-cost"], sampler={"name": "ddim", "steps": 100})
    assert judges(found) == {"row: uncorrected": {"row": "base"}}


def test_a_cheap_correction_has_its_base_for_an_equal_and_free_rivals(plans: Plans) -> None:
    """One evaluation in 100 more: within the tolerance, but not free."""
    cheap = [{**IEC, "where": "first"}]
    found = plans(pair("plain", cheap), sampler={"name": "ddim", "steps": 100}, controls=None)
    assert rivals(found, "plain + IEC") == []
    assert rivals(found, "plain + IEC", "base") == ["plain"]
    assert len(rivals(found, "plain + IEC", "zero-cost")) == 4
    assert lacks(found, "plain + IEC") == []


def test_a_row_of_another_sampler_is_no_base(plans: Plans) -> None:
    rows = [
        {"name": "short", "sampler": {"steps": 3}},
        {"name": "long + IEC", "callbacks": [IEC]},
    ]
    for controls in ([], ["full-precision"], ["equal-cost"]):
        found = plans(rows, controls=controls)
        assert "short" not in rivals(found, "long + IEC", "base")


def test_zero_cost_rivals_are_the_base_with_one_callback(plans: Plans) -> None:
    given = {**IEC, "weights": [0.25]}
    found = plans(pair("quantized", [given]), controls=["zero-cost"])
    labels = {
        "epsilon scaling": {"name": "epsilon-scaling"},
        "time shift": {"name": "time-shift"},
        "scale-matched": {"name": "scale-matched", "of": given},
        "self-consistent": {"name": "self-consistent"},
    }
    names = [f"quantized: {label}" for label in labels]
    assert rivals(found, "quantized + IEC", "zero-cost") == names
    for name, part in zip(names, labels.values(), strict=True):
        row = found[name]
        assert (row.experiment.callbacks, row.experiment.efficiency) == ([part], [QUANTIZER])
        assert macs(row) == macs(found["quantized"])


def test_halves_are_of_cached_rows(plans: Plans) -> None:
    found = plans([*pair("cached"), *pair("quantized")], controls=["halves"])
    halves = {"correction only": {**IEC, "refresh_cache": False}}
    if "correct" in IECOptions.model_fields:
        halves = {"refresh only": {**IEC, "correct": False}, **halves}
    names = [f"cached + IEC: {label}" for label in halves]
    assert rivals(found, "cached + IEC", "half") == names
    assert rivals(found, "quantized + IEC", "half") == []
    for name, part in zip(names, halves.values(), strict=True):
        assert found[name].experiment.callbacks == [part]
        assert macs(found[name]) == macs(found["cached + IEC"])
    without = plans(pair("cached", [{**IEC, "refresh_cache": False}]), controls=["halves"])
    assert rivals(without, "cached + IEC", "half") == []
    assert lacks(without, "cached + IEC") == []


def test_the_parts_of_a_composite_are_stacked(plans: Plans) -> None:
    both = {**CACHEQUANT, "schedule": "dps", "quantizer": {"weight_bits": 4}}
    rows = [{"name": "both", "efficiency": [both]}, *pair("cachequant"), *pair("cached")]
    found = plans(rows, controls=["naive-stacking"])
    added = {name: plan.experiment for name, plan in found.items() if plan.experiment.control}
    assert [*added] == ["both: naive stacking", "cachequant: naive stacking"]
    assert added["both: naive stacking"].efficiency == [
        {**CACHE, "schedule": "dps"},
        {**QUANTIZER, "weight_bits": 4},
    ]
    assert added["cachequant: naive stacking"].efficiency == [CACHE, QUANTIZER]
    assert added["cachequant: naive stacking"].judge_of == {"cachequant": "stacking"}


# --- sharing ------------------------------------------------------------------------------------


def test_rows_that_are_there_judge_and_are_not_made_twice(plans: Plans) -> None:
    known: list[Part] = [
        {"name": "more", "efficiency": [CACHE], "sampler": {"steps": 30}},
        {"name": "stacked", "efficiency": [CACHE, {**QUANTIZER, "weight_bits": 8}]},
        {"name": "half", "efficiency": [CACHE], "callbacks": [{**IEC, "refresh_cache": False}]},
    ]
    rows = [*pair("cached"), pair("cachequant")[0]]
    first = plans(rows)
    steps = found_steps(first, "cached + IEC")
    known[0]["sampler"] = first[f"cached: {steps} steps"].experiment.sampler
    found = plans([*rows, *known])
    assert found["more"].experiment.judge_of["cached + IEC"] == "equal-cost"
    assert found["stacked"].experiment.judge_of == {"cachequant": "stacking"}
    assert found["half"].experiment.judge_of["cached + IEC"] == "half"
    merged = {f"cached: {steps} steps", "cached + IEC: correction only"}
    assert merged | {"cachequant: naive stacking"} <= first.keys()
    assert not (merged | {"cachequant: naive stacking"}) & found.keys()
    prints = [plan.fingerprint for plan in found.values()]
    assert len(set(prints)) == len(prints)


def found_steps(plans: Mapping[str, Plan], row: str) -> int:
    (name,) = [name for name in rivals(plans, row) if name.endswith(" steps")]
    return len(plans[name].sampler.timesteps)


def test_rows_that_need_the_same_rival_share_it(plans: Plans) -> None:
    other = {"name": "softer", "extends": "cached", "callbacks": [{**IEC, "weights": [0.25]}]}
    found = plans([*pair("cached"), other], controls=["equal-cost"])
    steps = f"cached: {found_steps(found, 'cached + IEC')} steps"
    assert found[steps].experiment.judge_of == {
        "cached + IEC": "equal-cost",
        "softer": "equal-cost",
    }
    assert [name for name in found if name.startswith("softer")] == ["softer"]


def test_each_row_is_followed_by_what_was_added_for_it(plans: Plans) -> None:
    found = plans([*pair("cached"), *pair("plain"), *pair("quantized")])
    own, owner = list[str](), ""
    for name in found:
        if ": " not in name:
            own.append(owner := name)
        base = owner.removesuffix(" + IEC")
        assert name == owner or name.startswith((f"{owner}: ", f"{base}: "))
    names = [
        f"{name}{more}" for name in ("cached", "plain", "quantized") for more in ("", " + IEC")
    ]
    assert own == names  # plain is full precision


def test_a_base_is_added_where_a_rival_needs_it(plans: Plans) -> None:
    row = {"name": "row", "efficiency": [CACHE], "callbacks": [IEC]}
    for controls in (["equal-cost"], ["zero-cost"], ["halves"]):
        found = plans([row], controls=controls)
        base = found["row: uncorrected"].experiment
        assert base.judge_of["row"] == "base"
        assert {*base.judge_of} == found.keys() - {"row: uncorrected"}  # the row and its rivals
        assert {*base.judge_of.values()} == {"base"}
        assert (base.efficiency, base.callbacks, base.control) == ([CACHE], [], True)
    assert [*plans([row], controls=["full-precision"])] == ["full precision", "row"]
    both = plans([{**row, "efficiency": [CACHEQUANT]}], controls=["equal-cost", "naive-stacking"])
    assert [name for name in both if name.endswith("naive stacking")] == [
        "row: uncorrected: naive stacking"  # not of each rival
    ]
    stacked = both["row: uncorrected: naive stacking"].experiment
    assert stacked.judge_of == {"row: uncorrected": "stacking"}


def test_names_differ_from_those_of_the_study(plans: Plans) -> None:
    """Also where a row of the study is called like a control and is something else."""
    taken = [
        {"name": "plain + IEC: Heun", "efficiency": [QUANTIZER]},
        {"name": "full precision", "sampler": {"steps": 3}},
    ]
    found = plans([*pair("cached"), *pair("plain"), *taken])
    assert "plain + IEC: Heun (control)" in found
    assert found["full precision"].experiment.sampler["steps"] == 3


# --- which there are ----------------------------------------------------------------------------


def added(plans: Mapping[str, Plan]) -> list[str]:
    return [name for name, plan in plans.items() if plan.experiment.control]


def test_a_study_says_which_controls_there_are(plans: Plans) -> None:
    rows = pair("cached")
    assert added(plans(rows, controls=[])) == []
    assert judges(plans(rows, controls=[])) == {"cached": {"cached + IEC": "base"}}
    some = plans(rows, controls=["full-precision"])
    assert added(some) == ["full precision"]
    assert judges(some) == {
        "full precision": {"cached": "full-precision", "cached + IEC": "full-precision"},
        "cached": {"cached + IEC": "base"},
    }
    every = plans(rows)
    alike = {name for name, plan in every.items() if len(plan.sampler.timesteps) == STEPS}
    judged = every["full precision"].experiment.judge_of
    for name in every.keys() - {"full precision"}:
        cached = "full-precision" if name in alike else None  # more steps have another sampler
        assert judged.get(name) == (cached if name.startswith("cached") else "base")
    labels = {name.rpartition(": ")[2] for name in added(every)}
    wanted = {"full precision", "full precision + IEC", "Heun", "epsilon scaling", "time shift"}
    assert wanted | {"scale-matched", "self-consistent", "correction only"} <= labels
    assert rivals(every, "full precision + IEC")  # which is a corrected row too


def test_full_precision_corrected_alike_judges_what_is_corrected_alike(plans: Plans) -> None:
    """At other steps, with another K, or at the full ones of a cached row, it is not the same."""
    twice = {"name": "twice", "efficiency": [QUANTIZER], "callbacks": [{**IEC, "corrections": 2}]}
    other = {"name": "other steps", "sampler": {"steps": 10}, "extends": "quantized + IEC"}
    found = plans([*pair("quantized"), *pair("cached"), twice, other])
    judged = found["full precision + IEC"].experiment.judge_of
    alike = {name for name, relation in judged.items() if relation == "corrected-alike"}
    assert alike == {"quantized + IEC"}
    steps = [*range(0, STEPS, INTERVAL)]
    same = {"name": "same steps", "callbacks": [{**IEC, "where": steps}]}
    cached = {"name": "cached", "efficiency": [CACHE], "callbacks": same["callbacks"]}
    assert plans([same, cached])["same steps"].experiment.judge_of["cached"] == "corrected-alike"
    assert "corrected-alike" not in found["full precision"].experiment.judge_of.values()
    some = judges(plans(pair("cached"), controls=["full-precision"]))
    assert "corrected-alike" not in {r for relations in some.values() for r in relations.values()}


def test_without_a_list_only_what_applies_is_added(plans: Plans) -> None:
    assert added(plans([{"name": "cached", "efficiency": [CACHE]}])) == ["full precision"]
    own = [{"name": "mine"}, {"name": "my IEC", "callbacks": [IEC]}]
    assert not {"full precision", "full precision + IEC"} & {*added(plans(own))}
    twice = [{"name": "cached", "efficiency": [CACHE], "callbacks": [{"name": "twice"}]}]
    assert "full precision + IEC" not in added(plans(twice))


def test_a_row_of_the_study_is_full_precision_however_it_is_written(plans: Plans) -> None:
    """Defaults spelled out; what the study says of rows is said of those that are there."""
    same = {"preset": "paper", "where": "full"}
    own = [
        {"name": "mine", "sampler": {"eta": 0.0}},
        {"name": "my IEC", "callbacks": [{"name": "iec", **same}]},
    ]
    assert not {"full precision", "full precision + IEC"} & {*added(plans(own))}
    other = [own[0], {"name": "my IEC", "callbacks": [{"name": "iec", "where": "first"}]}]
    assert added(plans(other))[0] == "full precision + IEC"
    said = {"paper": {"full precision": {"fid": 4.0}}}
    assert plans(pair("cached"), **said)
    with pytest.raises(UnknownName, match="variant in paper: 'full precision'"):
        plans(own, **said)


def test_full_precision_is_none_of_the_rivals(plans: Plans) -> None:
    """Rivals of full precision + IEC have no methods and callbacks either."""
    fewer = {"name": "fewer + IEC", "sampler": {"steps": 10}, "callbacks": [IEC]}
    for rows, name in (
        ([fewer, {"name": "mine"}], "mine"),
        ([fewer, *pair("cached")], "full precision"),
    ):
        found = [plan.experiment for plan in plans(rows).values()]
        assert sum(not row.efficiency and not row.callbacks for row in found) > 2
        base = full_precision(found)
        assert base is not None
        assert base.name == name


# --- real rows ----------------------------------------------------------------------------------


def images(folder: Path) -> torch.Tensor:
    chunks = sorted(folder.glob("chunks/*.safetensors"))
    return torch.cat([read_sealed(chunk)[0]["images"] for chunk in chunks])


def test_a_rival_is_what_a_study_that_names_it_makes(
    cli: Callable[..., Result], write_study: Callable[..., Path], toy: Toy, tmp_path: Path
) -> None:
    """The same images and costs; the results say whom each row judges, and what there is."""
    controls = ["equal-cost", "halves"]
    shared = {"images": {"seed": 3, "count": 4}, "calibration": {"seed": 1, "images": 2}}
    study = write_study(tmp_path, variants=VARIANTS[1:], controls=controls, **shared)
    assert cli("launch", study, "-o", tmp_path / "a").exit_code == 0
    results = read_results(tmp_path / "a" / "results.json")
    assert results.controls == controls
    found = {row.name: row for row in results.variants if row.control}
    shown = {row["name"]: row for row in json.loads(cli("show", study, "--json").stdout)["rows"]}
    assert {name: row.judge_of for name, row in found.items()} == {
        name: shown[name]["judge_of"] for name in found
    }
    by_hand = [
        {
            "name": f"by hand {i}",
            "efficiency": row.efficiency,
            "callbacks": row.callbacks,
            "sampler": {"steps": shown[row.name]["steps"]},
        }
        for i, row in enumerate(found.values())
    ]
    again = write_study(tmp_path, variants=by_hand, **shared)
    assert cli("launch", again, "-o", tmp_path / "b").exit_code == 0
    own = read_results(tmp_path / "b" / "results.json").variants
    for row, other in zip(found.values(), own, strict=True):
        (here,), (there,) = (
            [*(tmp_path / place).glob(f"*-{one.fingerprint[:8]}")]
            for place, one in (("a", row), ("b", other))
        )
        assert torch.equal(images(here), images(there))
        assert row.cost.macs_per_image == other.cost.macs_per_image
        assert row.cost.macs_per_image == shown[row.name]["macs_per_image"]
    assert len(found) >= 3


def test_show_says_what_an_added_row_is_for(
    cli: Callable[..., Result], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = write_study(tmp_path, variants=pair("plain"), controls=["equal-cost"], sampler=ldm(20))
    lines = cli("show", study).stdout.splitlines()
    heun = next(i for i, line in enumerate(lines) if line.startswith("plain + IEC: Heun: "))
    assert "39 full + 0 cached evaluations" in lines[heun]
    assert lines[heun + 1] == "    equal-cost rival of plain + IEC"
    lacking = [
        line
        for line in lines
        if line.startswith("    lacks equal-cost rival more steps: no number")
    ]
    assert len(lacking) == 1
    rows = {row["name"]: row for row in json.loads(cli("show", study, "--json").stdout)["rows"]}
    assert rows["plain + IEC: Heun"]["judge_of"] == {"plain + IEC": "equal-cost"}
    assert [lack["relation"] for lack in rows["plain + IEC"]["lacks"]] == ["equal-cost"]
