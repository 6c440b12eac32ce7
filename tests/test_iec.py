"""IEC: the two forms of the paper's iteration, its bookkeeping, its options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import (
    ConstantNet,
    ConvNet,
    FixedNoise,
    Recorder,
    Spy,
    build,
    ddim,
    run,
    trajectory,
    unet,
)
from torch import Tensor

from iec_eval.callbacks.iec import IEC, PRESETS, Correction, Ends, corrected_steps
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.options import validated
from iec_eval.samplers.ddim import DDIM, ddim_coefficients, ddim_sigma

SHAPE = (3, 6, 6)
WEIGHTS = [[0.5], [1.0], [1.0, 0.5], [0.5, 0.25], [0.3, 0.3, 0.3], [0.5, 0.25, 0.125], [0.9, 1.1]]


def iec(**options: Any) -> IEC:
    callback: IEC = build(IEC, options)
    return callback


def start(count: int = 2, dtype: torch.dtype = torch.float64) -> FixedNoise:
    return FixedNoise(Noise(5, range(count), SHAPE).initial().to(dtype))


def steps_of(sampler: DDIM) -> list[tuple[float, float, float]]:
    """(timestep, A, B) of every step."""
    abar = sampler._abar
    pairs = [ddim_coefficients(a, b) for a, b in itertools.pairwise(abar)]
    return [(t, a, b) for t, (a, b) in zip(sampler.timesteps, pairs, strict=True)]


@torch.no_grad()
def in_sample_space(
    network: Any,
    sampler: DDIM,
    x: Tensor,
    weights: Sequence[float],
    tolerance: float = 0.0,
    *,
    relative: bool = False,
    keep_last: bool = True,
) -> Tensor:
    """Equation 10 as it is written, for one batch that is judged as one image."""
    for timestep, a, b in steps_of(sampler):
        when = torch.full((len(x),), timestep)
        estimate = a * x + b * network(x, when)
        for weight in weights:
            change = a * x + b * network(estimate, when) - estimate
            size = change.norm() / (estimate.norm() + 1e-6) if relative else weight * change.norm()
            if keep_last or size >= tolerance:
                estimate = estimate + weight * change
            if size < tolerance:
                break
        x = estimate
    return x


# --- the iteration ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_equals_the_iteration_on_samples(weights: list[float], spacing: str) -> None:
    network, sampler, noise = (
        ConvNet(strength=2.0).double(),
        ddim(steps=7, spacing=spacing),
        start(),
    )
    ours = run(network, sampler, noise, [iec(weights=weights, tolerance=None)])
    theirs = in_sample_space(network, sampler, noise.initial(), weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    plain = run(network, sampler, noise)
    assert not torch.allclose(ours, plain, rtol=1e-3)


def test_equals_the_iteration_on_samples_in_single_precision() -> None:
    network, sampler, noise = ConvNet(strength=2.0), ddim(steps=7), start(dtype=torch.float32)
    ours = run(network, sampler, noise, [iec(tolerance=None)])
    theirs = in_sample_space(network, sampler, noise.initial(), [0.5])
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep_last", [False, True])
def test_tolerance_is_that_of_each_image(relative: bool, keep_last: bool) -> None:
    network, sampler = ConvNet(strength=2.0).double(), ddim(steps=9)
    x = start(4).initial() * torch.tensor([0.01, 1.0, 0.3, 4.0]).view(-1, 1, 1, 1).double()
    options = {
        "weights": [0.5] * 4,
        "tolerance": 0.02,
        "tolerance_mode": "relative" if relative else "absolute",
        "apply_on_converge": keep_last,
    }
    ours = run(network, sampler, FixedNoise(x), [iec(**options)])
    form = {"relative": relative, "keep_last": keep_last}
    alone = [in_sample_space(network, sampler, row[None], [0.5] * 4, 0.02, **form) for row in x]
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-10, atol=1e-10)
    never = run(network, sampler, FixedNoise(x), [iec(weights=[0.5] * 4, tolerance=None)])
    assert not torch.allclose(ours, never, rtol=1e-6), "the tolerance was never reached"


def test_the_batch_may_be_judged_as_one() -> None:
    network, sampler = ConvNet(strength=2.0).double(), ddim(steps=9)
    x = start(3).initial() * torch.tensor([0.01, 1.0, 4.0]).view(-1, 1, 1, 1).double()
    options = {**PRESETS["official_ddim"], "weights": [0.5, 0.25], "tolerance": 0.02}
    ours = run(network, sampler, FixedNoise(x), [iec(**options)])
    form = {"relative": True, "keep_last": False}
    together = in_sample_space(network, sampler, x, [0.5, 0.25], 0.02, **form)
    torch.testing.assert_close(ours, together, rtol=1e-10, atol=1e-10)
    alone = run(network, sampler, FixedNoise(x[:1]), [iec(**options)])
    assert not torch.allclose(ours[:1], alone, rtol=1e-6)


def test_heun() -> None:
    """The second evaluation at the next timestep; the last step has none and is plain."""
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=6), start()
    ours = run(network, sampler, noise, [iec(preset="heun")])
    x, steps = noise.initial(), steps_of(sampler)
    for position, (timestep, a, b) in enumerate(steps):
        eps = network(x, torch.full((2,), timestep))
        if position + 1 < len(steps):
            then = torch.full((2,), steps[position + 1][0])
            eps = (eps + network(a * x + b * eps, then)) / 2
        x = a * x + b * eps
    torch.testing.assert_close(ours, x.detach(), rtol=1e-10, atol=1e-10)


def test_two_callbacks_chain() -> None:
    """The second refines what the first gave: together they are one with both weights."""
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=5), start()
    both = run(network, sampler, noise, [iec(weights=[0.5], tolerance=None),
                                         iec(weights=[0.25], tolerance=None)])  # fmt: skip
    one = run(network, sampler, noise, [iec(weights=[0.5, 0.25], tolerance=None)])
    torch.testing.assert_close(both, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"weights": []}, {"weights": [0.0]}, {"weights": [0.0, 0.0], "tolerance": None},
     {"where": []}, {"corrections": 0}],
)  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_correcting_nothing_is_bit_identical(options: dict[str, Any], eta: float) -> None:
    network, sampler, noise = ConvNet(strength=2.0), ddim(steps=6, eta=eta), Noise(1, [2, 0], SHAPE)
    corrected = run(network, sampler, noise, [iec(**options)])
    assert torch.equal(corrected, run(network, sampler, noise))


def test_the_residual_shrinks() -> None:
    """With |B| ||J|| < 1 every correction shrinks it, by 1 - lambda (1 - |B| ||J||) at least."""
    network, sampler, noise = ConvNet(strength=0.3).double(), ddim(steps=5), start(3)
    seen = Residuals(validated(IEC.Options, {"weights": [0.5] * 6, "tolerance": None}, "iec"))
    run(network, sampler, noise, [seen])
    for step in range(5):
        rows = torch.stack(seen.of_step[step])
        assert len(rows) == 6
        assert (rows[1:] < 0.9 * rows[:-1]).all()


class Residuals(IEC):
    """Keeps the residuals of every step's corrections."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.of_step: dict[int, list[Tensor]] = {}

    def on_correction(self, step: Step, correction: Correction) -> None:
        self.of_step.setdefault(step.index, []).append(correction.residual)


