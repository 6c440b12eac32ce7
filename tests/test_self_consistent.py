"""Our own correctors: one taught by finer steps of the network itself, and look-ahead refresh."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SCHEDULE, ConvNet, FixedNoise, build, ddim, packaged, run, trajectory, unet
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.callbacks import self_consistent
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.look_ahead import LookAhead
from iec_eval.callbacks.self_consistent import (
    SelfConsistent,
    Substep,
    advanced,
    combined,
    finer_grid,
)
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, Step
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import State
from iec_eval.samplers.ddim import DDIM, ddim_coefficients
from iec_eval.samplers.diffusers import DiffusersSampler
from iec_eval.samplers.plms import PLMS
from iec_eval.testing import TinyModel

SHAPE = (3, 8, 8)


def bench_on(network: nn.Module, sampler: Any, clock: Clock, images: int = 8) -> Bench:
    return Bench(network, clock, TinyModel(), sampler, seed=2, images=images)


def move(x: Tensor, eps: Tensor, levels: Any) -> Tensor:
    a, b = ddim_coefficients(*levels)
    return a * x + b * eps


# --- the fit ----------------------------------------------------------------------------------


def fitted_by_hand(network: nn.Module, sampler: Any, middles: list[int]) -> list[list[float]]:
    """Two substeps for each step, one earlier prediction, eight images of which two judge."""
    denoiser = Denoiser(network, TinyModel().calibration_condition(range(8)), Clock(4))
    x = teacher = Noise(2, range(8), SHAPE, calibration=True).initial()
    earlier, table = None, []
    for index, (own, middle) in enumerate(zip(sampler.timesteps, middles, strict=True)):
        now, then = sampler._abar[index : index + 2]
        half = SCHEDULE.abar(middle)
        teacher = move(teacher, denoiser(teacher, own), (now, half))
        teacher = move(teacher, denoiser(teacher, middle), (half, then))
        e = denoiser(x, own)
        a, b = ddim_coefficients(now, then)
        known = [e] if earlier is None else [e, earlier]
        columns = [np.stack([b * k[part].double().numpy().ravel() for k in known], axis=1)
                   for part in (slice(6), slice(6, 8))]  # fmt: skip
        wanted = (teacher - a * x).double().numpy().reshape(8, -1)
        c = np.linalg.lstsq(columns[0], wanted[:6].ravel(), rcond=None)[0].tolist()
        plain = [1.0, 0.0][: len(c)]
        far, near = (wanted[6:].ravel() - columns[1] @ np.array(w) for w in (plain, c))
        c = c if near @ near < 0.99 * far @ far else plain
        table.append([*c, 0.0][:2])
        x = a * x + b * sum(weight * k for weight, k in zip(c, known, strict=True))
        earlier = e
    return table


def test_the_fit_is_the_least_squares_of_a_loop_by_hand() -> None:
    network, sampler, clock = ConvNet(strength=2.0), ddim(steps=4), Clock(4)
    corrector = build(SelfConsistent, {"substeps": 2})
    corrector.check(sampler, clock)
    with torch.inference_mode():
        wanted = fitted_by_hand(network, sampler, [625, 375, 125, 0])
    found = corrector.calibrate(bench_on(network, sampler, clock))["coefficients"]
    assert found.shape == (4, 2)
    torch.testing.assert_close(found[:3], torch.tensor(wanted[:3]).double(), rtol=1e-3, atol=1e-3)
    assert (found[1:3] - torch.tensor([1.0, 0.0])).abs().max() > 0.05


def test_combining_is_free_and_starts_anew_with_each_trajectory() -> None:
    network, sampler, clock = ConvNet(strength=2.0).double(), ddim(steps=3), Clock(3)
    table = [[1.0, 0.0, 0.0], [1.5, -0.5, 0.0], [2.0, -1.5, 0.5]]
    corrector = build(SelfConsistent, {"history": 2})
    corrector.use({"coefficients": torch.tensor(table, dtype=torch.float64)})
    x = Noise(5, range(2), SHAPE).initial().double()
    states = trajectory(network, sampler, FixedNoise(x), [corrector], clock=clock)
    run(network, sampler, FixedNoise(x[:1]), [corrector], clock=clock)  # another batch between
    again = trajectory(network, sampler, FixedNoise(x), [corrector], clock=clock)
    assert torch.equal(states, again)
    assert clock.evaluations.full == (2 + 1 + 2) * 3
    e = [network(x, torch.full((2,), t)) for x, t in zip(states, sampler.timesteps, strict=False)]
    steps = list(itertools.pairwise(sampler._abar))
    second = move(states[1], 1.5 * e[1] - 0.5 * e[0], steps[1])
    third = move(states[2], 2.0 * e[2] - 1.5 * e[1] + 0.5 * e[0], steps[2])
    torch.testing.assert_close(states[2], second)
    torch.testing.assert_close(states[3], third)


@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_a_teacher_that_is_the_student_teaches_nothing(spacing: str) -> None:
    network, sampler = ConvNet(strength=2.0), ddim(steps=6, spacing=spacing)
    corrector = build(SelfConsistent, {"substeps": 1})
    found = corrector.calibrate(bench_on(network, sampler, Clock(6)))["coefficients"]
    assert found.tolist() == [[1.0, 0.0]] * 6
    prediction = torch.ones(1)
    assert combined([prediction, prediction], found[1].tolist()) is prediction


class TwoKinds(nn.Module):
    """At other timesteps than 500 and 0 longer predictions, shorter ones for the last of four."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        kind = torch.where(class_labels == 3, -0.5, 0.5) * (timestep % 500 > 0)
        return (0.5 + 0.5 * kind).view(-1, 1, 1, 1) * sample


