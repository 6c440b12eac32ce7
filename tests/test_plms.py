"""PLMS: as recorded from the authors' code, as in diffusers, and IEC at its first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SCHEDULE, ConvNet, FixedNoise, Recorder, Spy, build, oracle, original_ldm, run
from test_oracles import assert_recorded
from torch import Tensor

from iec_eval.calibration import Bench
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.denoising import Condition
from iec_eval.efficiency.deepcache import DeepCache
from iec_eval.efficiency.reconstruction_data import gather_items
from iec_eval.errors import ConfigError
from iec_eval.samplers.plms import PLMS
from iec_eval.schedule import NoiseSchedule
from iec_eval.testing import TinyModel, check_sampler

STABLE_DIFFUSION = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012)


def plms(steps: int, schedule: NoiseSchedule = SCHEDULE) -> PLMS:
    sampler: PLMS = build(PLMS, {"steps": steps}, schedule)
    return sampler


@cache
def network() -> Any:
    return original_ldm("sd")


def recorded_run(steps: int, interval: int) -> tuple[Tensor, Recorder, Clock]:
    """The guided trajectory that was recorded, with a cache that is full at every N-th step."""
    tensors, _ = oracle("plms_sd")
    states = [{"encoder_hidden_states": tensors[f"in/{name}"]} for name in ("cond", "uncond")]
    method = build(DeepCache, {"interval": interval, "cut": 1})
    clock, recorder = Clock(steps, method.full_steps(steps, {})), Recorder()
    cached = method.apply(network(), clock, {})
    sampler, start = plms(steps, STABLE_DIFFUSION), FixedNoise(tensors["in/x_T"])
    told = Condition(states[0], states[1], 7.5)
    final = run(cached, sampler, start, [recorder], condition=told, clock=clock)
    return torch.stack([*recorder.states, final]), recorder, clock


@pytest.mark.parametrize(
    ("name", "steps", "interval"),
    [("plms10", 10, 1), ("plms20", 20, 1), ("plms10_cacheN3", 10, 3), ("plms20_cacheN5", 20, 5)],
)
def test_recorded_trajectories(name: str, steps: int, interval: int) -> None:
    tensors, about = oracle("plms_sd")
    states, recorder, clock = recorded_run(steps, interval)
    assert_recorded(states, tensors[f"out/{name}/x"], about)
    # what the network itself says; at the first step the recorder is shown the average
    found = torch.stack(recorder.predictions[1:])
    assert_recorded(found, tensors[f"out/{name}/eps"][1:], about)
    if interval > 1:
        calls = tensors[f"in/{name}/full_calls"].tolist()
        assert sorted(clock.full_steps) == [max(call - 1, 0) for call in calls]
    full, images = len(clock.full_steps), len(states[0])
    evaluations = (clock.evaluations.full, clock.evaluations.cached)
    wanted = (full + (interval == 1), steps - full + (interval > 1))
    assert evaluations == tuple(images * count for count in wanted)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_timesteps(steps: int) -> None:
    tensors, _ = oracle("ldm_ddim")
    assert list(plms(steps).timesteps) == tensors[f"out/timesteps/T{steps}"].tolist()


def test_diffusers_takes_the_same_steps() -> None:
    """Its PNDM without Runge-Kutta steps is PLMS, with one loop step more."""
    from diffusers import PNDMScheduler

    theirs = PNDMScheduler(
        1000, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, beta_schedule="linear"
    )
    theirs.set_timesteps(20)
    net, sample = ConvNet(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = run(net, plms(20), FixedNoise(sample))
    for timestep in theirs.timesteps:
        with torch.no_grad():
            eps = net(sample, timestep.expand(2))
        sample = theirs.step(eps, timestep, sample).prev_sample
    torch.testing.assert_close(found, sample, atol=1e-5, rtol=1e-5)


def test_it_keeps_the_contract() -> None:
    check_sampler(PLMS, {"steps": 10})
    check_sampler(PLMS, {"steps": 1})


def test_iec_at_the_first_step_is_ours_written_out() -> None:
    """The average is refined; the history takes the first evaluation as it was."""
    weight, net, sampler = 0.3, ConvNet(), plms(4)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    iec = build(IEC, {"weights": [weight], "where": "first", "tolerance": None})
    found = run(net, sampler, FixedNoise(start), [iec])

    def eps(x: Tensor, index: int) -> Tensor:
        return net(x, torch.full((2,), float(sampler.timesteps[index])))

    move, combine = sampler._move, torch.stack
    with torch.no_grad():
        e0 = eps(start, 0)
        mean = (e0 + eps(move(start, 0, e0), 1)) / 2
        refined = (1 - weight) * mean + weight * eps(move(start, 0, mean), 0)
        x = move(start, 0, refined)
        e1 = eps(x, 1)
        x = move(x, 1, combine([3 * e1, -e0]).sum(0) / 2)
        e2 = eps(x, 2)
        x = move(x, 2, combine([23 * e2, -16 * e1, 5 * e0]).sum(0) / 12)
        e3 = eps(x, 3)
        x = move(x, 3, combine([55 * e3, -59 * e2, 37 * e1, -9 * e0]).sum(0) / 24)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full_steps", [range(4), [0, 2]])
def test_the_clock_stays_at_the_first_step_for_both_evaluations(full_steps: Any) -> None:
    """And the second is a cached one where there are any."""
    clock = Clock(4, full_steps)
    spy = Spy(ConvNet(), clock)
    run(spy, plms(4), FixedNoise(torch.randn(1, 3, 8, 8)), clock=clock)
    caches = len(list(full_steps)) < 4
    found = [call[:3] for call in spy.calls]
    assert found[:2] == [(0, 0, True), (0, 1, not caches)]
    assert found[2:] == [(step, 0, step in full_steps) for step in (1, 2, 3)]


def test_the_second_evaluation_leaves_the_cache_alone() -> None:
    model = TinyModel()
    method = build(DeepCache, {"interval": 2, "cut": 1})
    clock, features = Clock(4), []
    cached = method.apply(model.load(), clock, {})
    condition = model.condition(range(1))

    class Look(Recorder):
        def refine(self, step: Any, prediction: Tensor) -> Tensor:
            features.append(cached.feature.clone())
            if step.index == 0:
                step.predict(step.sample, store=True)
                features.append(cached.feature.clone())
            return prediction

    sample = torch.randn(1, *model.shape)
    run(cached, plms(4), FixedNoise(sample), [Look()], clock=clock, condition=condition)
    assert torch.equal(features[0], features[1])


def test_steps_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="30 steps do not divide the model's 1000 timesteps"):
        plms(30)


def test_as_many_steps_as_timesteps_are_refused() -> None:
    """They would begin at timestep 1000 of 0..999."""
    assert plms(500).timesteps[0] == 999
    with pytest.raises(ConfigError, match=r"1000 steps wanted; .* allow 500 at most"):
        plms(1000)


# --- with everything around it ----------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 2])
def test_items_of_reconstruction_are_of_each_step_s_own_evaluation(cut: int | None) -> None:
    """The second evaluation of step 0, at another timestep, is not among them."""
    model, sampler = TinyModel(), plms(5)
    bench = Bench(model.load(), Clock(5), model, sampler, seed=1, images=4)
    items = gather_items(bench, model.load(), cut, 20)
    assert torch.bincount(items.steps).tolist() == [4] * 5
    found = zip(items.steps.tolist(), items.arguments.positional[1].tolist(), strict=True)
    assert set(found) == set(enumerate(sampler.timesteps))


CACHE = {"name": "deepcache", "interval": 5, "cut": 2}
LEARNED = {
    "name": "cachequant",
    "interval": 5,
    "cut": 2,
    "schedule": "dps",
    "quantizer": {"weight_bits": 4},
    "reconstruction": {"iterations": 2, "items": 16, "batch_size": 4},
}
FIRST = [{"name": "iec", "where": "first"}]
ROWS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "full precision": ({}, (11, 0)),
    "full precision + IEC": ({"callbacks": FIRST}, (12, 0)),
    "cached": ({"efficiency": [CACHE]}, (2, 9)),
    "cached + IEC": ({"efficiency": [CACHE], "callbacks": FIRST}, (3, 9)),
    "learned + IEC": ({"efficiency": [LEARNED], "callbacks": FIRST}, (3, 9)),
}


def test_whole_runs_and_their_evaluations(
    cli: Callable[..., Any], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """T + 1 evaluations, the one too many cached where some are: as shown, and as done."""
    study = write_study(
        tmp_path,
        sampler={"name": "plms", "steps": 10},
        images={"seed": 7, "count": 4},
        calibration={"seed": 1, "images": 2},
        variants=[{"name": name, **row} for name, (row, _) in ROWS.items()],
    )
    wanted = {name: evaluations for name, (_, evaluations) in ROWS.items()}
    listed = cli("show", study, "--json")
    assert listed.exit_code == 0, listed.stderr
    shown = json.loads(listed.stdout)["rows"]
    assert {row["name"]: evaluations(row) for row in shown} == wanted
    done = cli("launch", study, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["name"]: evaluations(row["cost"]) for row in results["variants"]} == wanted


def evaluations(cost: dict[str, Any]) -> tuple[float, float]:
    return cost["evaluations_full"], cost["evaluations_cached"]
