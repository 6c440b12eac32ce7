"""The DDIM sampler against its equations and against diffusers' scheduler."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import SCHEDULE, ConvNet, ddim, run, trajectory
from torch import Tensor, nn

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Draw, Noise
from iec_eval.samplers.ddim import ddim_coefficients, ddim_sigma, ddim_timesteps

SHAPE = (3, 6, 6)


def test_uniform_timesteps() -> None:
    assert ddim_timesteps(10, "uniform", 1000) == tuple(range(900, -1, -100))
    assert ddim_timesteps(100, "uniform", 1000) == tuple(range(990, -1, -10))
    assert ddim_timesteps(3, "uniform", 10) == (6, 3, 0)
    assert ddim_timesteps(1, "uniform", 1000) == (0,)
    assert ddim_timesteps(167, "uniform", 1000)[0] == 830  # the noisiest 165 are left out


@pytest.mark.parametrize(("steps", "instead"), [(334, 333), (374, 333), (600, 500)])
def test_uniform_steps_begin_where_there_is_little_but_noise(steps: int, instead: int) -> None:
    with pytest.raises(ConfigError, match=f"take {instead} or spacing: even"):
        ddim_timesteps(steps, "uniform", 1000)
    assert ddim_timesteps(instead, "uniform", 1000)[0] >= 996
    assert ddim_timesteps(375, "uniform", 1000)[0] == 748


def test_quad_timesteps() -> None:
    timesteps = ddim_timesteps(100, "quad", 1000)
    assert len(timesteps) == 100
    assert timesteps[0] == 800
    assert timesteps[-1] == 0
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert len(set(timesteps)) == 96
    # floor of u^2 for u evenly spaced, in exact arithmetic: i^2 * 800 / 99^2
    assert timesteps[1:-1] == tuple(i * i * 800 // 99**2 for i in range(98, 0, -1))


def test_quad_steps_that_do_nothing() -> None:
    timesteps = ddim_timesteps(100, "quad", 1000)
    pairs = zip(timesteps, (*timesteps[1:], -1), strict=True)
    coefficients = [ddim_coefficients(SCHEDULE.abar(a), SCHEDULE.abar(b)) for a, b in pairs]
    assert [i for i, (_, b) in enumerate(coefficients) if b == 0] == [93, 96, 97, 98]
    assert [i for i, (a, _) in enumerate(coefficients) if a == 1] == [93, 96, 97, 98]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_that_do_nothing_leave_the_sample_as_it_is(eta: float) -> None:
    sampler = ddim(steps=100, spacing="quad", eta=eta)
    states = trajectory(ConvNet(), sampler, Noise(0, [0, 1], SHAPE))
    same = [i for i in range(100) if torch.equal(states[i], states[i + 1])]
    assert same == [93, 96, 97, 98]


def test_even_timesteps_leave_none_of_the_noise_out() -> None:
    for steps in (1, 2, 10, 100, 1000):
        assert ddim_timesteps(steps, "even", 1000) == ddim_timesteps(steps, "uniform", 1000)
    for steps in (3, 126, 145, 600, 999):
        found = ddim_timesteps(steps, "even", 1000)
        gaps = {now - then for now, then in itertools.pairwise(found)}
        assert (len(found), found[-1]) == (steps, 0)
        assert max(gaps) - min(gaps) <= 1
        assert 1000 - found[0] <= max(gaps) + 1


def test_other_steps_are_over_the_same_stretch_of_noise() -> None:
    def first(number: int, **given: Any) -> float:
        changed = ddim(steps=100, **given).other_steps(number)
        return ddim(**{"steps": 100, **given, **changed}).timesteps[0]

    assert [first(n) for n in (100, 125, 126, 145, 200)] == [990, 992, 992, 993, 995]
    assert [first(n, spacing="quad") for n in (100, 145)] == [800, 800]
    assert ddim(steps=30).other_steps(59) == {"steps": 59, "spacing": "even"}
    with pytest.raises(Incompatible, match=r"150 uniform steps leave out the noisiest 100 of 1000"):
        ddim(steps=150).other_steps(290)


def test_ldm_timesteps_are_the_uniform_ones_one_later() -> None:
    assert ddim_timesteps(10, "ldm", 1000) == tuple(range(901, 0, -100))
    assert ddim_timesteps(500, "ldm", 1000) == tuple(range(999, 0, -2))
    assert ddim_timesteps(1, "ldm", 1000) == (1,)


def test_ldm_ends_at_the_noise_of_timestep_0() -> None:
    """For an exact prediction the last state is sqrt(abar(0)) x0 + sqrt(1 - abar(0)) eps."""
    sampler, noise = ddim(steps=10, spacing="ldm"), Noise(0, [0, 1], SHAPE)
    x0, eps = torch.full((2, *SHAPE), 0.5), noise.initial()
    abar = SCHEDULE.abar(sampler.timesteps[0])
    state = sampler.start(math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps)
    for index in range(10):
        state = sampler.step(state, index, eps, noise.draw(index))
    left = math.sqrt(SCHEDULE.abar(0)) * x0 + math.sqrt(1 - SCHEDULE.abar(0)) * eps
    torch.testing.assert_close(state.sample, left, atol=5e-5, rtol=0)


def test_more_steps_than_timesteps_is_an_error() -> None:
    with pytest.raises(ConfigError, match="1001 steps wanted, the model has 1000"):
        ddim(steps=1001)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (30, "30 steps do not divide the model's 1000 timesteps, .* takes more steps than asked"),
        (1000, "1000 steps wanted; .* allow 500 at most"),
        (1001, "1001 steps wanted, the model has 1000"),
    ],
)
def test_steps_that_ldm_spacing_has_no_timesteps_for(steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ddim(steps=steps, spacing="ldm")


def test_coefficients_are_those_of_the_two_stage_form() -> None:
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps, with x0 from x and eps."""
    x, eps, now, then, sigma = 0.7, -0.4, 0.2, 0.3, 0.15
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    wanted = math.sqrt(then) * x0 + math.sqrt(1 - then - sigma**2) * eps
    a, b = ddim_coefficients(now, then, sigma)
    assert a * x + b * eps == pytest.approx(wanted, rel=1e-12)
    assert a >= 1
    assert ddim_coefficients(now, then)[1] <= 0