# --- noise ------------------------------------------------------------------------------------


def added_noise(preset: str) -> tuple[Tensor, list[Tensor]]:
    """Noise that each step of a stochastic run added, in units of sigma, and the step's draw."""
    sampler, noise = ddim(steps=6, eta=1.0), Noise(5, range(6), (3, 16, 16))
    states = trajectory(ConstantNet(0.3), sampler, noise, [iec(preset=preset, tolerance=None)])
    added = []
    for index in range(5):  # the last step adds none
        now, then = sampler._abar[index : index + 2]
        sigma = ddim_sigma(now, then, 1.0)
        a, b = ddim_coefficients(now, then, sigma)
        added.append((states[index + 1].double() - a * states[index].double() - b * 0.3) / sigma)
    return torch.stack(added), [noise.draw(index).value.double() for index in range(5)]


def test_shared_noise_has_the_variance_of_the_step() -> None:
    added, draws = added_noise("paper")
    torch.testing.assert_close(added, torch.stack(draws), atol=1e-3, rtol=0)
    for of_step in added:
        assert float(of_step.var()) == pytest.approx(1, abs=0.08)


def test_fresh_noise_has_half_of_it() -> None:
    """(1 - lambda)^2 + lambda^2 = 1/2 at lambda = 1/2."""
    added, draws = added_noise("official_ddim")
    for of_step, draw in zip(added, draws, strict=True):
        assert float(of_step.var()) == pytest.approx(0.5, abs=0.04)
        rest = of_step - 0.5 * draw
        assert float(rest.var()) == pytest.approx(0.25, abs=0.02)
        assert abs(float((rest * draw).mean())) < 0.05