def test_what_does_not_help_images_it_has_not_seen_is_left_out() -> None:
    assert TinyModel().calibration_condition(range(4)).inputs["class_labels"].tolist()[3] == 3
    corrector = build(SelfConsistent, {"history": 0})
    found = corrector.calibrate(bench_on(TwoKinds(), ddim(steps=2), Clock(2), images=4))
    assert found["coefficients"].tolist() == [[1.0]] * 2


def test_a_run_that_is_near_to_its_teacher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def changes(strength: float, near: float) -> bool:
        monkeypatch.setattr(self_consistent, "NEAR", near)
        corrector = build(SelfConsistent)
        bench = bench_on(ConvNet(strength=strength), ddim(steps=10), Clock(10), images=16)
        table = corrector.calibrate(bench)["coefficients"].tolist()
        return table != [[1.0, 0.0]] * 10

    near, weak, strong = self_consistent.NEAR, 0.01, 2.0
    assert (changes(weak, near), changes(strong, near)) == (False, True)
    assert changes(weak, near=0.0)  # there is something to take off
    assert not changes(strong, near=10.0)


def test_evaluations_of_calibration() -> None:
    """The teacher's M T full ones, cached step or not, and two trajectories of the run."""
    clock, sampler = Clock(4, [0, 2]), ddim(steps=4)
    cached = CachedUNet(unet(num_class_embeds=10), 2, clock)
    corrector = build(SelfConsistent, {"substeps": 3})
    corrector.calibrate(bench_on(cached, sampler, clock, images=4))
    substeps = sum(len(step) for step in finer_grid(sampler, 3))
    assert clock.evaluations.full == 4 * (substeps + 2 * 2)
    assert clock.evaluations.cached == 4 * 2 * 2


class Taught(DenoisingCallback):
    """Lets a teacher go its way beside the run, and changes nothing."""

    name = "taught"

    def __init__(self, grid: list[list[Substep]]) -> None:
        super().__init__(BaseOptions())
        self.grid = grid

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        advanced(step, 2 * step.sample, self.grid[step.index])
        return prediction


def test_the_teacher_leaves_the_cache_alone() -> None:
    clock, sampler, noise = Clock(4, [0, 2]), ddim(steps=4), Noise(0, [0, 3], SHAPE)
    cached = CachedUNet(unet(), 2, clock)
    beside = run(cached, sampler, noise, [Taught(finer_grid(sampler, 2))], clock=clock)
    assert torch.equal(beside, run(cached, sampler, noise, clock=clock))


def test_on_the_packaged_model_a_cached_run_comes_nearer_to_the_uncached_one() -> None:
    """On images that did not fit it: to finer, uncached steps, at the same evaluations."""
    model, sampler = packaged(), ddim(steps=10, spacing="quad")
    clock = Clock(10, [0, 5])
    cached = CachedUNet(model.load(), 3, clock)
    corrector = build(SelfConsistent, {"substeps": 2})
    corrector.use(corrector.calibrate(Bench(cached, clock, model, sampler, seed=1, images=8)))
    noise, condition = Noise(0, range(100, 104), model.shape), model.condition(range(100, 104))
    plain = run(cached, sampler, noise, clock=clock, condition=condition)
    ours = run(cached, sampler, noise, [corrector], clock=clock, condition=condition)
    finer = ddim(steps=30, spacing="quad")
    exact = run(model.load(), finer, noise, condition=condition)
    assert (ours - exact).square().sum() < 0.8 * (plain - exact).square().sum()