@pytest.mark.parametrize("steps", [5, 50])
def test_the_scaling_of_the_sample_does_not_depend_on_the_number_of_steps(steps: int) -> None:
    abar = [SCHEDULE.abar(t) for t in (*ddim_timesteps(steps, "quad", 1000), -1)]
    product = math.prod(ddim_coefficients(a, b)[0] for a, b in itertools.pairwise(abar))
    assert product == pytest.approx(1 / math.sqrt(SCHEDULE.abar(800)), rel=1e-12)


def test_sigma_at_eta_one_is_that_of_ddpm() -> None:
    """Ho et al. 2020: beta_tilde = (1 - abar') / (1 - abar) * beta."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    now, then = SCHEDULE.abar(500), SCHEDULE.abar(499)
    beta_tilde = (1 - then) / (1 - now) * float(betas[500])
    assert ddim_sigma(now, then, 1.0) ** 2 == pytest.approx(beta_tilde, rel=1e-9)
    assert ddim_sigma(now, then, 0.0) == 0


def test_without_eta_no_noise_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, noise = ddim(steps=5), Noise(0, [0], SHAPE)
    start = noise.initial()
    monkeypatch.setattr(noise, "initial", lambda: start)
    monkeypatch.setattr(noise, "_row", lambda *_: pytest.fail("noise was drawn"))
    run(ConvNet(), sampler, noise)


def test_noise_is_that_of_the_step() -> None:
    sampler, noise = ddim(steps=5, eta=1.0), Noise(0, [4, 2], SHAPE)
    state = sampler.start(noise.initial())
    nothing = torch.zeros_like(state.sample)
    for index in range(5):
        now, then = sampler._abar[index], sampler._abar[index + 1]
        after = sampler.step(state, index, nothing, noise.draw(index)).sample
        added = after - math.sqrt(then / now) * state.sample
        sigma = ddim_sigma(now, then, 1.0)
        torch.testing.assert_close(added, sigma * noise.draw(index).value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 10, 30])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_equals_the_scheduler_of_diffusers(steps: int, eta: float, clip: bool) -> None:
    network, noise = ConvNet(strength=2.0), Noise(3, [0, 5], SHAPE)
    sampler = ddim(steps=steps, eta=eta, clip_sample=clip)
    assert sampler.clips == clip
    ours = run(network, sampler, noise)
    theirs = diffusers_loop(network, noise, steps, eta, clip)
    limit = 2e-5 * float(theirs.abs().max().clamp(min=1))
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ldm_spacing_is_that_of_diffusers_with_an_offset(steps: int, eta: float) -> None:
    network, noise = ConvNet(), Noise(3, [0, 5], SHAPE)
    ours = run(network, ddim(steps=steps, eta=eta, spacing="ldm"), noise)
    offset = {"steps_offset": 1, "set_alpha_to_one": False}
    theirs = diffusers_loop(network, noise, steps, eta, clip=False, **offset)
    limit = 2e-5 * float(theirs.abs().max().clamp(min=1))
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


def test_clipping_makes_a_difference_here() -> None:
    network, noise = ConvNet(strength=2.0), Noise(3, [0, 5], SHAPE)
    clipped = run(network, ddim(steps=10, clip_sample=True), noise)
    free = run(network, ddim(steps=10), noise)
    assert not torch.allclose(clipped, free, atol=0.1)


@torch.no_grad()
def diffusers_loop(
    network: nn.Module, noise: Noise, steps: int, eta: float, clip: bool, **options: Any
) -> Tensor:
    given: Any = {
        "beta_start": 1e-4,
        "beta_end": 2e-2,
        "beta_schedule": "linear",
        "clip_sample": clip,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    }
    scheduler: Any = DDIMScheduler(**{**given, **options})
    scheduler.set_timesteps(steps)
    sample = noise.initial()
    for index, timestep in enumerate(scheduler.timesteps):
        eps = network(sample, timestep.expand(len(sample)).float())
        draw: Draw = noise.draw(index)
        extra = {"eta": eta, "variance_noise": draw.value} if eta else {}
        sample = scheduler.step(eps, timestep, sample, **extra).prev_sample
    return sample