def test_fresh_noise_is_new_at_every_correction() -> None:
    sampler, noise = ddim(steps=3, eta=1.0), Noise(5, range(2), SHAPE)
    options = {**PRESETS["official_ddim"], "weights": [0.5, 0.25], "tolerance": None}
    states = trajectory(ConstantNet(0.3), sampler, noise, [iec(**options)])
    now, then = sampler._abar[:2]
    sigma = ddim_sigma(now, then, 1.0)
    a, b = ddim_coefficients(now, then, sigma)
    draws = [noise.draw(0, evaluation).value for evaluation in (0, 2, 3)]
    z = 0.75 * (0.5 * draws[0] + 0.5 * draws[1]) + 0.25 * draws[2]
    wanted = a * states[0] + b * 0.3 + sigma * z
    torch.testing.assert_close(states[1], wanted, atol=1e-4, rtol=0)


# --- which evaluations ------------------------------------------------------------------------

ENDS = [("full", 100, 10), ({"ends": "1/4"}, 50, 5), ({"ends": "1/8"}, 25, 3),
        ({"ends": "1/10"}, 20, 2), ({"ends": "1/20"}, 10, 1)]  # fmt: skip


@pytest.mark.parametrize(("where", "quantized", "cached"), ENDS)
def test_evaluations_of_table_5(where: Any, quantized: int, cached: int) -> None:
    """T = 100: a quantized network is full at every step, DeepCache with N = 10 at ten."""
    for full_steps, extra in ((range(100), quantized), (range(0, 100, 10), cached)):
        clock = Clock(100, full_steps)
        run(
            ConvNet(), ddim(steps=100), Noise(0, [0, 1], (3, 2, 2)), [iec(where=where)], clock=clock
        )
        assert clock.evaluations.full == 2 * (len(full_steps) + extra)
        assert clock.evaluations.cached == 2 * (100 - len(full_steps))


def test_corrections_change_nothing_that_others_read() -> None:
    """Step, timestep and schedule of every first evaluation, with and without IEC."""
    plain, corrected = spied_calls([]), spied_calls([iec(weights=[0.5, 0.5], tolerance=None)])
    assert [call for call in corrected if call[1] == 0] == plain
    for step, evaluation, full, timestep, rows in corrected:
        assert full == (step % 3 == 0)
        assert rows is None
        assert timestep == plain[step][3]
        assert evaluation in ((0, 1, 2) if full else (0,))
    assert len(corrected) == 10 + 2 * 4


def test_next_timestep() -> None:
    calls = spied_calls([iec(preset="heun", where="all")])
    sampler = ddim(steps=10)
    extra = [call for call in calls if call[1] == 1]
    assert [call[0] for call in extra] == list(range(9))
    assert all(call[3] == sampler.timesteps[call[0] + 1] for call in extra)


@pytest.mark.parametrize(
    ("where", "steps"),
    [("full", [0, 3, 6, 9]), ("all", list(range(10))), ("first", [0]), ([1, 3], [1, 3]),
     ({"ends": "1/10"}, [0, 9]), ({"ends": 0.5}, [0, 3, 6, 9]), ({"ends": 0.0}, [])],
)  # fmt: skip
def test_where(where: Any, steps: list[int]) -> None:
    calls = spied_calls([iec(where=where, tolerance=None)])
    assert [call[0] for call in calls if call[1] == 1] == steps
    # a corrected step evaluates the way the step itself does
    assert all(call[2] == (call[0] % 3 == 0) for call in calls)