# --- the grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize("substeps", [1, 2, 4, 50])
@pytest.mark.parametrize(
    "sampler",
    [ddim(steps=20), ddim(steps=100, spacing="quad"), build(PLMS, {"steps": 10}, SCHEDULE)],
    ids=["uniform", "quad", "plms"],
)
def test_substeps_join(sampler: Any, substeps: int) -> None:
    grid = finer_grid(sampler, substeps)
    assert [step[0][0] for step in grid] == list(sampler.timesteps)
    flat = [sub for step in grid for sub in step]
    assert all(before[2] == after[1] for before, after in itertools.pairwise(flat))
    assert (flat[0][1], flat[-1][2]) == (sampler.levels[0], sampler.levels[-1])
    for step in grid:
        assert len(step) <= substeps
        assert all(a[0] > b[0] for a, b in itertools.pairwise(step))
    if substeps == 4:
        assert len(grid[0]) == 4


# --- what is refused --------------------------------------------------------------------------


class _Scaling(DDIM):
    """Shows the network something else than the sample, which finer steps would not know of."""

    def network_input(self, state: State, index: int, sample: Tensor) -> Tensor:
        return sample / 2


def test_other_samplers_are_refused() -> None:
    others = [ddim(steps=4, eta=0.5), ddim(steps=4, clip_sample=True)]
    velocity, scaled = ddim(steps=4), build(_Scaling, {"steps": 4}, SCHEDULE)
    velocity.predictions = frozenset({"v"})  # which a step of the teacher would take for noise
    others += [velocity, scaled, build(DiffusersSampler, {"steps": 4}, SCHEDULE)]
    for sampler in others:
        with pytest.raises(Incompatible, match="finer steps approach"):
            build(SelfConsistent).check(sampler, Clock(4))
    build(SelfConsistent).check(build(PLMS, {"steps": 4}, SCHEDULE), Clock(4))


def test_three_images_are_too_few() -> None:
    with pytest.raises(ConfigError, match="3 calibration images, wanted 4 or more"):
        build(SelfConsistent).calibrate(bench_on(ConvNet(), ddim(steps=2), Clock(2), images=3))


# --- look-ahead refresh -----------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_look_ahead_by_hand(weight: float) -> None:
    clock, sampler, noise = Clock(5, [0, 2, 4]), ddim(steps=5), Noise(3, range(2), SHAPE)
    cached = CachedUNet(unet(), 2, clock)
    ahead = build(LookAhead, {"weight": weight})
    ours = run(cached, sampler, noise, [ahead], clock=clock)
    assert (clock.evaluations.full, clock.evaluations.cached) == (2 * 3, 2 * (2 + 2))
    by_hand = Clock(5)
    other, x = CachedUNet(cached.network, 2, by_hand), noise.initial()
    with torch.inference_mode():
        for index, timestep in enumerate(sampler.timesteps):
            when, levels = torch.full((2,), timestep), sampler._abar[index : index + 2]
            by_hand.full = index == 0
            e = other(x, when)
            if index in (2, 4):
                by_hand.full = True
                e = e + weight * (other(move(x, e, levels), when) - e)
            x = move(x, e, levels)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_look_ahead_without_a_cache_changes_nothing() -> None:
    network, sampler, noise, clock = ConvNet(), ddim(steps=4), Noise(1, [0], SHAPE), Clock(4)
    assert torch.equal(run(network, sampler, noise, [build(LookAhead)], clock=clock),
                       run(network, sampler, noise))  # fmt: skip
    assert clock.evaluations.full == 4


def test_look_ahead_between_the_stages_of_a_method_is_refused() -> None:
    heun = build(DiffusersSampler, {"scheduler": "HeunDiscreteScheduler", "steps": 4}, SCHEDULE)
    with pytest.raises(Incompatible, match="look-ahead: sampler diffusers: a step of its method"):
        build(LookAhead).check(heun, Clock(4))