def spied_calls(callbacks: list[IEC]) -> list[tuple[int, int, bool, float, list[int] | None]]:
    sampler = ddim(steps=10)
    clock = Clock(10, range(0, 10, 3))
    spy = Spy(ConvNet(), clock)
    run(spy, sampler, Noise(0, [0, 1], SHAPE), callbacks, clock=clock)
    return spy.calls


def test_shares_are_exact() -> None:
    """The float 0.1 is a little more than a tenth, which would be a step too many at each end."""
    assert len(corrected_steps(Ends(ends=0.1), 100, range(100))) == 20
    assert corrected_steps(Ends(ends=0.3), 10, range(10)) == {0, 1, 2, 7, 8, 9}
    assert corrected_steps(Ends(ends="1/10"), 30, range(30)) == {0, 1, 2, 27, 28, 29}
    assert corrected_steps(Ends(ends="1/3"), 10, range(10)) == {0, 1, 2, 3, 7, 8, 9}
    assert corrected_steps(Ends(ends=1.0), 4, [0, 2]) == {0, 2}


# --- per-image tolerance ----------------------------------------------------------------------

SIZES = [0.001, 5.0, 0.5]
CONVERGING = {"weights": [0.5] * 5, "tolerance": 0.2}


def sized_start(positions: Sequence[int]) -> FixedNoise:
    rows = Noise(5, range(3), SHAPE).initial() * torch.tensor(SIZES).view(-1, 1, 1, 1)
    return FixedNoise(rows[list(positions)].double())


def test_converged_images_are_not_evaluated_again() -> None:
    clock, sampler = Clock(4), ddim(steps=4)
    spy = Spy(ConvNet(strength=2.0).double(), clock)
    run(spy, sampler, sized_start([0, 1, 2]), [iec(**CONVERGING)], clock=clock)
    seen: set[tuple[int, ...]] = set()
    for before, after in zip(spy.calls, spy.calls[1:], strict=False):
        if after[0] == before[0] and after[1] > 1:
            remaining = {0, 1, 2} if before[4] is None else set(before[4])
            now = {0, 1, 2} if after[4] is None else set(after[4])
            assert now <= remaining
            seen.add(tuple(sorted(now)))
    assert len(seen) > 1, "no image converged before the others: the test shows nothing"
    shown = [len(sample) for sample in spy.shown]
    rows = [3 if call[4] is None else len(call[4]) for call in spy.calls]
    assert shown == rows
    assert clock.evaluations.full == sum(rows)


def test_tolerance_does_not_look_at_the_batch() -> None:
    network, sampler = ConvNet(strength=2.0).double(), ddim(steps=4)
    together = run(network, sampler, sized_start([0, 1, 2]), [iec(**CONVERGING)])
    for positions in ([0], [1], [2], [2, 0]):
        some = run(network, sampler, sized_start(positions), [iec(**CONVERGING)])
        torch.testing.assert_close(some, together[positions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("refresh", [True, False])
def test_cached_features_of_converged_images_are_left(refresh: bool) -> None:
    """Each image's feature is of its own last evaluation, as if it were alone."""
    noise = Noise(5, range(3), (3, 8, 8)).initial() * torch.tensor(SIZES).view(-1, 1, 1, 1)
    options = {"weights": [0.5] * 5, "tolerance": 0.5, "refresh_cache": refresh}
    together, counts = features_and_counts(noise, options)
    for position in range(3):
        alone, _ = features_and_counts(noise[position : position + 1], options)
        torch.testing.assert_close(
            together[:, position], alone[:, 0], rtol=1e-4, atol=1e-4 * float(alone.abs().max())
        )
    assert any(0 < count < 3 for count in counts), "all converged together: shows nothing"


def features_and_counts(x: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[int]]:
    clock = Clock(6, range(0, 6, 2))
    cached = CachedUNet(unet(), 2, clock)
    spy = Spy(cached, clock)
    recorder = Recorder(cached)
    run(spy, ddim(steps=6), FixedNoise(x), [iec(**options), recorder], clock=clock)
    return torch.stack(recorder.features), [len(shown) for shown in spy.shown]


# --- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [True, False])
def test_refresh_cache(refresh: bool) -> None:
    """After a corrected step the cache is of the correction's evaluation, or of the first."""
    clock, noise = Clock(4, [0, 2]), Noise(5, [0, 1], (3, 8, 8))
    cached = CachedUNet(unet(), 2, clock)
    keeper = FeatureKeeper(cached)
    run(keeper, ddim(steps=4), noise, [iec(refresh_cache=refresh)], clock=clock)
    first, corrected = keeper.after[0], keeper.after[1]
    assert torch.equal(first, corrected) != refresh
    other = CachedUNet(cached.network, 2, Clock(4))
    with torch.inference_mode():
        other(keeper.shown[1 if refresh else 0], torch.full((2,), keeper.timesteps[0]))
    assert other.feature is not None
    assert torch.equal(corrected, other.feature)


@pytest.mark.parametrize("noise", ["shared", "fresh"])
def test_refresh_without_correcting(noise: str) -> None:
    """The evaluations of IEC and the caches they leave, with the step's own predictions."""
    clock, x, options = Clock(4, [0, 2]), Noise(5, [0, 1], (3, 8, 8)), {"weights": [0.5, 0.5]}
    cached = CachedUNet(unet(), 2, clock)
    sampler = ddim(steps=4, eta=1.0)
    keepers = []
    for correct in (True, False):
        keepers.append(FeatureKeeper(cached))
        callbacks = [iec(correct=correct, noise=noise, tolerance=None, **options), Recorder(cached)]
        run(keepers[-1], sampler, x, callbacks, clock=clock)
        recorder = callbacks[-1]
        assert torch.equal(recorder.predictions[0], keepers[-1].outputs[0]) != correct
    corrected, plain = keepers
    assert len(corrected.after) == len(plain.after) == 4 + 2 * 2
    assert all(torch.equal(corrected.after[i], plain.after[i]) for i in range(3))
    a, b = coefficients(sampler, 0)
    moved = a * plain.shown[0] + b * plain.outputs[0]
    sigma = ddim_sigma(*sampler._abar[:2], 1.0)
    torch.testing.assert_close(plain.shown[3], moved + sigma * x.draw(0).value)


def coefficients(sampler: DDIM, index: int) -> tuple[float, float]:
    now, then = sampler._abar[index : index + 2]
    return ddim_coefficients(now, then, ddim_sigma(now, then, sampler.options.eta))


def test_without_a_cache_refreshing_alone_changes_nothing() -> None:
    network, sampler, noise, clock = ConvNet(), ddim(steps=4), Noise(1, [0], SHAPE), Clock(4)
    refreshed = run(network, sampler, noise, [iec(correct=False)], clock=clock)
    assert torch.equal(refreshed, run(network, sampler, noise))
    assert clock.evaluations.full == 8


class FeatureKeeper(torch.nn.Module):
    """Keeps what a cache holds after every evaluation."""

    def __init__(self, cached: CachedUNet) -> None:
        super().__init__()
        self.cached = cached
        self.after: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.shown: list[Tensor] = []
        self.timesteps: list[float] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.cached(sample, timestep)
        assert self.cached.feature is not None
        self.after.append(self.cached.feature.clone())
        self.outputs.append(output.clone())
        self.shown.append(sample.clone())
        self.timesteps.append(float(timestep[0]))
        return output


# --- options ----------------------------------------------------------------------------------


def test_presets() -> None:
    paper, ddim_, ldm, heun = (iec(preset=name).options for name in PRESETS)
    assert iec().options == paper
    assert (paper.weights, paper.tolerance, paper.tolerance_mode) == ([0.5], 1e-5, "absolute")
    assert (paper.tolerance_scope, paper.apply_on_converge, paper.noise) == (
        "sample",
        True,
        "shared",
    )
    assert (ddim_.weights, ddim_.tolerance, ddim_.tolerance_mode) == ([0.5], 1e-3, "relative")
    assert (ddim_.tolerance_scope, ddim_.apply_on_converge, ddim_.noise) == (
        "batch",
        False,
        "fresh",
    )
    assert (ldm.weights, ldm.tolerance, ldm.tolerance_scope) == ([1.0, 0.5], 1e-6, "batch")
    assert (heun.weights, heun.tolerance, heun.timestep) == ([0.5], None, "next")


def test_what_is_given_beats_the_preset() -> None:
    options = iec(preset="official_ddim", tolerance=None, weights=[0.1]).options
    assert (options.tolerance, options.weights, options.noise) == (None, [0.1], "fresh")


@pytest.mark.parametrize(
    ("short", "weights"),
    [({"corrections": 3}, [0.5, 0.5, 0.5]), ({"relaxation": 0.7}, [0.7]),
     ({"corrections": 2, "relaxation": 1}, [1.0, 1.0]), ({"corrections": 0}, []),
     ({"corrections": 3, "relaxation_schedule": "geometric_from_half"}, [0.5, 0.25, 0.125]),
     ({"corrections": 2, "relaxation_schedule": "geometric_from_one"}, [1.0, 0.5])],
)  # fmt: skip
def test_short_form(short: dict[str, Any], weights: list[float]) -> None:
    assert iec(**short).options.weights == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": [0.5], "corrections": 1}, "say the same thing"),
     ({"corrections": -1}, "whole number from 0, got -1"),
     ({"corrections": 1.5}, "whole number from 0, got 1.5"),
     ({"relaxation": "half"}, "wanted a number, got 'half'"),
     ({"relaxation_schedule": "linear"}, "constant, geometric_from_half"),
     ({"where": {"ends": "2"}}, "share between 0 and 1"),
     ({"where": {"ends": float("inf")}}, "a finite number, got inf"),
     ({"where": {"ends": "a half"}}, "fraction such as 1/10"),
     ({"where": "last"}, "where"), ({"tolerance": -1.0}, "tolerance"),
     ({"correct": False, "refresh_cache": False}, "leave nothing"),
     ({"tolerence": 0.1}, "did you mean 'tolerance'"), ({"preset": "papers"}, "preset")],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        iec(**options)


def test_a_listed_step_outside_the_run_is_an_error() -> None:
    iec(where=[0, 9]).check(ddim(steps=10), Clock(10))
    with pytest.raises(ConfigError, match=r"steps \[10\], the run has 0..9"):
        iec(where=[0, 10]).check(ddim(steps=10), Clock(10))


def test_clipping_is_refused_unless_asked_for() -> None:
    clipping = ddim(steps=10, clip_sample=True)
    with pytest.raises(Incompatible, match="allow_clipping"):
        iec().check(clipping, Clock(10))
    iec(allow_clipping=True).check(clipping, Clock(10))
    iec().check(ddim(steps=10), Clock(10))


def test_guided_prediction_is_what_is_corrected() -> None:
    """With guidance, IEC on the guided network is IEC on its guided prediction."""
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=4), start()
    labels = {"label": torch.tensor([1.0, 2.0])}
    nothing = {"label": torch.zeros(2)}
    condition = Condition(labels, nothing, 3.0)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        free: Tensor = network(x, t, **nothing)
        given: Tensor = network(x, t, **labels)
        return free + 3.0 * (given - free)

    ours = run(network, sampler, noise, [iec(tolerance=None)], condition=condition)
    theirs = in_sample_space(guided, sampler, noise.initial(), [0.5])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_correction_is_the_improved_euler_step() -> None:
    """With K = 1 and lambda = 1/2 it averages the predictions at x and at the estimate."""
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=3), start()
    state = sampler.start(noise.initial())
    step = Step(0, state, sampler, Denoiser(network, Condition(), Clock(3)), noise)
    with torch.inference_mode():
        prediction = step.predict(state.sample)
        refined = iec(tolerance=None).refine(step, prediction)
        estimate = step.preview(prediction)
        second = network(estimate, torch.full((2,), sampler.timesteps[0]))
    torch.testing.assert_close(refined, (prediction + second) / 2, rtol=1e-12, atol=1e-12)
    assert math.isfinite(float(refined.sum()))
